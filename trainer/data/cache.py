"""Reads windows of tokens from shards in object storage, through a bounded cache on the node's disk.

A window whose shard is not on disk is read by its byte range of about 2 kB, and one request reads several windows that
are close to each other. So the first batch needs no whole shard. After the first batch, one rank per node downloads
whole shards in the order in which they are needed. It checks their SHA-256 and moves them into place, and all ranks of
the node map the same files. If the folder would outgrow its bound, shards are removed, first the shard that is needed
latest. A rank that does not find a shard on disk reads byte ranges again. So the cache affects the speed and never the
content.

Each boot of the machine has a separate folder. Shards are not flushed to the disk, because the page cache holds all
written data until the machine stops. A power failure may truncate the files of an earlier boot, so these files are
removed without being read.
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

from core import storage, untrusted
from core.data.manifest import Manifest, ShardEntry
from core.data.shard import HEADER_BYTES, check_size, parse_header
from core.errors import DataError, LauncherError, ObjectDamaged, ObjectNotFound, StorageError
from core.stores.base import Buffer

log = logging.getLogger(__name__)

RANGE_READERS = 32
# A shard is read in parts of this many bytes. One call reads all windows of a part, and joins close windows into one
# request. In larger parts, two requests on separate connections could be faster than one joined request.
PART_BYTES = 8 << 20
READ_AHEAD_SHARDS = 64
FETCHERS = 4
# Seconds that a reader waits for a shard that is being downloaded. Thousands of range reads would take longer.
PATIENCE_SECONDS = 10.0
IMPATIENT_SECONDS = 60.0
POLL_SECONDS = 0.5  # time between two searches for a missing shard; a search calls stat once per shard
STALL_RETRY_SECONDS = 5.0
CLOSE_SECONDS = 5.0
STALL_SECONDS = 480.0  # shorter than the time-out of collectives, whose error would not name the storage

try:
    BOOT = "-" + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
except OSError:  # on other systems than Linux, all boots share one folder, and every shard is flushed to the disk
    BOOT = ""

Window = tuple[int, int, int]  # the shard, the first token in the shard, and the row of the batch


class ShardCache:
    """Reads the tokens of one split. Raises DataError for damaged data, StorageError if the store does not answer."""

    def __init__(self, data_url: str, manifest: Manifest, split: str, folder: Path, limit_bytes: float):
        self.data_url = data_url
        self.shards: tuple[ShardEntry, ...] = manifest.split(split, data_url).shards
        for shard in self.shards:
            untrusted.check_name(shard.name, data_url)
        self.folder = folder / f"{manifest.fingerprint[:16]}{BOOT}"
        self.limit_bytes = limit_bytes
        self.fits = sum(shard.bytes for shard in self.shards) <= limit_bytes
        self.vocab_size = manifest.tokenizer.vocab_size
        self.dtype = np.dtype(f"<u{manifest.bits // 8}")
        self.starts = np.concatenate([[0], np.cumsum([shard.tokens for shard in self.shards])])
        self._mapped: dict[int, np.ndarray] = {}
        self._closed = False
        self.patient = False  # whether readers wait for downloads; true after the first batch
        self._not_before = 0.0
        self._readers = ThreadPoolExecutor(RANGE_READERS, thread_name_prefix="range reader")

    def read(self, shards: Sequence[int], begins: Sequence[int], count: int) -> np.ndarray:
        """Rows of `count` tokens, int32 (len(shards), count).

        Row i starts at token `begins[i]` of shard `shards[i]`, and may extend into the next shards. Each row is copied
        as one slice, and the copy converts it to int32. For rows of 2 kB this is faster than numpy's indexing with
        arrays.
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
        """Fill rows of `out` from storage, with one call per part of a shard. The call joins windows that are close."""
        parts: dict[tuple[int, int], list[Window]] = defaultdict(list)
        for window in windows:
            shard, begin, _ = window
            parts[shard, begin * self.dtype.itemsize // PART_BYTES].append(window)

        def read(part: list[Window]) -> None:
            count = out.shape[1]
            inside = [window for window in part if window[1] + count <= self.shards[window[0]].tokens]
            for (_, _, row), tokens in zip(inside, self._read_inside(inside, count), strict=True):
                out[row] = tokens
            for shard, begin, row in set(part) - set(inside):
                out[row] = self._read(shard, begin, count)

        for _ in self._readers.map(read, parts.values()):
            pass

    def _read_inside(self, windows: list[Window], count: int) -> list[np.ndarray]:
        """`count` tokens of each window. All windows are of one shard, and none extends into the next."""
        if not windows:
            return []
        starts = [HEADER_BYTES + begin * self.dtype.itemsize for _, begin, _ in windows]
        ranges = [(start, start + count * self.dtype.itemsize) for start in starts]
        return self._read_tokens(windows[0][0], ranges)

    def stream(self, begin: int, count: int) -> np.ndarray:
        """`count` consecutive tokens of the split, starting at token `begin`."""
        shard = int(np.searchsorted(self.starts, begin, side="right")) - 1
        return self._read(shard, begin - int(self.starts[shard]), count)

    def path(self, shard: int) -> Path:
        return self.folder / self.shards[shard].name

    def is_here(self, shard: int) -> bool:
        """Whether the shard is on disk."""
        return os.path.exists(f"{self.folder}/{self.shards[shard].name}")  # a check with Path takes four times as long

    def close(self) -> None:
        self._closed = True
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _wait_for(self, shard: int) -> np.ndarray | None:
        """Wait until the shard is on disk, and return its tokens.

        If it does not arrive within PATIENCE_SECONDS, return None. Calls in the IMPATIENT_SECONDS after that do not
        wait.
        """
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
        """The tokens of the shard as a memory map, or None if the file is not on disk."""
        path = self.path(shard)
        try:
            # Use a plain array over the map: slicing an np.memmap takes three times as long.
            tokens = np.asarray(np.memmap(path, self.dtype, "r", HEADER_BYTES, (self.shards[shard].tokens,)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DataError(f"{path}: cached shard is shorter than its manifest says; remove the file") from error
        if len(self._mapped) >= READ_AHEAD_SHARDS:  # the number of open files is limited
            self._mapped.pop(next(iter(self._mapped)))
        self._mapped[shard] = tokens
        return tokens

    def _read(self, shard: int, begin: int, wanted: int) -> np.ndarray:
        """`wanted` tokens that start at token `begin` of the shard. They may extend into the next shards."""
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
        """The tokens in byte ranges of a shard's object. Raises DataError for an id outside the vocabulary."""
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
        """Read the ranges. If the storage does not answer, retry for at most STALL_SECONDS while other ranks wait."""
        deadline = time.monotonic() + STALL_SECONDS
        while True:
            try:
                return storage.read_ranges(uri, ranges)
            except ObjectNotFound as error:
                raise DataError(f"{error}; the data set has changed since the run began") from error
            except StorageError as error:
                if time.monotonic() > deadline or self._closed:
                    raise
                log.warning("the storage does not answer, trying again: %s", error)
                time.sleep(STALL_RETRY_SECONDS)


class ReadAhead:
    """Downloads the shards that are needed next. Each node has one instance.

    `upcoming(count)` returns the numbers of these shards, the soonest first. Training mixes the windows of a group of
    shards and needs the whole group, so several shards are downloaded in parallel. The downloads begin when `start` is
    called, so that they do not compete with the first batch.
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
                self._stop.wait(POLL_SECONDS)
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
                # Batches still arrive by range reads; downloads only make them faster.
                log.warning("read-ahead pauses for %.0f s: %s", STALL_RETRY_SECONDS, error)
                self._stop.wait(STALL_RETRY_SECONDS)
            finally:
                with self._lock:
                    self._in_flight.discard(shard)

    def _claim(self) -> int | None:
        """Choose the missing shard that is needed soonest and fits into the folder, and make room for it."""
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
        uri = storage.join(self.cache.data_url, entry.name)
        path = untrusted.inside(self.cache.folder, entry.name, self.cache.data_url)
        started = time.monotonic()

        def check(head: bytes, size: int) -> None:
            header = parse_header(head, uri)
            check_size(header, size, uri)
            if header.tokens != entry.tokens:
                raise DataError(
                    f"{uri}: header says {header.tokens} tokens, the manifest {entry.tokens}; "
                    "delete the set and prepare it again"
                )

        def fetch() -> int:
            return storage.download(uri, path, entry.sha256, survives_crash=not BOOT, most=entry.bytes, check=check)

        try:
            size = fetch()
        except ObjectDamaged as error:
            log.warning("%s; fetching it once more", error)
            size = fetch()
        log.info("fetched %s (%.0f MB in %.1f s)", entry.name, size / 1e6, time.monotonic() - started)

    def _remove_earlier_boots(self) -> None:
        self._begin.wait()
        folder = self.cache.folder
        for other in folder.parent.glob(f"{folder.name.removesuffix(BOOT)}*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def _make_room(self, soon: Mapping[Path, int]) -> None:
        """Remove cached shards until the shards in flight fit, first the shard that is needed latest."""
        if self.cache.fits:
            return
        here = {path: path.stat().st_size for path in self.cache.folder.rglob("*.bin")}
        total = sum(here.values()) + sum(self.cache.shards[shard].bytes for shard in self._in_flight)
        for path in sorted(here, key=lambda path: -soon.get(path, READ_AHEAD_SHARDS)):
            if total <= self.cache.limit_bytes:
                return
            total -= here[path]
            path.unlink(missing_ok=True)
