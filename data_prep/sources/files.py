"""Describes source files and their parts, finds files and reads byte ranges of them."""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from core import storage, urls
from core.errors import DataError, ObjectNotFound
from core.storage import ObjectInfo
from data_prep.sources import web

# A function that is called with the number of source bytes read since its last call.
Fetched = Callable[[int], None]


@dataclass(frozen=True)
class SourceFile:
    """A file of a source, as the plan stores it.

    If the file's suffix does not determine how to read it, `reader` names a module of `datasets`, and `options` (JSON)
    holds its settings. `name` is the id of a text file in a subfolder of the source: its path below the source's
    folder.
    """

    uri: str
    size: int
    tail_sha256: str
    reader: str = ""
    options: str = ""
    name: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("reader", "options", "name") or value}

    @property
    def content(self) -> tuple[Any, ...]:
        """The values on which the file's documents depend. The folder is left out, because its spelling may vary."""
        last = self.uri.rsplit("/", 1)[-1]
        return last, self.size, self.tail_sha256, self.reader, self.options, self.name


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


def find_files(place: str, suffixes: tuple[str, ...]) -> list[ObjectInfo]:
    """The files that match a URL or pattern, sorted by name. Raises DataError if no file matches.

    If the place is a folder, the message proposes a pattern that ends with one of the suffixes.
    """
    if urls.is_web(place):
        if storage.is_pattern(path_of(place)):
            raise DataError(f"{place}: web servers cannot list files, so a wildcard does not work; give one address")
        return [ObjectInfo(place, web.size_of(place))]
    try:
        found = storage.expand_objects(place)
    except ObjectNotFound as error:
        raise _folder(place, suffixes) or error from None
    if not found:
        raise _folder(place, suffixes) or DataError(
            f"{place}: no file matches; check the address and the pattern (wildcards do not match a leading . or _)"
        )
    return found


def _folder(place: str, suffixes: tuple[str, ...]) -> DataError | None:
    """The error for a place that is a folder. The error names a pattern that matches files in the folder.

    None if the folder has no such files.
    """
    for pattern in (storage.join(place, "*"), storage.join(place, "**")):
        names = [path_of(info.uri).lower() for info in storage.expand_objects(pattern)]
        fitting = [max((each for each in suffixes if name.endswith(each)), key=len, default="") for name in names]
        if usual := Counter(filter(None, fitting)).most_common(1):
            files = f"{pattern}/*" if pattern.endswith("**") else pattern
            return DataError(f"{place}: is a folder; name the files in it: {files}{usual[0][0]}")
    return None


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file. Raises StorageError, ObjectNotFound."""
    return web.read_range(uri, start, end) if urls.is_web(uri) else storage.read_range(uri, start, end)


def path_of(uri: str) -> str:
    """A URI without the query of a web address, so that it ends with the file's suffix."""
    return re.sub(r"[?#].*$", "", uri) if urls.is_web(uri) else uri


def has_suffix(uri: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name ends with one of the suffixes, in any case."""
    return path_of(uri).lower().endswith(suffixes)


def below(uri: str, folder: str) -> str:
    """The path of a file below a folder. The two URLs may spell the same local folder differently."""
    if storage.is_local(uri):
        return os.path.relpath(storage.local_path(uri), storage.local_path(folder or ".")).replace(os.sep, "/")
    return uri.removeprefix(folder.rstrip("/") + "/")


def folder_of(uris: list[str]) -> str:
    """The deepest folder that holds all files."""
    folders = [uri.split("/")[:-1] for uri in uris]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    return "/".join(parts[0] for parts in same)
