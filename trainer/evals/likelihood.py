"""Log-likelihood of continuations, spread over the ranks: what evaluation is made of.

Requests are ordered by length and cut into batches before anybody computes, so that each is computed in the same
company, and with the same result, on any number of ranks.
"""

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from core.console import progress
from core.data.vocabulary import GPT2_VOCAB_SIZE
from core.errors import TrainingError
from trainer.distributed.process_group import PeerFailed, Ranks, StopCheck, gather_objects
from trainer.evals.progress import Kept
from trainer.model.gpt import GPT
from trainer.model.loss import token_scores
from trainer.model.precision import autocast

TOKENS_PER_BATCH = 32_768
MULTIPLE = 8  # of padded lengths


class Request(NamedTuple):
    """Token ids. A context may not be empty: its last token predicts the first of the continuation."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """Sum of the log-probabilities (nats) of a continuation's tokens, and whether each is its position's likeliest."""

    total: float
    greedy: bool


def log_likelihoods(model: GPT, requests: Sequence[Request], ranks: Ranks, precision: str = "auto") -> list[float]:
    """The totals of `likelihoods`."""
    return [each.total for each in likelihoods(model, requests, ranks, precision)]


@torch.no_grad()
def likelihoods(
    model: GPT,
    requests: Sequence[Request],
    ranks: Ranks,
    precision: str = "auto",
    kept: Kept | None = None,
    part: str = "",
    title: str = "",
    check_stop: StopCheck | None = None,
) -> list[Likelihood]:
    """One per request, in their order, on all ranks. What is longer than the model's context is cut on the left, as
    lm-evaluation-harness does.

    `kept` holds what an attempt before has found, under keys that begin with `part`; with a `title` progress is told.
    `check_stop` is called before each round of batches, one per rank.
    Raises TrainingError for numbers that are not finite.
    """
    windows = [cut(request, model.config.context) for request in requests]
    order = sorted(range(len(windows)), key=lambda index: (-len(windows[index].context), index))
    order.sort(key=lambda index: -sum(map(len, windows[index])))
    batches = [order[stretch] for stretch in _batches([sum(map(len, windows[index])) for index in order])]
    known = {
        index: Likelihood(*kept.found[f"{part}{index}"])
        for index in range(len(windows))
        if kept and f"{part}{index}" in kept.found
    }
    left = [batch for batch in batches if not all(index in known for index in batch)]
    was_training = model.training
    model.eval()
    mine: dict[int, Likelihood] = {}
    tells = title and ranks.is_main
    # Lengths vary, so that compiled blocks would be compiled again and again.
    with progress(title, len(windows), "requests") if tells else contextlib.nullcontext(_Untold()) as bar:
        bar.advance(len(known))
        with torch.compiler.set_stance("force_eager"):
            for first in range(0, len(left), ranks.world):
                if check_stop:
                    check_stop()
                if first + ranks.rank >= len(left):
                    continue
                batch = left[first + ranks.rank]
                values = _scores(model, [windows[index] for index in batch], ranks.device, precision)
                mine |= dict(zip(batch, values, strict=True))
                if kept:
                    pairs = zip(batch, values, strict=True)
                    kept.add({f"{part}{index}": value for index, value in pairs if math.isfinite(value.total)})
                bar.advance(len(batch) * ranks.world)
    model.train(was_training)
    found = known | {index: value for each in gather_objects(mine, ranks) for index, value in each.items()}
    _check_finite(found, ranks)
    return [found[index] for index in range(len(windows))]


def cut(request: Request, context: int) -> Request:
    """The last `context` + 1 tokens: the very last one is only predicted."""
    continuation = request.continuation[-context:]
    room = context + 1 - len(continuation)
    return Request(request.context[-room:], continuation)


def _batches(lengths: Sequence[int]) -> list[slice]:
    """Stretches of about TOKENS_PER_BATCH padded tokens; `lengths` fall."""
    found, first = [], 0
    while first < len(lengths):
        rows = max(1, TOKENS_PER_BATCH // lengths[first])
        found.append(slice(first, first + rows))
        first += rows
    return found


def _scores(model: GPT, windows: Sequence[Request], device: torch.device, precision: str) -> list[Likelihood]:
    longest = max(len(context) + len(continuation) - 1 for context, continuation in windows)
    width = min(model.config.context, -(-longest // MULTIPLE) * MULTIPLE)
    tokens_BT = torch.zeros(len(windows), width, dtype=torch.long)
    targets_BT = torch.full((len(windows), width), -1, dtype=torch.long)
    for row, (context, continuation) in enumerate(windows):
        whole = torch.from_numpy(np.concatenate([context, continuation]).astype(np.int64))
        tokens_BT[row, : len(whole) - 1] = whole[:-1]
        targets_BT[row, len(context) - 1 : len(whole) - 1] = whole[len(context) :]
    rows_N = (targets_BT >= 0).nonzero()[:, 0]
    tokens_BT, targets_BT = tokens_BT.to(device), targets_BT.to(device)
    counts_BT = targets_BT >= 0
    with autocast(device, precision):
        # Only what is asked for goes through the output layer, which is a third of a small model's work, and only
        # against tokens that there are: the rows that pad the vocabulary have no share of the probability.
        x_ND = model.hidden(tokens_BT)[counts_BT]
        head_VD = model.head[:GPT2_VOCAB_SIZE]
        losses_N, likeliest_N = token_scores(x_ND, head_VD, targets_BT[counts_BT], model.config.logit_softcap)
    sums_B = torch.zeros(len(windows), dtype=torch.float64).index_add_(0, rows_N, -losses_N.double().cpu())
    misses_B = torch.zeros(len(windows)).index_add_(0, rows_N, (~likeliest_N).float().cpu())
    return [Likelihood(total, not misses) for total, misses in zip(sums_B.tolist(), misses_B.tolist(), strict=True)]


def _check_finite(found: dict[int, Likelihood], ranks: Ranks) -> None:
    bad = [index for index, value in sorted(found.items()) if not math.isfinite(value.total)]
    if not bad:
        return
    if not ranks.is_main:
        raise PeerFailed  # all ranks see it, one says it
    raise TrainingError(
        f"request {bad[0]} of {len(found)} has a log-likelihood of {found[bad[0]].total}: the weights are not finite, "
        "or too large for the precision; evaluate another checkpoint, or set precision to fp32"
    )


class _Untold:
    """In place of a progress bar."""

    def advance(self, amount: float) -> None:
        pass
