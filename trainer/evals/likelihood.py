"""Computes log-likelihoods of continuations on any number of ranks.

Requests are sorted by length and cut into batches, and then the batches are divided among the ranks. So each request is
in the same batch and gets the same result on any number of ranks.
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
from trainer.evals.progress import PartialResults
from trainer.model.gpt import GPT
from trainer.model.loss import token_scores
from trainer.model.precision import autocast

TOKENS_PER_BATCH = 32_768
MULTIPLE = 8  # padded lengths are multiples of this


class ScoringRequest(NamedTuple):
    """Token ids. The context must not be empty, because its last token predicts the first token of the continuation."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """Sum of log-probabilities (nats) of a continuation, and whether each of its tokens is the most likely one."""

    total: float
    greedy: bool


@torch.no_grad()
def likelihoods(
    model: GPT,
    requests: Sequence[ScoringRequest],
    ranks: Ranks,
    precision: str = "auto",
    partial: PartialResults | None = None,
    part: str = "",
    title: str = "",
    check_stop: StopCheck | None = None,
) -> list[Likelihood]:
    """One result per request, in the order of the requests. The results are the same on all ranks.

    A request that exceeds the model's context is truncated on the left, as in lm-evaluation-harness. `partial` holds
    the results of earlier attempts; the keys of these results begin with `part`. `title` is the title of the progress
    bar. In a round, each rank computes one batch, and `check_stop` is called before each round. Raises TrainingError if
    a result is not finite.
    """
    windows = [cut(request, model.config.context) for request in requests]
    order = sorted(range(len(windows)), key=lambda index: (-len(windows[index].context), index))
    order.sort(key=lambda index: -sum(map(len, windows[index])))
    batches = [order[rows] for rows in _batches([sum(map(len, windows[index])) for index in order])]
    known = {
        index: Likelihood(*partial.found[f"{part}{index}"])
        for index in range(len(windows))
        if partial and f"{part}{index}" in partial.found
    }
    left = [batch for batch in batches if not all(index in known for index in batch)]
    was_training = model.training
    model.eval()
    mine: dict[int, Likelihood] = {}
    shown = title and ranks.is_main
    # torch would compile the blocks again for each shape of a batch, so compilation is off.
    with progress(title, len(windows), "requests") if shown else contextlib.nullcontext(_NoProgress()) as bar:
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
                if partial:
                    pairs = zip(batch, values, strict=True)
                    partial.add({f"{part}{index}": value for index, value in pairs if math.isfinite(value.total)})
                bar.advance(len(batch) * ranks.world)
    model.train(was_training)
    found = known | {index: value for each in gather_objects(mine, ranks) for index, value in each.items()}
    _check_finite(found, ranks)
    return [found[index] for index in range(len(windows))]


def cut(request: ScoringRequest, context: int) -> ScoringRequest:
    """Keep the last `context` + 1 tokens. The model predicts the last token but does not read it."""
    continuation = request.continuation[-context:]
    room = context + 1 - len(continuation)
    return ScoringRequest(request.context[-room:], continuation)


def _batches(lengths: Sequence[int]) -> list[slice]:
    """Slices of about TOKENS_PER_BATCH padded tokens. `lengths` are in descending order."""
    found, first = [], 0
    while first < len(lengths):
        rows = max(1, TOKENS_PER_BATCH // lengths[first])
        found.append(slice(first, first + rows))
        first += rows
    return found


def _scores(model: GPT, windows: Sequence[ScoringRequest], device: torch.device, precision: str) -> list[Likelihood]:
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
        # The output layer is a third of a small model's work, so it computes only the positions with a target. Rows
        # that pad the vocabulary get no probability.
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
        raise PeerFailed  # all ranks find the error, rank 0 reports it
    raise TrainingError(
        f"request {bad[0]} of {len(found)} has a log-likelihood of {found[bad[0]].total}: the weights are not finite, "
        "or too large for the precision; evaluate another checkpoint, or set precision to fp32"
    )


class _NoProgress:
    """Used if no progress bar is shown."""

    def advance(self, amount: float) -> None:
        pass
