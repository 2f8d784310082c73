"""Objects by URI: local paths, memory://, s3:// (AWS, Cloudflare R2, any endpoint), gs://, az:// and hf:// (read only).

One small set of functions over the stores of core/stores. Objects are whole and immutable to a reader: a write is
visible only when it is complete. Transient faults are retried with exponential backoff and jitter; anything else fails
at once with the URI and the remedy. Credentials come from the environment (core/stores/credentials.py) and never appear
in a message.

    storage.write_bytes("s3://bucket/a.json", b"{}")
    storage.read_range("s3://bucket/shard.bin", 0, 1024)
    [o.uri for o in storage.list_objects("s3://bucket/run/checkpoints")]
"""

import contextlib
import hashlib
import io
import logging
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from core import files, patterns
from core.errors import LauncherError, ObjectDamaged, ObjectNotFound, StorageError
from core.stores import faults, local
from core.stores.base import Buffer, Found, Store, Terms
from core.stores.opener import open_store
from core.stores.waiting import interruptible

log = logging.getLogger(__name__)
T = TypeVar("T")

# One connection to S3 carries 80 to 100 MB/s.
READ_PART_BYTES = 16 << 20
READ_PARTS_AT_ONCE = 8
# Fewer where parts wait in memory to be written in order: several shards are fetched at a time.
PARTS_AHEAD = 4
FILE_BUFFER_BYTES = 1 << 20

# About 45 s of patience in all: longer than S3's SlowDown episodes, shorter than a preemption notice.
ATTEMPTS = 7
BACKOFF_SECONDS = 0.25
BACKOFF_CAP_SECONDS = 15.0


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its URI, its size in bytes and, where the store tells, its modification time (unix s)."""

    uri: str
    size: int
    modified: float | None = None

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]


def is_local(uri: str) -> bool:
    return open_store(uri)[0].is_local


local_path = local.path_of
is_pattern = patterns.is_pattern


def terms_of(uri: str) -> Terms:
    """Which service and server hold a URI."""
    return open_store(uri)[0].terms


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI, with single slashes between them."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises ObjectNotFound, StorageError."""
    return b"".join(_chunks(uri))


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of an object; exactly end - start of them, or StorageError."""
    _check_range(start, end)
    return _on(uri, "read", lambda store, key: b"".join(_get(store, key, start, end))) if end > start else b""


def read_ranges(uri: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
    """The bytes of each range, none of them empty; those that are close to each other come by one request."""
    for start, end in ranges:
        _check_range(start, end)

    def read(store: Store, key: str) -> list[Buffer]:
        found = list(store.get_ranges(key, ranges))
        for (start, end), data in zip(ranges, found, strict=True):
            _check_length(len(data), end - start)
        return found

    return _on(uri, "read", read) if ranges else []


def read_into(uri: str, buffer: memoryview) -> Iterator[memoryview]:
    """Fill `buffer` with the first bytes of an object, by ranges side by side; yields it part by part, in order."""

    def fill(start: int, end: int) -> memoryview:
        def read(store: Store, key: str) -> memoryview:
            at = start
            for piece in _get(store, key, start, end):
                buffer[at : at + len(piece)] = piece
                at += len(piece)
            return buffer[start:end]

        return _on(uri, "read", read)

    return side_by_side(fill, _parts(len(buffer)))


def side_by_side(
    fetch: Callable[[int, int], T], ranges: Iterable[tuple[int, int]], at_once: int = READ_PARTS_AT_ONCE
) -> Iterator[T]:
    """`fetch(start, end)` of each range in order, so many of them at once ahead of the reader."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(at_once, thread_name_prefix="part reader") as pool:
        try:
            for each in ranges:
                waiting.append(pool.submit(fetch, *each))
                if len(waiting) >= at_once:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def download(
    uri: str, path: str | os.PathLike, expected_sha256: str | None = None, *, survives_crash: bool = True
) -> int:
    """Copy an object into a local file, which appears only when complete. Returns its bytes.

    Without `survives_crash` the file is not flushed to the disk, so that after a power cut its name may stand for
    less than its content. Raises ObjectDamaged when `expected_sha256` is given and the content differs.
    """
    digest = hashlib.sha256()
    size = 0
    try:
        with files.replacing(Path(path), flush=survives_crash) as target:
            for chunk in _chunks(uri):
                target.write(chunk)
                size += len(chunk)
                if expected_sha256:
                    digest.update(chunk)
            if expected_sha256 and digest.hexdigest() != expected_sha256:
                raise ObjectDamaged(
                    f"{uri}: checksum is {digest.hexdigest()[:12]}…, expected {expected_sha256[:12]}…; "
                    "the object is damaged: write it again from its source"
                )
    except OSError as error:  # of the local file; the store's own errors are translated by now
        raise faults.translated("download", uri, error, faults.marks_of(error), local.TERMS) from error
    return size


