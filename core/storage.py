"""Reads, writes and lists objects by URI: local paths, memory://, s3://, gs://, az:// and hf:// (read only).

These functions call the stores of core/stores. s3:// covers AWS, Cloudflare R2 and any other server with S3's protocol.
A reader sees a written object completely or not at all. Transient faults are retried with exponential backoff and
jitter (core/stores/retries.py). Any other error is raised immediately, with the URI and the remedy. Credentials come
from the environment (core/stores/credentials.py) and never appear in a message.

    storage.write_bytes("s3://bucket/a.json", b"{}")
    storage.read_range("s3://bucket/shard.bin", 0, 1024)
    [o.uri for o in storage.list_objects("s3://bucket/run/checkpoints")]
"""

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from core import files
from core.errors import ObjectDamaged, ObjectExists, ObjectNotFound, StorageError
from core.stores import base, faults, local, meter, retries
from core.stores.base import Buffer, Found, Store, Terms
from core.stores.opener import open_store

T = TypeVar("T")

# One connection to S3 carries 80 to 100 MB/s, so a large object is read in parts over several connections.
READ_PART_BYTES = 16 << 20
READ_PARTS_AT_ONCE = 8
# Number of parts that `chunks` fetches ahead of its reader. It is small, because these parts wait in memory and callers
# read several objects in parallel.
PARTS_AHEAD = 4
HEAD_BYTES = 1024


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: URI, size in bytes, and modification time (unix s) if the store knows it."""

    uri: str
    size: int
    modified: float | None = None

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]


def is_local(uri: str) -> bool:
    return open_store(uri)[0].is_local


local_path = local.path_of


def lasting(uri: str) -> str:
    """`uri` in a form that can be stored: a local path becomes absolute, so that it is valid from any folder."""
    return os.path.abspath(local_path(uri)) if uri and is_local(uri) else uri


is_pattern = base.is_pattern


def terms_of(uri: str) -> Terms:
    """The words that messages and reports use for the store that holds a URI."""
    return open_store(uri)[0].terms


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI, with single slashes between them."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str, most: int | None = None) -> bytes:
    """The whole object. Raises ObjectNotFound, StorageError, and ObjectDamaged if it has more than `most` bytes."""
    return b"".join(chunks(uri, most))


def chunks(uri: str, most: int | None = None) -> Iterator[Buffer]:
    """The content of an object, in order and in pieces. Raises the errors of `read_bytes`.

    If the object has more than `most` bytes, no piece is yielded. Parts of a large object are fetched in parallel, and
    each part is retried separately.
    """

    def begin(store: Store, key: str) -> list[Buffer] | int:
        size, pieces = store.get(key)
        meter.count(store, reads=1)
        if most is not None and size > most:
            raise ObjectDamaged(f"{uri}: has {size:,} bytes, must have at most {most:,}; store it again")
        if size > READ_PART_BYTES:
            return size
        meter.count(store, read_bytes=size)
        return list(pieces)

    def part(start: int, end: int) -> list[Buffer]:
        return retries.call(uri, "read", lambda store, key: list(_get(store, key, start, end)))

    found = retries.call(uri, "read", begin)
    if isinstance(found, int):
        for pieces in side_by_side(part, _parts(found), PARTS_AHEAD):
            yield from pieces
    else:
        yield from found


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of an object. Raises StorageError if the object has fewer than `end` bytes."""
    _check_range(start, end)
    return retries.call(uri, "read", lambda store, key: b"".join(_get(store, key, start, end))) if end > start else b""


