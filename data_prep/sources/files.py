"""Describes source files and their parts, finds files and reads byte ranges of them."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from core import storage, urls
from core.errors import DataError
from core.storage import ObjectInfo
from data_prep.sources import web

# Called with the number of source bytes read since the last call.
Fetched = Callable[[int], None]


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, as the plan stores it.

    `reader` and `options` (JSON) name a module of `datasets` and its settings if the file's suffix does not.
    """

    uri: str
    size: int
    tail_sha256: str
    reader: str = ""
    options: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("reader", "options") or value}


@dataclass(frozen=True)
class Part:
    """Bytes [start, end) of a source file. `index` numbers the parts of a dataset."""

    index: int
    file: SourceFile
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.index:05d}"

    def __str__(self) -> str:
        whole = self.start == 0 and self.end == self.file.size
        return self.file.uri if whole else f"{self.file.uri}[{self.start}:{self.end}]"


def find_files(place: str) -> list[ObjectInfo]:
    """The files that match a URL or pattern, sorted by name. Raises DataError if there is none."""
    if urls.is_web(place):
        if storage.is_pattern(path_of(place)):
            raise DataError(f"{place}: web servers cannot list files, so a wildcard does not work; give one address")
        return [ObjectInfo(place, web.size_of(place))]
    found = storage.expand_objects(place)
    if not found:
        raise DataError(f"{place}: no file matches; check the address and the pattern")
    return found


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file. Raises StorageError, ObjectNotFound."""
    return web.read_range(uri, start, end) if urls.is_web(uri) else storage.read_range(uri, start, end)


def path_of(uri: str) -> str:
    """A URI without the query of a web address, so that it ends with the file's suffix."""
    return re.sub(r"[?#].*$", "", uri) if urls.is_web(uri) else uri


def has_suffix(uri: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name ends with one of the suffixes, in any case."""
    return path_of(uri).lower().endswith(suffixes)