def write_bytes(uri: str, data: bytes | bytearray | memoryview, *, exclusive: bool = False) -> None:
    """Store an object whole: readers see the old one or the new one, never a part.

    With `exclusive`, raises ObjectExists if there is one already; of several racing writers exactly one wins.
    """
    view = memoryview(data).cast("B")
    attempt = 0

    def write(store: Store, key: str) -> None:
        # An exclusive write whose answer was lost has happened: the retry then meets its own object.
        nonlocal attempt
        attempt += 1
        try:
            store.put(key, view, exclusive)
        except Exception as error:
            if exclusive and attempt > 1 and faults.is_conflict(faults.marks_of(error)) and read_bytes(uri) == view:
                return
            raise

    _on(uri, "write", write)


def write_file(uri: str, path: str | os.PathLike) -> int:
    """Store a local file as an object, whole or not at all. Returns its bytes."""
    _on(uri, "write", lambda store, key: store.put_file(key, str(path)))
    return Path(path).stat().st_size


def open_read(uri: str) -> BinaryIO:
    """A seekable binary file over an object, for readers that want one (parquet)."""
    if is_local(uri):
        return _on(uri, "open", lambda store, key: local_path(key).open("rb"))
    return io.BufferedReader(_RangeFile(uri, size_of(uri)), FILE_BUFFER_BYTES)


def size_of(uri: str) -> int:
    """Size in bytes. Raises ObjectNotFound, for a folder too."""
    return _on(uri, "stat", lambda store, key: store.size(key))


def exists(uri: str) -> bool:
    """Whether there is an object at this URI (a folder is none)."""
    try:
        size_of(uri)
    except ObjectNotFound:
        return False
    return True


def list_objects(prefix: str) -> list[ObjectInfo]:
    """All objects below a folder, at any depth, sorted by URI. An absent folder lists as empty.

    A missing bucket is not an absent folder: it raises StorageError, and so does a local link to nothing in its place.
    Local links are followed, each folder once (`core.files.below`).
    """
    return _listed(prefix, lambda store, key: store.objects(key))


def list_names(prefix: str) -> list[str]:
    """Names one level below a folder: objects and sub-folders, sorted. An absent folder lists as empty."""
    return sorted(_on(prefix, "list", lambda store, key: list(store.names(key))))


def expand(pattern: str) -> list[str]:
    """URIs that match a glob pattern (`*`, `?`, `[...]`, `**`), sorted; a pattern without them is itself."""
    return [info.uri for info in expand_objects(pattern)] if is_pattern(pattern) else [pattern]


def expand_objects(pattern: str) -> list[ObjectInfo]:
    """As `expand`, with sizes, by as few requests as the store allows. Raises ObjectNotFound without wildcards."""
    if not is_pattern(pattern):
        return [ObjectInfo(pattern, size_of(pattern), None)]
    return _listed(pattern, lambda store, key: store.matching(key))


def pinned(uri: str) -> str:
    """A URI of the Hub at the commit that its branch or tag stands for now; any other URI as it is."""
    return uri.removesuffix(open_store(uri)[1]) + _on(uri, "read", lambda store, key: store.pinned(key))


def link_to_nothing(uri: str) -> str | None:
    """Where a local link points to if nothing is there; None for any other object, and for one that is not there."""
    if not is_local(uri):
        return None
    path = local_path(uri)
    return os.readlink(path) if files.link_to_nothing(path) == path else None