def read_ranges(uri: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
    """The bytes of each range [start, end). No range may be empty. Neighbouring ranges may share a request."""
    for start, end in ranges:
        _check_range(start, end)

    def read(store: Store, key: str) -> list[Buffer]:
        found = list(store.get_ranges(key, ranges))
        meter.count(store, reads=1, read_bytes=sum(map(len, found)))
        for (start, end), data in zip(ranges, found, strict=True):
            _check_length(len(data), end - start)
        return found

    return retries.call(uri, "read", read) if ranges else []


def read_into(uri: str, buffer: memoryview) -> Iterator[memoryview]:
    """Fill `buffer` with the first bytes of an object by parallel requests. Yields the filled parts in order."""

    def fill(start: int, end: int) -> memoryview:
        def read(store: Store, key: str) -> memoryview:
            _check_length(store.fill(key, start, buffer[start:end]), end - start)
            meter.count(store, reads=1, read_bytes=end - start)
            return buffer[start:end]

        return retries.call(uri, "read", read)

    return side_by_side(fill, _parts(len(buffer)))


def side_by_side(
    fetch: Callable[[int, int], T], ranges: Iterable[tuple[int, int]], at_once: int = READ_PARTS_AT_ONCE
) -> Iterator[T]:
    """Yield `fetch(start, end)` of each range in order. Up to `at_once` calls run in parallel, ahead of the reader."""
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
    uri: str,
    path: str | os.PathLike,
    expected_sha256: str | None = None,
    *,
    survives_crash: bool = True,
    most: int | None = None,
    check: Callable[[bytes, int], None] | None = None,
) -> int:
    """Copy an object into a local file, which appears when it is complete. Returns its size in bytes.

    If `survives_crash` is false, the file is not flushed to disk, and may be incomplete after a power failure. `check`
    gets the first HEAD_BYTES and the size before the file appears. If it raises an error, the file does not appear.
    Raises ObjectDamaged if the content has more than `most` bytes, or if its SHA-256 is not `expected_sha256`.
    """
    digest = hashlib.sha256()
    head = b""
    size = 0
    try:
        with files.replacing(Path(path), flush=survives_crash) as target:
            for chunk in chunks(uri, most):
                target.write(chunk)
                size += len(chunk)
                if len(head) < HEAD_BYTES:
                    head += bytes(chunk[: HEAD_BYTES - len(head)])
                if expected_sha256:
                    digest.update(chunk)
            if expected_sha256 and digest.hexdigest() != expected_sha256:
                raise ObjectDamaged(
                    f"{uri}: checksum is {digest.hexdigest()[:12]}…, expected {expected_sha256[:12]}…; "
                    "the object is damaged: write it again from its source"
                )
            if check:
                check(head, size)
    # This is an error of the local file; for an error of the store, `chunks` raises StorageError.
    except OSError as error:
        raise faults.translated("download", uri, error, faults.marks_of(error), local.TERMS) from error
    return size


def write_bytes(uri: str, data: bytes | bytearray | memoryview, *, exclusive: bool = False) -> None:
    """Store an object atomically: readers see the old content or the new content.

    If `exclusive` is true and the object exists, raises ObjectExists. If several writers race, exactly one of them
    succeeds.
    """
    view = memoryview(data).cast("B")
    attempt = 0

    def write(store: Store, key: str) -> None:
        # If the answer to an exclusive write is lost, the retry finds the object that the first attempt wrote.
        nonlocal attempt
        attempt += 1
        try:
            store.put(key, view, exclusive)
            meter.count(store, writes=1, written_bytes=len(view))
        except Exception as error:
            if exclusive and attempt > 1 and faults.is_conflict(faults.marks_of(error)) and read_bytes(uri) == view:
                return
            raise

    retries.call(uri, "write", write)


def claim(uri: str, data: bytes) -> None:
    """Create an object that only one machine may create, such as the description of a run.

    Raises ObjectExists if the object exists. Raises StorageError if the store ignores the condition of an exclusive
    write, because a second machine could then create the object too. Even there, an existing object is not overwritten.
    """
    if not is_local(uri) and exists(uri):
        raise ObjectExists(f"{uri}: exists already; nothing was overwritten")
    write_bytes(uri, data, exclusive=True)
    if is_local(uri) or refuses_second_write(uri):
        return
    delete(uri)
    raise StorageError(
        f"{uri}: {terms_of(uri).endpoint} ignores conditional writes (If-None-Match), which keep two machines from "
        "creating the same object; nothing was stored: use a newer release of that server, or another store"
    )


def refuses_second_write(uri: str) -> bool:
    """Whether the store refuses to create the existing object `uri` again. If not, the object is empty now."""
    try:
        write_bytes(uri, b"", exclusive=True)
    except ObjectExists:
        return True
    return False


