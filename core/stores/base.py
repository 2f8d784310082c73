"""What a store offers to core.storage. Keys are the store's own; errors are its library's (core/stores/faults.py)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

Buffer = bytes | bytearray | memoryview


class Found(NamedTuple):
    """One object of a listing: its key, its bytes and, where the store knows it, its modification time (unix s)."""

    key: str
    size: int
    modified: float | None


@dataclass(frozen=True)
class Terms:
    """What messages and reports call a store.

    `service` is one of aws, r2, s3-like (any other server of that protocol), google, azure, hub, memory and disk.
    """

    service: str
    bucket: str = ""
    endpoint: str = "the server"
    create: str = "create it"  # how to create the bucket
    keys: str = ""  # variables that hold its credentials
    access: str = "that the key may read and write this bucket"


class Store(Protocol):
    """Objects are whole and immutable to a reader: a write is visible only when it is complete."""

    terms: Terms
    is_local: bool

    def get(self, key: str, start: int = 0, end: int | None = None) -> tuple[int, Iterator[Buffer]]:
        """The number of bytes in [start, end) that there are, and those bytes in pieces."""

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[Buffer]:
        """The bytes of each range. Ranges that are close to each other share a request where that is faster."""

    def put(self, key: str, data: memoryview, exclusive: bool) -> None:
        """Store an object whole. With `exclusive`, of several racing writers exactly one succeeds."""

    def put_file(self, key: str, path: str) -> None:
        """Store a local file whole."""

    def size(self, key: str) -> int: ...

    def objects(self, folder: str) -> Iterable[Found]:
        """All objects below a folder, at any depth; an absent folder has none."""

    def names(self, folder: str) -> Iterable[str]:
        """Names of objects and folders one level below a folder; an absent folder has none."""

    def matching(self, pattern: str) -> Iterable[Found]: ...

    def pinned(self, key: str) -> str:
        """The key at the version that it stands for now, where the store keeps versions; else the key."""

    def delete(self, key: str) -> None:
        """Remove an object. May raise FileNotFoundError if there is none."""

    def renew(self, error: Exception) -> bool:
        """Whether the error can be cured by new credentials or another region, which the store now uses."""
