"""Loads the micro-batches of each rank. The batch of a step is the same for any number of ranks.

Step s (from 0) takes the samples [s B, (s + 1) B) for a batch of B sequences. A micro-batch is a range of consecutive
samples, and `trainer.data.order.micro_batch_numbers` assigns micro-batches to ranks. A background thread prepares about
`prefetch` micro-batches ahead.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from trainer.data.cache import CLOSE_SECONDS, ReadAhead, ShardCache
from trainer.data.order import WindowOrder, micro_batch_numbers
from trainer.distributed.process_group import Abandoned

POLL_SECONDS = 0.2  # seconds between two checks for a request to stop, while waiting for data
LOCATED_AT_ONCE = 4096
HANDED_OVER_AT_ONCE = 128


class TokenSource:
    """Reads the samples of one split by their numbers. A sample is T + 1 tokens."""

    def __init__(self, cache: ShardCache, length: int, seed: int, shards_mixed: int):
        self.cache = cache
        self.length = length
        tokens = [shard.tokens for shard in cache.shards]
        self.order = WindowOrder(tokens, length, seed, shards_mixed, cache.data_url)

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """The tokens of samples, int32 (len(numbers), T + 1)."""
        where = self.order.locate(numbers)
        return self.cache.read(where.shard.tolist(), where.begin.tolist(), self.length + 1)


class Batches:
    """Iterates without end over this rank's micro-batches, starting at step `first_step`, counted from 0.

    Each item is a (micro_batch_size, T + 1) int32 tensor on `device`; inputs are [:, :-1], targets [:, 1:]. The batches
    of the steps in `skip`, counted from 1, are left out: each of these steps trains on the next batch. If
    `is_leaving()` returns true during a wait for data, Abandoned is raised. `numbers` are the numbers of this rank's
    micro-batches within a step.
    """

    def __init__(
        self,
        source: TokenSource,
        first_step: int,
        batch: int,
        micro_batch_size: int,
        rank: int,
        world: int,
        prefetch: int,
        device: torch.device,
        fetches: bool,
        skip: Sequence[int] = (),
        round_robin: bool = False,
    ):
        self.is_leaving: Callable[[], bool] = lambda: False
        self._skip = sorted(set(skip))
        self._source = source
        self._batch = batch
        self._micro_batch = micro_batch_size
        self._per_rank = batch // world
        self.numbers = micro_batch_numbers(rank, world, self._per_rank // micro_batch_size, round_robin)
        self._rows = (np.array(self.numbers)[:, None] * micro_batch_size + np.arange(micro_batch_size)).ravel()
        self._device = device
        self._position = first_step * batch
        self._queue: queue.Queue[torch.Tensor | Exception] = queue.Queue(2)
        self._stop = threading.Event()
        self._chunk_rows = micro_batch_size * max(1, min(prefetch // 2, HANDED_OVER_AT_ONCE // micro_batch_size))
        self._chunk = torch.empty(0)
        self._row = 0
        self._read_ahead = ReadAhead(source.cache, self._upcoming) if fetches else None
        self._thread = threading.Thread(target=self._produce, args=(first_step,), name="batches", daemon=True)
        self._thread.start()

    def __next__(self) -> torch.Tensor:
        if self._read_ahead and self._read_ahead.failure:
            raise self._read_ahead.failure
        if self._row == len(self._chunk):
            item = self._wait()
            if isinstance(item, Exception):
                raise item
            self._chunk, self._row = item, 0
        rows = self._chunk[self._row : self._row + self._micro_batch]
        self._row += self._micro_batch
        return rows.to(self._device, non_blocking=True)

    def _wait(self) -> torch.Tensor | Exception:
        while True:
            try:
                return self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self.is_leaving():
                    raise Abandoned from None

    def close(self) -> None:
        """Stop reading. Does not wait for a read that the store has not answered yet."""
        self._stop.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        if self._read_ahead:
            self._read_ahead.close()
        # The thread may be waiting for room in the queue.
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)
        self._source.cache.close()

    def _upcoming(self, count: int) -> list[int]:
        return self._source.order.shards_from(self._position, count)

    def _produce(self, step: int) -> None:
        # Locating samples and handing over micro-batches take time per call, so each call handles many of them.
        steps_at_once = max(1, LOCATED_AT_ONCE // self._per_rank)
        rows = self._micro_batch  # the first call makes one micro-batch only, because training waits for it
        try:
            while not self._stop.is_set():
                firsts = batch_numbers(step + np.arange(steps_at_once), self._skip) * self._batch
                where = self._source.order.locate((firsts[:, None] + self._rows).ravel())
                shards, begins = where.shard.tolist(), where.begin.tolist()
                row = 0
                while row < len(shards) and not self._stop.is_set():
                    self._position = (step + row // self._per_rank) * self._batch
                    chunk = slice(row, row + rows)
                    tokens = self._source.cache.read(shards[chunk], begins[chunk], self._source.length + 1)
                    tensor = torch.from_numpy(tokens)
                    self._put(tensor.pin_memory() if self._device.type == "cuda" else tensor)
                    row += rows
                    rows = self._chunk_rows
                    self._source.cache.patient = True
                    if self._read_ahead:
                        self._read_ahead.start()
                step += steps_at_once
        # Pass the error to the consumer, which must raise it. Otherwise the consumer would wait forever.
        except Exception as error:
            self._put(error)

    def _put(self, item: torch.Tensor | Exception) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def batch_numbers(steps: np.ndarray, skip: Sequence[int]) -> np.ndarray:
    """The number of the batch that each step trains on if the batches of the steps `skip` are left out.

    `steps` and batches count from 0; `skip` is sorted and counts from 1.
    """
    numbers = steps.copy()
    for skipped in skip:
        numbers += numbers >= skipped - 1
    return numbers


def skipping(skip: Sequence[int], step: int) -> str:
    """The flag that skips the batch of `step`, in addition to the batches that `skip` names already.

    Steps count from 1.
    """
    batch = int(batch_numbers(np.array([step - 1]), sorted(set(skip)))[0]) + 1
    return f"--train.skip_steps={','.join(str(each) for each in (*skip, batch))}"
