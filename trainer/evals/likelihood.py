"""Log-likelihood of continuations, spread over the ranks: what multiple-choice evaluation is made of.

Requests are ordered by length and cut into batches before anybody computes, so that each is computed in the same
company, and with the same result, on any number of ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from trainer.distributed import Ranks, gather_objects
from trainer.model.gpt import GPT
from trainer.model.loss import token_losses
from trainer.precision import autocast

TOKENS_PER_BATCH = 32_768
MULTIPLE = 8  # of padded lengths


class Request(NamedTuple):
    """Token ids. A context may not be empty: its last token predicts the first of the continuation."""

    context: Sequence[int]
    continuation: Sequence[int]


@torch.no_grad()
def log_likelihoods(model: GPT, requests: Sequence[Request], ranks: Ranks, precision: str = "auto") -> list[float]:
    """Sum of the log-probabilities (nats) of each continuation's tokens, in the order of `requests`, on all ranks.

    What is longer than the model's context is cut on the left, as lm-evaluation-harness does.
    """
    windows = [cut(request, model.config.context) for request in requests]
    order = sorted(range(len(windows)), key=lambda index: (-len(windows[index].context), index))
    order.sort(key=lambda index: -sum(map(len, windows[index])))
    batches = _batches([sum(map(len, windows[index])) for index in order])
    was_training = model.training
    model.eval()
    mine: dict[int, float] = {}
    # Lengths vary, so that compiled blocks would be compiled again and again.
    with torch.compiler.set_stance("force_eager"):
        for number in range(ranks.rank, len(batches), ranks.world):
            indices = order[batches[number]]
            sums = _sums(model, [windows[index] for index in indices], ranks.device, precision)
            mine |= dict(zip(indices, sums, strict=True))
    model.train(was_training)
    found = {index: value for part in gather_objects(mine, ranks) for index, value in part.items()}
    return [found[index] for index in range(len(windows))]


def cut(request: Request, context: int) -> Request:
    """The last `context` + 1 tokens: the very last one is only predicted."""
    continuation = list(request.continuation)[-context:]
    room = context + 1 - len(continuation)
    return Request(list(request.context)[-room:], continuation)


def _batches(lengths: Sequence[int]) -> list[slice]:
    """Stretches of about TOKENS_PER_BATCH padded tokens; `lengths` fall."""
    found, first = [], 0
    while first < len(lengths):
        rows = max(1, TOKENS_PER_BATCH // lengths[first])
        found.append(slice(first, first + rows))
        first += rows
    return found


def _sums(model: GPT, windows: Sequence[Request], device: torch.device, precision: str) -> list[float]:
    longest = max(len(context) + len(continuation) - 1 for context, continuation in windows)
    width = min(model.config.context, -(-longest // MULTIPLE) * MULTIPLE)
    tokens_BT = torch.zeros(len(windows), width, dtype=torch.long)
    targets_BT = torch.full((len(windows), width), -1, dtype=torch.long)
    for row, (context, continuation) in enumerate(windows):
        whole = torch.tensor([*context, *continuation])
        tokens_BT[row, : len(whole) - 1] = whole[:-1]
        targets_BT[row, len(context) - 1 : len(whole) - 1] = whole[len(context) :]
    tokens_BT, targets_BT = tokens_BT.to(device), targets_BT.to(device)
    with autocast(device, precision):
        x_BTD = model.hidden(tokens_BT)
        losses = token_losses(x_BTD.flatten(0, 1), model.head, targets_BT.flatten(), model.config.logit_softcap)
    return (-losses.view(targets_BT.shape).double().sum(1)).tolist()
