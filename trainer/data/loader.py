"""Batches by (step, micro-batch, rank): the same global batches for any number of ranks.

Sample numbers of step s (from 0) are [s B, (s + 1) B) for a batch of B sequences; micro-batches are consecutive
samples, and rank r of W has the r-th consecutive W-th of a step's micro-batches. A background thread prepares
`prefetch` micro-batches ahead.
"""

import queue
import threading
import time
from pathlib import Path

import numpy as np
import torch

from core.manifest import Manifest
from trainer.data.cache import ReadAhead, ShardCache
from trainer.data.order import WindowOrder


class TokenSource:
    """Samples of one split by number: the order and the cache together."""

    def __init__(
        self,
        data_url: str,
        manifest: Manifest,
        split: str,
        folder: Path,
        limit_bytes: float,
        length: int,
        seed: int,
        shuffle_shards: int,
    ):
        self.cache = ShardCache(data_url, manifest, split, folder, limit_bytes, length)
        tokens = [shard.tokens for shard in self.cache.shards]
        self.order = WindowOrder(tokens, length, seed, shuffle_shards, f"{data_url} ({split})")

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of samples: (len(numbers), T + 1)."""
        where = self.order.locate(numbers)
        out = np.empty((len(numbers), self.cache.length + 1), self.cache.dtype)
        for shard in np.unique(where.shard):
            rows = where.shard == shard
            out[rows] = self.cache.windows(int(shard), where.window[rows])
        return out

    def close(self) -> None:
        self.cache.close()


class Batches:
    """Iterates over this rank's micro-batches from step `first_step` (from 0) on, endlessly.

    Each item is a (micro_batch, T + 1) int32 tensor on `device`; inputs are [:, :-1], targets [:, 1:].
    """

    def __init__(
        self,
        source: TokenSource,
        first_step: int,
        batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        prefetch: int,
        device: torch.device,
        fetches: bool,
    ):
        self._source = source
        self._batch = batch
        self._micro_batch = micro_batch
        self._per_rank = batch // world
        self._offset = rank * self._per_rank
        self._device = device
        self._position = first_step * batch
        self._queue: queue.Queue[torch.Tensor | Exception] = queue.Queue(prefetch)
        self._stop = threading.Event()
        self.wait_seconds = 0.0
        self._read_ahead = ReadAhead(source.cache, self._upcoming) if fetches else None
        self._thread = threading.Thread(target=self._produce, args=(first_step,), name="batches", daemon=True)
        self._thread.start()

    def __next__(self) -> torch.Tensor:
        if self._read_ahead and self._read_ahead.failure:
            raise self._read_ahead.failure
        started = time.monotonic()
        item = self._queue.get()
        self.wait_seconds += time.monotonic() - started
        if isinstance(item, Exception):
            raise item
        return item.to(self._device, non_blocking=True)

    def close(self) -> None:
        self._stop.set()
        if self._read_ahead:
            self._read_ahead.close()
        while self._thread.is_alive():  # it may wait for room
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)
        self._source.close()

    def _upcoming(self, count: int) -> list[int]:
        return self._source.order.shards_from(self._position, count)

    def _produce(self, step: int) -> None:
        try:
            while not self._stop.is_set():
                first = step * self._batch + self._offset
                self._position = step * self._batch
                if self._read_ahead:
                    self._read_ahead.wake()
                for begin in range(first, first + self._per_rank, self._micro_batch):
                    tokens = self._source.samples(np.arange(begin, begin + self._micro_batch))
                    tensor = torch.from_numpy(tokens.astype(np.int32))
                    self._put(tensor.pin_memory() if self._device.type == "cuda" else tensor)
                step += 1
        except Exception as error:  # it belongs to the consumer, who would wait for ever
            self._put(error)

    def _put(self, item: torch.Tensor | Exception) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
