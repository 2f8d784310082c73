"""A source file and a part of it, as the plan stores them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

# Called with the number of source bytes that have just been read.
Fetched = Callable[[int], None]


@dataclass(frozen=True)
class SourceFile:
    """One file of a source. `reader` names a module of `datasets`, and `options` its settings as JSON, where the
    ending of the file's name does not say how to read it."""

    uri: str
    size: int
    tail_sha256: str
    reader: str = ""
    options: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in ("reader", "options") or value}


@dataclass(frozen=True)
class Part:
    """Bytes [start, end) of a source file; `index` numbers the parts of a set."""

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
