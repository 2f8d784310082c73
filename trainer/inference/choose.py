"""Chooses the next token of each row from its logits.

One uniform random number per token selects from the cumulative probabilities. A row's choice depends only on the row's
logits, settings and random numbers, so a seed gives the same text in any batch.

Shapes: B rows, V vocabulary, N rows with the same kind of settings, C candidates in descending order.
"""

from collections.abc import Collection, Sequence

import torch

from core.errors import TrainingError
from core.settings.inference import Sampling


def choose(
    logits_BV: torch.Tensor, samplings: Sequence[Sampling], draws: Sequence[float], seen: Sequence[Collection[int]]
) -> list[int]:
    """Returns one token id per row. `draws` are uniform in [0, 1); `seen` holds the ids in each row's text.

    Modifies the rows of `logits_BV` (float32) that have a repetition penalty. Raises TrainingError if a logit is not
    finite.
    """
    if not torch.isfinite(logits_BV).all():
        raise TrainingError("the model's logits are not finite; its weights are damaged or its training diverged")
    for row, sampling in enumerate(samplings):
        if sampling.repetition_penalty != 1:
            _penalise(logits_BV[row], seen[row], sampling.repetition_penalty)
    ids_B = logits_BV.argmax(1)
    free = [row for row, s in enumerate(samplings) if s.temperature and not _is_cut(s)]
    if free:
        p_NV = _softmax(logits_BV[free], [samplings[row] for row in free])
        ids_B[free] = _pick(p_NV, [draws[row] for row in free])
    cut = [row for row, s in enumerate(samplings) if s.temperature and _is_cut(s)]
    if cut:
        ids_B[cut] = _choose_cut(logits_BV[cut], [samplings[row] for row in cut], [draws[row] for row in cut])
    return ids_B.tolist()


def _is_cut(sampling: Sampling) -> bool:
    return bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)


def _penalise(logits_V: torch.Tensor, seen: Collection[int], penalty: float) -> None:
    ids = torch.tensor(sorted(seen), device=logits_V.device)
    values = logits_V[ids]
    logits_V[ids] = torch.where(values > 0, values / penalty, values * penalty)


def _choose_cut(logits_NV: torch.Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> torch.Tensor:
    V = logits_NV.shape[1]
    limits = [min(s.top_k or V, V) for s in samplings]
    if max(limits) < V:
        logits_NC, ids_NC = logits_NV.topk(max(limits))
    else:
        logits_NC, ids_NC = logits_NV.sort(descending=True, stable=True)
    rank_C = torch.arange(logits_NC.shape[1], device=logits_NV.device)
    p_NC = _softmax(logits_NC.masked_fill(rank_C >= _column(limits, logits_NV), -torch.inf), samplings)
    before_NC = p_NC.cumsum(1) - p_NC
    # The likeliest token always passes both tests. The probabilities before it sum to 0, and min_p is relative to its
    # own probability.
    keep_NC = (before_NC < _column([s.top_p for s in samplings], p_NC)) & (
        p_NC >= _column([s.min_p for s in samplings], p_NC) * p_NC[:, :1]
    )
    return ids_NC.gather(1, _pick(p_NC * keep_NC, draws)[:, None])[:, 0]


def _softmax(logits_NC: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Probabilities at each row's temperature, (N, C), float64."""
    z_NC = logits_NC.double()
    # Subtract the maximum before the division: with a tiny temperature the logits would overflow.
    z_NC = z_NC - z_NC.amax(1, keepdim=True)
    return (z_NC / _column([s.temperature for s in samplings], z_NC)).softmax(1)


def _pick(p_NC: torch.Tensor, draws: Sequence[float]) -> torch.Tensor:
    """The first index (N,) at which the cumulative probability of a row exceeds its draw."""
    sums_NC = p_NC.cumsum(1)
    places_N = torch.searchsorted(sums_NC, _column(draws, sums_NC) * sums_NC[:, -1:], right=True)[:, 0]
    # The product above can be rounded up to the last sum. So never pick an index after the last one whose probability
    # is above zero.
    last_N = (sums_NC < sums_NC[:, -1:]).sum(1)
    return torch.minimum(places_N, last_N)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]
