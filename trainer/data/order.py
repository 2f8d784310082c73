"""Maps sample numbers to windows of the token stream. The result does not depend on the number of ranks.

The shards of a split, joined in their order, are one stream of N tokens. Window i holds the tokens [i T, i T + T].
There are (N - 1) // T windows. They predict each token once, also where one shard ends and the next begins. A window
belongs to the shard of its first token.

An epoch takes the shards in a pseudo-random order, in groups of `shards_mixed`. The windows of a group are mixed in a
second pseudo-random order. Both orders are keyed Feistel permutations with cycle walking (Black & Rogaway 2002,
"Ciphers with arbitrary finite domains"). The item at any position is computed in constant time, and memory holds only a
few numbers per shard.
"""

from dataclasses import dataclass

import numpy as np

from core.errors import DataError

_ROUNDS = 4  # four rounds give a strong pseudo-random permutation (Luby & Rackoff 1988)
_U64 = np.uint64
_MASK64 = (1 << 64) - 1


def _mix(x: np.ndarray, key: int) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): 64 well-mixed bits of x and key."""
    with np.errstate(over="ignore"):
        x = x + _U64(key)
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
        return x ^ (x >> _U64(31))


def derive_key(*parts: int) -> int:
    """A 64-bit key, computed from small integers (seed, epoch, purpose)."""
    key = 0
    for part in parts:
        key = (key ^ part) + 0x9E3779B97F4A7C15 & _MASK64
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        key = (key ^ key >> 27) * 0x94D049BB133111EB & _MASK64
        key ^= key >> 31
    return key


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Apply the keyed permutation of [0, size) to `indices` (int64, each in [0, size))."""
    if size <= 1:
        return np.zeros_like(indices)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = _U64((1 << half) - 1)
    shift = _U64(half)
    keys = [derive_key(key, round_number) for round_number in range(_ROUNDS)]
    result = indices.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        # Cycle walking. The cipher permutes [0, n), where n is the smallest power of four that is at least `size`. A
        # result outside of [0, size) is encrypted again until it is in [0, size).
        left, right = result[walking] >> shift, result[walking] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right, round_key) & mask)
        result[walking] = (left << shift) | right
        walking = walking[result[walking] >= _U64(size)]
    return result.astype(np.int64)


@dataclass(frozen=True)
class Windows:
    """For each sample: its shard, the number of its window in the shard, and the window's first token in the shard.

    Each array is int64 (samples,).
    """

    shard: np.ndarray
    window: np.ndarray
    begin: np.ndarray


class WindowOrder:
    """The order of one split. `shard_tokens` are the numbers of tokens of the shards in stream order, `length` is T."""

    def __init__(self, shard_tokens: list[int], length: int, seed: int, shards_mixed: int, where: str):
        tokens = np.asarray(shard_tokens, dtype=np.int64)
        self.length = length
        self.seed = seed
        self.group_shards = shards_mixed
        self.starts = np.concatenate([[0], np.cumsum(tokens)])
        self.windows = int((self.starts[-1] - 1) // length)
        if self.windows < 1:
            raise DataError(
                f"{where}: {self.starts[-1]} tokens are fewer than one window of {length} + 1; "
                "prepare more data, or lower model.context"
            )
        # The first window of each shard is the smallest i with i T >= start. The last full window limits it.
        self.first_window = np.minimum(-(-self.starts // length), self.windows)
        self.shard_windows = np.diff(self.first_window)
        self._plans: dict[int, _EpochPlan] = {}

    def locate(self, samples: np.ndarray) -> Windows:
        """The shard and window of each sample. `samples` are global sample numbers (int64, from 0)."""
        shard = np.empty_like(samples)
        window = np.empty_like(samples)
        epochs = samples // self.windows
        for epoch in np.unique(epochs):
            plan = self._plan(int(epoch))
            here = np.flatnonzero(epochs == epoch)
            position = samples[here] - epoch * self.windows
            groups = plan.group_of(position)
            for group in np.unique(groups):
                chosen = groups == group
                first = int(plan.group_starts[group])
                size = int(plan.group_starts[group + 1]) - first
                inside = permute(position[chosen] - first, size, derive_key(self.seed, int(epoch), 2, int(group)))
                shards = self._group(plan, int(group))
                ends = np.cumsum(self.shard_windows[shards])
                slot = np.searchsorted(ends, inside, side="right")
                shard[here[chosen]] = shards[slot]
                window[here[chosen]] = inside - (ends - self.shard_windows[shards])[slot]
        begin = (self.first_window[shard] + window) * self.length - self.starts[shard]
        return Windows(shard, window, begin)

    def shards_from(self, sample: int, count: int) -> list[int]:
        """The next `count` distinct shards that `sample` and the samples after it need, the soonest first."""
        count = min(count, int(np.count_nonzero(self.shard_windows)))
        found: dict[int, None] = {}
        epoch, position = divmod(sample, self.windows)
        while len(found) < count:
            plan = self._plan(epoch)
            group = int(plan.group_of(np.array([position]))[0])
            for number in range(group, len(plan.group_starts) - 1):
                found |= {int(shard): None for shard in self._group(plan, number) if self.shard_windows[shard]}
                if len(found) >= count:
                    break
            epoch, position = epoch + 1, 0
        return list(found)[:count]

    def _plan(self, epoch: int) -> "_EpochPlan":
        # Two threads call this function, one for batches and one for read-ahead. This needs no lock: plans are
        # immutable, and if one thread drops the plan of the other, the plan is only computed again.
        plan = self._plans.get(epoch)
        if plan is None:
            shards = len(self.shard_windows)
            order = permute(np.arange(shards, dtype=np.int64), shards, derive_key(self.seed, epoch, 1))
            ends = np.concatenate([[0], np.cumsum(self.shard_windows[order])])
            plan = _EpochPlan(order, ends[[*range(0, shards, self.group_shards), shards]])
            self._plans = {epoch: plan, **{k: v for k, v in self._plans.items() if abs(k - epoch) <= 1}}
        return plan

    def _group(self, plan: "_EpochPlan", group: int) -> np.ndarray:
        return plan.shard_order[group * self.group_shards : (group + 1) * self.group_shards]


@dataclass(frozen=True)
class _EpochPlan:
    """The plan of one epoch: the order of its shards, and the first sample of each group of shards.

    Samples are counted within the epoch.
    """

    shard_order: np.ndarray
    group_starts: np.ndarray

    def group_of(self, position: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.group_starts, position, side="right") - 1


def odd_part(number: int) -> int:
    """The largest odd divisor of `number`, such as 3 for 12."""
    return number // (number & -number)


def micro_batch_numbers(rank: int, world: int, accumulation: int, round_robin: bool = False) -> list[int]:
    """The numbers of this rank's micro-batches within a step, in order.

    They are consecutive, except in round-robin order. In round-robin order, the rank takes every `world`-th group of
    micro-batches (trainer.optim.reduce).
    """
    if not round_robin:
        return list(range(rank * accumulation, (rank + 1) * accumulation))
    group = odd_part(accumulation)
    rounds = accumulation // group
    return [(number * world + rank) * group + index for number in range(rounds) for index in range(group)]
