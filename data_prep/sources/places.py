"""Where source files are: what core.storage reads, and https:// addresses."""

import re

from core import storage, urls
from core.errors import DataError
from core.storage import ObjectInfo
from data_prep.sources import web


def find(place: str) -> list[ObjectInfo]:
    """The files that a URL or pattern names, in the order of their names. Raises DataError if there is none."""
    if urls.is_web(place):
        if storage.is_pattern(path_of(place)):
            raise DataError(f"{place}: web servers list no files, so wildcards cannot be used; give one address")
        return [ObjectInfo(place, web.size_of(place))]
    found = storage.expand_objects(place)
    if not found:
        raise DataError(f"{place}: no file matches; check the address and the pattern")
    return found


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file. Raises StorageError, ObjectNotFound."""
    return web.read_range(uri, start, end) if urls.is_web(uri) else storage.read_range(uri, start, end)


def path_of(uri: str) -> str:
    """A URI without the query of a web address, whose ending is the file's."""
    return re.sub(r"[?#].*$", "", uri) if urls.is_web(uri) else uri


def has_suffix(uri: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name ends in one of these, in capitals or not."""
    return path_of(uri).lower().endswith(suffixes)
