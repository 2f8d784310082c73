"""Token windows out of shards in object storage, through a bounded cache on the node's disk.

A window whose shard is not on disk yet is read by its byte range (2 kB; one request for several that are close to each
other), so that the first batch needs no whole shard. Once that is out, one rank per node downloads whole shards
in the order they will be needed, checks their SHA-256 and moves them into place; all ranks of the node map the same
files. When the folder would outgrow its bound, the shards that are needed last go first. A rank that finds a shard
gone reads by range again: the cache decides the speed, never the content.

The folder is that of one boot of the machine. Within a boot the page cache is the truth, so that no shard waits for
the disk; what an earlier boot left may have been cut off by a power failure and is removed unread.
"""

import logging
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from core import storage
from core.data.manifest import Manifest, ShardEntry
from core.data.shard import HEADER_BYTES, check_size, parse_header
from core.errors import DataError, LauncherError, ObjectDamaged, ObjectNotFound, StorageError
from core.stores.base import Buffer

log = logging.getLogger(__name__)

RANGE_READERS = 32
# Windows within so many bytes of a shard are asked for at once. Where all are near each other they come by one request,
# which must not be so long that another connection would be faster.
STRETCH_BYTES = 8 << 20
READ_AHEAD_SHARDS = 64
FETCHERS = 4
# A shard that is on its way is worth waiting for: as thousands of range reads its windows would take longer.
PATIENCE_SECONDS = 10.0
IMPATIENT_SECONDS = 60.0
LOOK_SECONDS = 0.5  # how often the read-ahead looks where training is; looking costs a stat per shard
STALL_RETRY_SECONDS = 5.0
CLOSE_SECONDS = 5.0
STALL_SECONDS = 480.0  # below the collectives' time limit, so that the cause is named, not a time-out of the others

try:
    BOOT = "-" + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
except OSError:  # not Linux: one folder for all boots, and every shard is flushed to the disk
    BOOT = ""

Window = tuple[int, int, int]  # shard, first token within it, row of the batch


