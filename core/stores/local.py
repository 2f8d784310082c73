"""Uses local folders as a store. Every write is flushed to disk, and links are followed (core/files.py)."""

import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from core import files
from core.stores.base import Buffer, Found, Terms

CHUNK_BYTES = 8 << 20
SMALL_BYTES = 64 << 10
TERMS = Terms("disk", endpoint="the folder", access="file permissions")


def path_of(uri: str) -> Path:
    """The path behind a local URI (file:// or plain)."""
    return Path(os.path.expanduser(uri.removeprefix("file://")))


class LocalStore:
    """The store of local folders. Its keys are whole URIs: a plain path, or file:// and a path."""

    terms = TERMS
    is_local = True

    def get(self, key: str, start: int = 0, end: int | None = None) -> tuple[int, Iterator[Buffer]]:
        path = os.path.expanduser(key.removeprefix("file://"))
        size = os.stat(path).st_size
        count = max(0, (size if end is None else min(end, size)) - start)
        # A small file is read in one call, because a report reads thousands of them.
        if 0 < count <= SMALL_BYTES and not start:
            with open(path, "rb", buffering=0) as file:
                return count, iter((file.read(count),))
        # If `end` is not given, the file is read to its end. `size` is not used here, because a pipe has no size.
        return count, _chunks(path, start, end)

    def fill(self, key: str, start: int, target: memoryview) -> int:
        with path_of(key).open("rb", buffering=0) as file:
            file.seek(start)
            got = 0
            while got < len(target) and (count := file.readinto(target[got:])):
                got += count
        return got

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with path_of(key).open("rb") as file:
            return [_piece(file, start, end) for start, end in ranges]

    def put(self, key: str, data: memoryview, exclusive: bool) -> None:
        with files.replacing(path_of(key), exclusive=exclusive) as file:
            file.write(data)

    def put_file(self, key: str, path: str) -> None:
        with files.replacing(path_of(key)) as target, open(path, "rb") as source:
            shutil.copyfileobj(source, target, CHUNK_BYTES)

    def size(self, key: str) -> int:
        path = path_of(key)
        if path.is_dir():
            raise FileNotFoundError(key)
        return path.stat().st_size

    def objects(self, folder: str) -> Iterable[Found]:
        root = path_of(folder)
        before, cut = folder.rstrip("/"), len(os.path.join(root, ""))
        for path, stat in files.below(root):
            yield Found(f"{before}/{path[cut:]}", stat.st_size, stat.st_mtime)

    def names(self, folder: str) -> Iterable[str]:
        return files.names(path_of(folder))

    def matching(self, pattern: str) -> Iterable[Found]:
        return [Found(str(path), stat.st_size, None) for path, stat in files.matching(path_of(pattern))]

    def pinned(self, key: str) -> str:
        return key

    def delete(self, key: str) -> None:
        path_of(key).unlink()

    def renew(self, error: Exception) -> bool:
        return False


def _chunks(path: str, start: int, end: int | None) -> Iterator[bytes]:
    left = math.inf if end is None else end - start
    with open(path, "rb") as file:
        if start:
            file.seek(start)
        while left > 0 and (chunk := file.read(int(min(left, CHUNK_BYTES)))):
            left -= len(chunk)
            yield chunk


def _piece(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)
