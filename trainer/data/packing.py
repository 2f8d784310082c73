"""Short examples packed into rows of one length, and micro-batches of rows by number, for any number of ranks.

Rows are filled once, best fit for the longest first (Krell et al. 2021, "Efficient Sequence Packing without
Cross-contamination"). Per epoch they are visited in a pseudo-random order that is a pure function of (seed, epoch,
number), as the windows of `trainer.data.order` are: nothing is stored, and any step can be sought directly.
"""

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainer.data.loader import batch_numbers
from trainer.data.order import derive_key, permute


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the examples of each row, so that no row holds more than `room` tokens. No length is above it."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows that have so much left
    rooms: list[int] = []  # the keys of that, ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, left = len(rows), room - length
            rows.append([])
        else:
            left = rooms[place]
            row = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[place]
            left -= length
        rows[row].append(index)
        if left:
            if left not in by_room:
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(row)
    return rows


class NumberedBatches:
    """This rank's micro-batches of items that are known by number, from step `first_step` (from 0) on, endlessly.

    `make(step_items, mine)` makes a micro-batch of the items `mine`; `step_items` are all of the step's, on all ranks.
    """

    def __init__(
        self,
        items: int,
        seed: int,
        first_step: int,
        batch: int,
        micro_batch_size: int,
        rank: int,
        world: int,
        make: Callable[[np.ndarray, np.ndarray], Any],
        skip: Sequence[int] = (),
    ):
        self.is_leaving: Callable[[], bool] = lambda: False  # nothing here waits
        self._items = items
        self._seed = seed
        self._step = first_step
        self._batch = batch
        self._micro_batch = micro_batch_size
        self._per_rank = batch // world
        self._offset = rank * self._per_rank
        self._make = make
        self._skip = sorted(set(skip))
        self._of_step = np.empty(0, np.int64)
        self._done = self._per_rank

    def __next__(self) -> Any:
        if self._done == self._per_rank:
            number = int(batch_numbers(np.array([self._step]), self._skip)[0])
            self._of_step = in_order(number * self._batch + np.arange(self._batch), self._items, self._seed)
            self._step += 1
            self._done = 0
        first = self._offset + self._done
        self._done += self._micro_batch
        return self._make(self._of_step, self._of_step[first : first + self._micro_batch])

    def close(self) -> None:
        """Nothing is running ahead."""


def in_order(numbers: np.ndarray, items: int, seed: int) -> np.ndarray:
    """Which items (from 0) have these places in the endless order, epoch by epoch."""
    found = np.empty_like(numbers)
    epochs = numbers // items
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = permute(numbers[here] - epoch * items, items, derive_key(seed, int(epoch), 3))
    return found