def write_file(uri: str, path: str | os.PathLike) -> int:
    """Store a local file as an object, atomically. Returns its size in bytes."""

    def write(store: Store, key: str) -> None:
        store.put_file(key, str(path))
        meter.count(store, writes=1, written_bytes=Path(path).stat().st_size)

    retries.call(uri, "write", write)
    return Path(path).stat().st_size


def size_of(uri: str) -> int:
    """The size of an object in bytes. Raises ObjectNotFound if there is no object, or if the URI is a folder."""
    return retries.call(uri, "stat", lambda store, key: store.size(key))


def exists(uri: str) -> bool:
    """Whether an object has this URI. A folder is not an object."""
    try:
        size_of(uri)
    except ObjectNotFound:
        return False
    return True


def list_objects(prefix: str) -> list[ObjectInfo]:
    """All objects below a folder at any depth, sorted by URI. The list is empty if the folder does not exist.

    Raises StorageError if the bucket is missing, or if the folder is a dangling local link. Local links are followed,
    but no folder is read twice (`core.files.below`).
    """
    return _listed(prefix, lambda store, key: store.objects(key))


def list_names(prefix: str) -> list[str]:
    """Sorted names of objects and folders one level below a folder. The list is empty if the folder does not exist."""
    return sorted(retries.call(prefix, "list", lambda store, key: list(store.names(key))))


def expand(pattern: str) -> list[str]:
    """Sorted URIs that match a pattern with `*`, `?`, `[...]` or `**`. Any other URI is returned without a request."""
    return [info.uri for info in expand_objects(pattern)] if is_pattern(pattern) else [pattern]


def expand_objects(pattern: str) -> list[ObjectInfo]:
    """Like `expand`, with sizes. Raises ObjectNotFound if a URI without wildcards does not exist."""
    if not is_pattern(pattern):
        return [ObjectInfo(pattern, size_of(pattern), None)]
    return _listed(pattern, lambda store, key: store.matching(key))


def fixed_part(pattern: str) -> str:
    """The folder before the first wildcard of a pattern. For a URI without wildcards: the folder that contains it."""
    parts = pattern.split("/")
    if is_local(pattern):
        return "/".join(parts[: min(len(parts) - 1, base.literal_parts(parts, lambda names: _is_there(names)))])
    return "/".join(parts[: min(len(parts) - 1, base.literal_parts(parts, lambda names: False))])


def _is_there(names: Sequence[str]) -> bool:
    return os.path.lexists(local_path("/".join(names)))


def pinned(uri: str) -> str:
    """A URI of the Hugging Face Hub, with its branch or tag replaced by the current commit.

    Any other URI is unchanged.
    """
    return uri.removesuffix(open_store(uri)[1]) + retries.call(uri, "read", lambda store, key: store.pinned(key))


def link_to_nothing(uri: str) -> str | None:
    """The target of a dangling local link, or None for everything else, including a missing object."""
    if not is_local(uri):
        return None
    path = local_path(uri)
    return os.readlink(path) if files.link_to_nothing(path) == path else None


def delete(uri: str) -> None:
    """Delete one object, if it exists."""
    with contextlib.suppress(ObjectNotFound):
        retries.call(uri, "delete", lambda store, key: store.delete(key))


# --- parts -----------------------------------------------------------------------------------------------------


def _parts(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(size, start + READ_PART_BYTES)) for start in range(0, size, READ_PART_BYTES))


def _get(store: Store, key: str, start: int, end: int) -> Iterator[Buffer]:
    """Yields exactly the bytes [start, end) of an object. Raises ShortRead if the object has fewer."""
    count, pieces = store.get(key, start, end)
    _check_length(count, end - start)
    meter.count(store, reads=1, read_bytes=count)
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
    # `before` is empty for stores whose keys are whole URIs.
    before = place.removesuffix(key) if key else f"{place.rstrip('/')}/"

    def look(store: Store, key: str) -> list[Found]:
        meter.count(store, writes=1)  # a listing is counted as a write, because stores bill it as a write
        return list(find(store, key))

    found = retries.call(place, "list", look)
    return sorted(
        (ObjectInfo(before + each.key, each.size, each.modified) for each in found), key=lambda info: info.uri
    )