class ShardCache:
    """Reads tokens of one split."""

    def __init__(self, data_url: str, manifest: Manifest, split: str, folder: Path, limit_bytes: float):
        self.data_url = data_url
        self.shards: tuple[ShardEntry, ...] = manifest.split(split, data_url).shards
        self.folder = folder / f"{manifest.fingerprint[:16]}{BOOT}"
        self.limit_bytes = limit_bytes
        self.fits = sum(shard.bytes for shard in self.shards) <= limit_bytes
        self.vocab_size = manifest.tokenizer.vocab_size
        self.dtype = np.dtype(f"<u{manifest.bits // 8}")
        self.starts = np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards])])
        self._mapped: dict[int, np.ndarray] = {}
        self._closed = False
        self.patient = False  # set once the first batch is out
        self._not_before = 0.0
        self._readers = ThreadPoolExecutor(RANGE_READERS, thread_name_prefix="range reader")

    def read(self, shards: Sequence[int], begins: Sequence[int], count: int) -> np.ndarray:
        """`count` tokens from token `begins[i]` of shard `shards[i]` on, for each i: (len(shards), count), int32.

        They may run into the shards after it. Each row is one slice copy that widens on the way: at 2 kB a row that
        is faster than numpy's index arrays, and it keeps the order.
        """
        out = np.empty((len(shards), count), np.int32)
        mapped, by_range = self._mapped, []
        for row, (shard, begin) in enumerate(zip(shards, begins, strict=True)):
            tokens = mapped.get(shard)
            if tokens is None:
                tokens = self._wait_for(shard) if self.patient else self._map(shard)
            end = begin + count
            if tokens is None or end > len(tokens):
                by_range.append(row)
            else:
                out[row] = tokens[begin:end]
        if by_range:
            self._read_windows([(shards[row], begins[row], row) for row in by_range], out)
        return out

    def _read_windows(self, windows: list[Window], out: np.ndarray) -> None:
        """Fill rows of `out` from storage: the windows of a stretch of a shard by one call, which joins near ones."""
        stretches: dict[tuple[int, int], list[Window]] = defaultdict(list)
        for window in windows:
            shard, begin, _ = window
            stretches[shard, begin * self.dtype.itemsize // STRETCH_BYTES].append(window)

        def read(stretch: list[Window]) -> None:
            count = out.shape[1]
            inside = [window for window in stretch if window[1] + count <= self.shards[window[0]].tokens]
            for (_, _, row), tokens in zip(inside, self._read_inside(inside, count), strict=True):
                out[row] = tokens
            for shard, begin, row in set(stretch) - set(inside):
                out[row] = self._read(shard, begin, count)

        for _ in self._readers.map(read, stretches.values()):
            pass

    def _read_inside(self, windows: list[Window], count: int) -> list[np.ndarray]:
        """`count` tokens of each window; all are of one shard, and none runs into the next."""
        if not windows:
            return []
        starts = [HEADER_BYTES + begin * self.dtype.itemsize for _, begin, _ in windows]
        ranges = [(start, start + count * self.dtype.itemsize) for start in starts]
        return self._read_tokens(windows[0][0], ranges)

    def stream(self, begin: int, count: int) -> np.ndarray:
        """`count` consecutive tokens of the split from token `begin` on."""
        shard = int(np.searchsorted(self.starts, begin, side="right")) - 1
        return self._read(shard, begin - int(self.starts[shard]), count)

    def path(self, shard: int) -> Path:
        return self.folder / self.shards[shard].name

    def is_here(self, shard: int) -> bool:
        """Whether the shard is on disk."""
        return os.path.exists(f"{self.folder}/{self.shards[shard].name}")  # a Path takes four times as long

    def close(self) -> None:
        self._closed = True
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _wait_for(self, shard: int) -> np.ndarray | None:
        """The shard once it is on disk; None when it does not come, and then no shard is waited for for a while."""
        now = time.monotonic()
        if now < self._not_before:
            return self._map(shard)
        deadline = now + PATIENCE_SECONDS
        while (tokens := self._map(shard)) is None and not self._closed:
            if time.monotonic() > deadline:
                self._not_before = time.monotonic() + IMPATIENT_SECONDS
                return None
            time.sleep(0.005)
        return tokens

    def _map(self, shard: int) -> np.ndarray | None:
        """The shard's tokens as a memory map if the file is on disk, else None."""
        path = self.path(shard)
        try:
            # A plain array over the map: slices of np.memmap objects cost three times as much.
            tokens = np.asarray(np.memmap(path, self.dtype, "r", HEADER_BYTES, (self.shards[shard].tokens,)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(f"{path}: cached shard is shorter than its manifest says; remove the file") from error
        if len(self._mapped) >= READ_AHEAD_SHARDS:  # file handles are bounded too
            self._mapped.pop(next(iter(self._mapped)))
        self._mapped[shard] = tokens
        return tokens

    def _read(self, shard: int, begin: int, wanted: int) -> np.ndarray:
        """`wanted` tokens from token `begin` of the shard on, which may run into the shards after it."""
        parts = []
        while wanted:
            count = min(wanted, self.shards[shard].tokens - begin)
            parts.append(self._read_piece(shard, begin, count))
            wanted -= count
            shard, begin = shard + 1, 0
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _read_piece(self, shard: int, begin: int, count: int) -> np.ndarray:
        tokens = self._mapped.get(shard)
        if tokens is None:
            tokens = self._map(shard)
        if tokens is not None:
            return tokens[begin : begin + count]
        first = HEADER_BYTES + begin * self.dtype.itemsize
        [read] = self._read_tokens(shard, [(first, first + count * self.dtype.itemsize)])
        return read

    def _read_tokens(self, shard: int, ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        """The tokens in byte ranges of a shard's object. Raises DataError for one that the vocabulary does not have."""
        uri = storage.join(self.data_url, self.shards[shard].name)
        found = [np.frombuffer(data, self.dtype) for data in self._read_patiently(uri, ranges)]
        for (start, _), read in zip(ranges, found, strict=True):
            if read.max() >= self.vocab_size:
                raise DataError(
                    f"{uri}: token {read.max()} at or after position {(start - HEADER_BYTES) // self.dtype.itemsize}, "
                    f"the vocabulary has {self.vocab_size}; "
                    "the shard is damaged: run python -m data_prep.verify on data.url"
                )
        return found

    def _read_patiently(self, uri: str, ranges: list[tuple[int, int]]) -> Sequence[Buffer]:
        """Wait out a stall of the storage: the time counts as data wait, and other ranks wait too, to a limit."""
        deadline = time.monotonic() + STALL_SECONDS
        while True:
            try:
                return storage.read_ranges(uri, ranges)
            except ObjectNotFound as error:
                raise DataError(f"{error}; the data set has changed since the run began") from error
            except StorageError as error:
                if time.monotonic() > deadline or self._closed:
                    raise
                log.warning("the storage stalls, waiting: %s", error)
                time.sleep(STALL_RETRY_SECONDS)


class ReadAhead:
    """Downloads the shards that will be needed next; one per node. `upcoming` gives them, the soonest first.

    Several at a time: the windows of a group of shards are mixed, so that all of a group are needed at once. They
    begin at `start`, so that they do not compete with the first batch.
    """

    def __init__(self, cache: ShardCache, upcoming: Callable[[int], list[int]]):
        self.cache = cache
        self._upcoming = upcoming
        self.failure: LauncherError | None = None
        self._lock = threading.Lock()
        self._in_flight: set[int] = set()
        self._begin = threading.Event()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, name="read-ahead", daemon=True) for _ in range(FETCHERS)]
        self._threads.append(threading.Thread(target=self._remove_earlier_boots, name="clean-up", daemon=True))
        for thread in self._threads:
            thread.start()

    def start(self) -> None:
        self._begin.set()

    def close(self) -> None:
        self._stop.set()
        self._begin.set()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        self._begin.wait()
        while not self._stop.is_set() and self.failure is None:
            shard = self._claim()
            if shard is None:
                self._stop.wait(LOOK_SECONDS)
                continue
            try:
                self._fetch(shard)
            except ObjectDamaged as error:
                self.failure = DataError(f"{error}; fetched twice with the same result")
            except DataError as error:
                self.failure = error
            except ObjectNotFound as error:
                self.failure = DataError(f"{error}; the data set has changed since the run began")
            except StorageError as error:
                # Batches still come by range reads if they can; this is only the fast path.
                log.warning("read-ahead pauses for %.0f s: %s", STALL_RETRY_SECONDS, error)
                self._stop.wait(STALL_RETRY_SECONDS)
            finally:
                with self._lock:
                    self._in_flight.discard(shard)

    def _claim(self) -> int | None:
        """The shard to fetch now, with room made for it: the soonest needed one that is not here and still fits."""
        with self._lock:
            budget = self.cache.limit_bytes
            soon = self._upcoming(READ_AHEAD_SHARDS)
            for shard in soon:
                budget -= self.cache.shards[shard].bytes
                if budget < 0:
                    return None
                if shard not in self._in_flight and not self.cache.is_here(shard):
                    self._in_flight.add(shard)
                    self._make_room({self.cache.path(shard): rank for rank, shard in enumerate(soon)})
                    return shard
            return None

    def _fetch(self, shard: int) -> None:
        entry = self.cache.shards[shard]
        uri, path = storage.join(self.cache.data_url, entry.name), self.cache.path(shard)
        started = time.monotonic()
        try:
            size = storage.download(uri, path, entry.sha256, survives_crash=not BOOT)
        except ObjectDamaged as error:
            log.warning("%s; fetching it once more", error)
            size = storage.download(uri, path, entry.sha256, survives_crash=not BOOT)
        with path.open("rb") as file:
            header = parse_header(file.read(HEADER_BYTES), uri)
        check_size(header, size, uri)
        if header.tokens != entry.tokens:
            raise DataError(
                f"{uri}: header says {header.tokens} tokens, the manifest {entry.tokens}; prepare the data again"
            )
        log.info("fetched %s (%.0f MB in %.1f s)", entry.name, size / 1e6, time.monotonic() - started)

    def _remove_earlier_boots(self) -> None:
        self._begin.wait()
        folder = self.cache.folder
        for other in folder.parent.glob(f"{folder.name.removesuffix(BOOT)}*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def _make_room(self, soon: Mapping[Path, int]) -> None:
        """Remove what is needed last, or not at all soon, until everything in flight fits."""
        if self.cache.fits:
            return
        here = {path: path.stat().st_size for path in self.cache.folder.rglob("*.bin")}
        total = sum(here.values()) + sum(self.cache.shards[shard].bytes for shard in self._in_flight)
        for path in sorted(here, key=lambda path: -soon.get(path, READ_AHEAD_SHARDS)):
            if total <= self.cache.limit_bytes:
                return
            total -= here[path]
            path.unlink(missing_ok=True)
