"""Local files as objects: written whole or not at all, and what there is; the transport of core.storage for paths.

with files.replacing(Path("run/a.json")) as file:
    file.write(b"{}")
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path, exclusive: bool = False, flush: bool = True) -> Iterator[BinaryIO]:
    """Write beside `path`, flush to disk, then move into place; nothing is left behind on failure.

    With `exclusive`, raises FileExistsError if the name is taken.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.chmod(0o644)
        if exclusive:
            os.link(temporary, path)  # atomic, and fails if the name is taken
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def below(root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All files below a folder, at any depth; none if there is no such folder."""
    for folder, _, names_here in os.walk(root):
        for name in names_here:
            if _is_temporary(name):
                continue
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # removed while we walk
                yield path, path.stat()


def names(folder: Path) -> list[str]:
    """Names of files and folders in a folder; none if there is no such folder."""
    return [entry.name for entry in folder.iterdir() if not _is_temporary(entry.name)] if folder.is_dir() else []


def matching(pattern: Path) -> list[Path]:
    """Files whose path fits a pattern with `*`, `?`, `[...]` or `**`."""
    literal = []
    for part in pattern.parts:
        if re.search(r"[*?\[]", part):
            break
        literal.append(part)
    root = Path(*literal)
    return [path for path in root.glob(str(pattern.relative_to(root))) if path.is_file()]


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")
