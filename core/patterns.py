"""Wildcards in places: `*`, `?` and `[...]` within a name, `**` for any number of folders.

patterns.matcher("shards/*.bin")("shards/000.bin")     True
"""

import fnmatch
import re
from collections.abc import Callable, Sequence

_WILD = re.compile(r"[*?\[]")
# Whether one name fits; None stands for `**`.
_Part = Callable[[str], object] | None


def is_pattern(place: str) -> bool:
    return bool(_WILD.search(place))


def fixed_part(pattern: str) -> str:
    """What every match begins with."""
    return _WILD.split(pattern, maxsplit=1)[0]


def matcher(pattern: str) -> Callable[[str], bool]:
    """A function that says whether a whole path fits. `**` stands for folders only as a part of its own."""
    parts = [None if part == "**" else re.compile(fnmatch.translate(part)).match for part in pattern.split("/")]
    return lambda path: _fits(parts, path.split("/"))


def _fits(parts: Sequence[_Part], names: Sequence[str]) -> bool:
    for number, part in enumerate(parts):
        rest = names[number:]
        if part is None:
            after = parts[number + 1 :]
            return any(_fits(after, rest[skipped:]) for skipped in range(len(rest))) if after else bool(rest)
        if not rest or not part(rest[0]):
            return False
    return len(parts) == len(names)
