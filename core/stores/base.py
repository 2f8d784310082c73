"""Defines Store, the interface of stores for core.storage, and matches keys with patterns.

Each store has its own form of keys. A store raises the errors of its library, and core/stores/faults.py interprets
them.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Buffer = bytes | bytearray | memoryview


class Found(NamedTuple):
    """One object of a listing: key, size in bytes, and modification time (unix s) if the store knows it."""

    key: str
    size: int
    modified: float | None


@dataclass(frozen=True)
class Terms:
    """The words that messages and reports use for a store.

    `service` is one of aws, r2, s3-like (any other server of that protocol), google, azure, hub, memory and disk.
    """

    service: str
    bucket: str = ""
    endpoint: str = "the server"
    create: str = "create it"  # words that say how to create the bucket
    keys: str = ""  # variables that hold its credentials
    access: str = "that the key may read and write this bucket"


class Store(Protocol):
    """The interface of a store. A reader sees an object only as a whole: a write is visible when it is complete."""

    terms: Terms
    is_local: bool

    def get(self, key: str, start: int = 0, end: int | None = None) -> tuple[int, Iterator[Buffer]]:
        """The number of bytes in [start, end) that the object has, and these bytes in pieces."""

    def fill(self, key: str, start: int, target: memoryview) -> int:
        """Read the bytes from `start` on into `target`. Returns how many bytes the object had for it."""

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[Buffer]:
        """The bytes of each range. Neighbouring ranges may share a request."""

    def put(self, key: str, data: memoryview, exclusive: bool) -> None:
        """Store an object atomically. If `exclusive` is true, exactly one of several racing writers succeeds."""

    def put_file(self, key: str, path: str) -> None:
        """Store a local file atomically."""

    def size(self, key: str) -> int:
        """Size in bytes. Raises FileNotFoundError or the library's equivalent."""

    def objects(self, folder: str) -> Iterable[Found]:
        """All objects below a folder at any depth. The result is empty if the folder does not exist."""

    def names(self, folder: str) -> Iterable[str]:
        """Names of objects and folders one level below a folder. Empty if the folder does not exist."""

    def matching(self, pattern: str) -> Iterable[Found]:
        """Objects whose keys match a pattern."""

    def pinned(self, key: str) -> str:
        """The key with its current version, if the store keeps versions. Otherwise the key is returned unchanged."""

    def delete(self, key: str) -> None:
        """Delete an object. May raise FileNotFoundError if it does not exist."""

    def renew(self, error: Exception) -> bool:
        """Renew the credentials or the region if an error shows that they are the cause.

        Returns whether the request can be repeated.
        """


def copy_into(target: memoryview, pieces: Iterable[Buffer]) -> int:
    """Copy pieces into `target`, one after the other. Returns their length, which may be more or less than fits."""
    at = 0
    for piece in pieces:
        target[at : at + len(piece)] = memoryview(piece)[: len(target) - at]
        at += len(piece)
        if at > len(target):
            break
    return at


# --- patterns over keys ----------------------------------------------------------------------------------------

_WILD = re.compile(r"[*?\[]")
# A function that says whether one part of a path matches. None means `**`.
_Part = Callable[[str], object] | None


def is_pattern(place: str) -> bool:
    """Whether a place holds wildcards: `*`, `?` and `[...]` within a name, `**` for any number of folders."""
    return bool(_WILD.search(place))


def matcher(pattern: str) -> Callable[[str], bool]:
    """A function that says whether a whole path matches a pattern.

    `**` matches folders only if it is a whole part of the pattern. Names that begin with `.` are hidden, as in a shell.
    Names that begin with `_` are hidden too, because Spark and Hive give such names to files that are not data. A
    wildcard matches a hidden name only if its part of the pattern begins with the same character (`.*`, `_*`).
    """
    parts = [None if part == "**" else _part(part) for part in pattern.split("/")]
    return lambda path: _fits(parts, path.split("/"))


def literal_parts(parts: Sequence[str], exists: Callable[[Sequence[str]], bool]) -> int:
    """The number of leading parts of a pattern that are plain names.

    A part is a plain name if it has no wildcards, or if an entry with exactly this name exists.
    """
    for number, part in enumerate(parts):
        if is_pattern(part) and not (part != "**" and exists(parts[: number + 1])):
            return number
    return len(parts)


def matching(store: Store, pattern: str) -> Iterator[Found]:
    """Objects whose keys match a pattern. The store lists the folder before the first wildcard."""
    folder = _WILD.split(pattern, maxsplit=1)[0].rpartition("/")[0]
    found = list(store.objects(folder))
    parts = pattern.split("/")

    def exists(names: Sequence[str]) -> bool:
        place = "/".join(names)
        if len(names) == len(parts):
            return any(each.key == place for each in found)
        return any(each.key.startswith(f"{place}/") for each in found)

    fixed = literal_parts(parts, exists)
    before = "/".join([*parts[:fixed], ""])
    if fixed == len(parts):
        return (each for each in found if each.key == pattern)
    fits = matcher("/".join(parts[fixed:]))
    return (each for each in found if each.key.startswith(before) and fits(each.key[len(before) :]))


def _part(pattern: str) -> Callable[[str], object]:
    fits = re.compile(fnmatch.translate(pattern)).match
    return lambda name: name == pattern or (fits(name) and not (_is_hidden(name) and pattern[0] != name[0]))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _fits(parts: Sequence[_Part], names: Sequence[str]) -> bool:
    for number, part in enumerate(parts):
        rest = names[number:]
        if part is None:
            after = parts[number + 1 :]
            shown = next((place for place, name in enumerate(rest) if _is_hidden(name)), len(rest))
            if not after:
                return bool(rest) and shown == len(rest)
            return any(_fits(after, rest[skipped:]) for skipped in range(min(len(rest), shown + 1)))
        if not rest or not part(rest[0]):
            return False
    return len(parts) == len(names)