def delete(uri: str) -> None:
    """Remove one object; it may be gone already."""
    with contextlib.suppress(ObjectNotFound):
        _on(uri, "delete", lambda store, key: store.delete(key))


# --- parts -----------------------------------------------------------------------------------------------------


def _chunks(uri: str) -> Iterator[Buffer]:
    """The content of an object in order. A large one comes in parts side by side, each with retries of its own."""

    def begin(store: Store, key: str) -> list[Buffer] | int:
        size, pieces = store.get(key)
        return size if size > READ_PART_BYTES else list(pieces)

    def part(start: int, end: int) -> list[Buffer]:
        return _on(uri, "read", lambda store, key: list(_get(store, key, start, end)))

    found = _on(uri, "read", begin)
    if isinstance(found, int):
        for pieces in side_by_side(part, _parts(found), PARTS_AHEAD):
            yield from pieces
    else:
        yield from found


def _parts(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(size, start + READ_PART_BYTES)) for start in range(0, size, READ_PART_BYTES))


def _get(store: Store, key: str, start: int, end: int) -> Iterator[Buffer]:
    """Exactly the bytes [start, end)."""
    count, pieces = store.get(key, start, end)
    _check_length(count, end - start)
    got = 0
    for piece in pieces:
        got += len(piece)
        _check_length(min(got, count), got)
        yield piece
    _check_length(got, count)


def _check_range(start: int, end: int) -> None:
    if not 0 <= start <= end:
        raise ValueError(f"bad byte range [{start}, {end})")


def _check_length(got: int, wanted: int) -> None:
    if got != wanted:
        raise faults.ShortRead(f"got {got} of {wanted} bytes")


def _listed(place: str, find: Callable[[Store, str], Iterable[Found]]) -> list[ObjectInfo]:
    key = open_store(place)[1]
    # Empty for stores whose keys are whole URIs.
    before = place.removesuffix(key) if key else f"{place.rstrip('/')}/"
    found = _on(place, "list", lambda store, key: list(find(store, key)))
    return sorted(
        (ObjectInfo(before + each.key, each.size, each.modified) for each in found), key=lambda info: info.uri
    )


class _RangeFile(io.RawIOBase):
    """An object as a file, by ranges."""

    def __init__(self, uri: str, size: int):
        self._uri = uri
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        data = read_range(self._uri, self._at, max(self._at, min(self._size, self._at + len(buffer))))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


# --- retries ---------------------------------------------------------------------------------------------------


def _on(uri: str, verb: str, call: Callable[[Store, str], T]) -> T:
    """`call` with the store behind a URI and the object's key."""
    store, key = open_store(uri)
    if store.is_local:
        return _retrying(verb, uri, lambda: call(store, key), store)
    return _retrying(verb, uri, lambda: interruptible(lambda: call(store, key)), store)


def _retrying(verb: str, uri: str, call: Callable[[], T], store: Store | None = None) -> T:
    store = store or open_store(uri)[0]
    renewed = False
    attempt = 1
    while True:
        try:
            return call()
        except LauncherError:
            raise
        except Exception as error:
            marks = faults.marks_of(error)
            if not renewed and store.renew(error):
                renewed = True
                continue
            if isinstance(error, faults.GaveUp) or (faults.is_transient(marks) and attempt == ATTEMPTS):
                raise StorageError(
                    f"{uri}: could not {verb} after {ATTEMPTS} attempts ({faults.brief(error.__cause__ or error)}); "
                    f"check the network and {store.terms.endpoint}, then run the same command again"
                ) from error
            if not faults.is_transient(marks):
                raise faults.translated(verb, uri, error, marks, store.terms) from error
            _pause(verb, uri, attempt, error, marks)
            attempt += 1


def _pause(verb: str, uri: str, attempt: int, error: Exception, marks: frozenset[str]) -> None:
    pause = min(BACKOFF_CAP_SECONDS, BACKOFF_SECONDS * 2 ** (attempt - 1))
    pause = max(pause, faults.wait_seconds(error, marks)) * random.uniform(0.7, 1.3)
    words = (uri, verb, faults.brief(error), attempt, ATTEMPTS, pause)
    log.warning("%s: %s failed (%s), attempt %d of %d, again in %.1f s", *words)
    time.sleep(pause)
