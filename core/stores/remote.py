"""Reaches object stores through obstore: Google, Azure, memory, and every service with S3's protocol.

core/stores/retries.py retries requests, except for the parts of a large upload: obstore retries these, because only
obstore knows the parts.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import obstore
from obstore.store import MemoryStore

from core.errors import StorageError
from core.stores import faults
from core.stores.base import Buffer, Found, Terms, copy_into, matching

CONNECT_SECONDS = 10
# A request fails if no byte arrives for this many seconds. No byte arrives while a part is uploaded, so uploads have a
# longer limit.
SILENT_SECONDS = 60
SILENT_UPLOAD_SECONDS = 300
# A whole request has a very long time limit, because a large object takes long.
REQUEST_SECONDS = 24 * 3600

PART_BYTES = 16 << 20
MOST_PARTS = 9000  # S3 allows 10,000
PARTS_AT_ONCE = 6
UPLOAD_TRIES = 7
# Bytes per piece of a download that is not returned in one piece.
PIECE_BYTES = 1 << 20
# Downloads of up to this size are returned in one piece, which is less work for obstore. The parts of a parallel read
# (core.storage.READ_PART_BYTES) have this size.
WHOLE_BYTES = 16 << 20
# Bytes per piece of a download that is copied into the reader's memory. Larger pieces would take new pages from the
# kernel each time.
COPIED_BYTES = 256 << 10
# Ranges with at most this gap share a request: reading a megabyte too much is faster than another request.
GAP_BYTES = 1 << 20
PAGE_OBJECTS = 1000

_RETRIES_OFF = {"max_retries": 0, "retry_timeout": timedelta(0)}
# Pauses of 1, 2, 4, 8, 15 and 15 s, 45 s in all. Even the first pause takes a second, because the server may be
# throttling.
_RETRIES_OF_PARTS = {
    "max_retries": UPLOAD_TRIES - 1,
    "retry_timeout": timedelta(seconds=SILENT_UPLOAD_SECONDS),
    "backoff": {"init_backoff": timedelta(seconds=1), "max_backoff": timedelta(seconds=15), "base": 2},
}

Make = Callable[[dict[str, Any], dict[str, Any]], Any]

_used = _forked = False


def _after_fork() -> None:
    global _forked
    _forked = _used


os.register_at_fork(after_in_child=_after_fork)


class RemoteStore:
    """One bucket. `make` builds obstore's store from client options and a retry configuration.

    `move` takes the marks of an error (core/stores/faults.py). If these marks name another region, `move` addresses the
    bucket there and returns true.
    """

    is_local = False

    def __init__(self, terms: Terms, make: Make, move: Callable[[frozenset[str]], bool] = lambda marks: False):
        self.terms = terms
        self._make = make
        self._move = move
        self._lock = threading.Lock()
        self._plain: Any = None
        self._patient: Any = None

    @property
    def _store(self) -> Any:
        """obstore's store for single requests. It does not retry."""
        return self._made("_plain", SILENT_SECONDS, _RETRIES_OFF)

    @property
    def _uploads(self) -> Any:
        """obstore's store for large uploads. It retries their parts."""
        return self._made("_patient", SILENT_UPLOAD_SECONDS, _RETRIES_OF_PARTS)

    def _made(self, name: str, silent_seconds: int, retry: dict[str, Any]) -> Any:
        global _used
        if _forked:
            # obstore's threads do not exist in a forked process, and a request would wait for them forever.
            raise StorageError("storage was used before this process was forked; start it by forkserver or spawn")
        if store := getattr(self, name):
            return store
        client = {
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "read_timeout": timedelta(seconds=silent_seconds),
            "timeout": timedelta(seconds=REQUEST_SECONDS),
        }
        with self._lock:
            if getattr(self, name) is None:
                setattr(self, name, self._make(client, retry))
                _used = True
            return getattr(self, name)

    def get(self, key: str, start: int = 0, end: int | None = None) -> tuple[int, Iterator[Buffer]]:
        if end is not None and end - start <= WHOLE_BYTES:  # one call, without the object's metadata
            data = memoryview(obstore.get_range(self._store, key, start=start, end=end))
            return len(data), iter([data])
        result = obstore.get(self._store, key, options=None if end is None else {"range": (start, end)})
        count = result.range[1] - result.range[0]
        if count <= WHOLE_BYTES:
            return count, iter([memoryview(result.bytes())])
        return count, iter(result.stream(PIECE_BYTES))

    def fill(self, key: str, start: int, target: memoryview) -> int:
        options = {"range": (start, start + len(target))}
        return copy_into(target, obstore.get(self._store, key, options=options).stream(COPIED_BYTES))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[Buffer]:
        starts, ends = zip(*ranges, strict=True)
        found = obstore.get_ranges(self._store, key, starts=starts, ends=ends, coalesce=GAP_BYTES)
        return [memoryview(each) for each in found]

    def put(self, key: str, data: memoryview, exclusive: bool) -> None:
        if exclusive or data.nbytes < 2 * PART_BYTES:
            mode = "create" if exclusive else "overwrite"
            try:
                obstore.put(self._store, key, data, mode=mode, use_multipart=False)
            except Exception as error:
                if exclusive and "501" in faults.marks_of(error):
                    raise faults.NoConditions from error
                raise
        else:
            self._upload(key, data, data.nbytes)

    def put_file(self, key: str, path: str) -> None:
        size = os.path.getsize(path)
        if size < 2 * PART_BYTES:
            with open(path, "rb") as file:
                self.put(key, memoryview(file.read()), exclusive=False)
        else:
            with open(path, "rb") as file:
                self._upload(key, file, size)

    def _upload(self, key: str, content: Any, size: int) -> None:
        """Upload in parallel parts. If a part still fails after its retries, obstore removes the other parts."""
        part = max(PART_BYTES, -(-size // MOST_PARTS))
        try:
            obstore.put(self._uploads, key, content, use_multipart=True, chunk_size=part, max_concurrency=PARTS_AT_ONCE)
        except Exception as error:
            if "NoSuchUpload" in faults.marks_of(error) or not faults.is_transient(faults.marks_of(error)):
                raise
            raise faults.GaveUp(UPLOAD_TRIES) from error

    def size(self, key: str) -> int:
        try:
            return obstore.head(self._store, key)["size"]
        except Exception as error:
            if faults.marks_of(error) & {"400", "403"}:
                return self._asked_again(key, error)
            raise

    def _asked_again(self, key: str, refusal: Exception) -> int:
        """The size of an object whose HEAD request was refused.

        Sends a GET request, because its answer names the cause. Raises the error of the GET request, or NoListing if
        the credentials may not list the bucket either.
        """
        try:
            return obstore.get(self._store, key, options={"range": (0, 1)}).meta["size"]
        except Exception as error:
            marks = faults.marks_of(error)
            if "416" in marks:  # the object is empty, so it has no byte to return
                raise refusal from None
            if "AccessDenied" not in marks or not self._is_denied_listing(key):
                raise
            raise faults.NoListing from error

    def _is_denied_listing(self, key: str) -> bool:
        try:
            obstore.list_with_delimiter(self._store, key)
        except Exception as error:
            return "AccessDenied" in faults.marks_of(error)
        return False

    def objects(self, folder: str) -> Iterator[Found]:
        folder = folder.strip("/")
        for page in obstore.list(self._store, folder or None, chunk_size=PAGE_OBJECTS):
            for meta in page:
                if meta["path"] != folder and not self._marks_folder(meta):
                    yield Found(meta["path"], meta["size"], meta["last_modified"].timestamp())

    def _marks_folder(self, meta: Any) -> bool:
        """Whether this is an empty object whose name ends with a slash.

        Some tools mark a folder with such an object. obstore lists it without the slash, a name under which no object
        exists.
        """
        if meta["size"]:
            return False
        try:
            obstore.head(self._store, meta["path"])
        except FileNotFoundError:
            return True
        return False

    def names(self, folder: str) -> list[str]:
        folder = folder.strip("/")
        found = obstore.list_with_delimiter(self._store, folder or None)
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in paths if path != folder]

    def matching(self, pattern: str) -> Iterator[Found]:
        return matching(self, pattern)

    def pinned(self, key: str) -> str:
        return key

    def delete(self, key: str) -> None:
        obstore.delete(self._store, key)

    def renew(self, error: Exception) -> bool:
        marks = faults.marks_of(error)
        if not (marks & faults.EXPIRED or self._move(marks)):
            return False
        with self._lock:
            self._plain = self._patient = None
        return True


_MEMORY = MemoryStore()


def in_memory() -> RemoteStore:
    """A store whose objects exist only in the memory of this process."""
    return RemoteStore(Terms("memory"), lambda client, retry: _MEMORY)
