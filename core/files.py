"""Writes local files atomically, and lists folders, following links. core/stores/local.py uses this module.

with files.replacing(Path("run/a.json")) as file:
    file.write(b"{}")
"""

import contextlib
import errno
import heapq
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG
from typing import BinaryIO

from core.errors import StorageError
from core.stores.base import literal_parts, matcher

# Error codes by which mounted buckets and network shares refuse an operation that they do not support.
_UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NO_HARD_LINKS = _UNSUPPORTED | {errno.EMLINK}


@contextlib.contextmanager
def replacing(path: Path, exclusive: bool = False, flush: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file beside `path`. If the block succeeds, the file is flushed and renamed to `path`.

    If `exclusive` is true and `path` exists, raises FileExistsError. Raises StorageError if the folder is a dangling
    link.
    """
    _check_link(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            if flush:
                file.flush()
                with _if_supported():
                    os.fsync(file.fileno())
        with _if_supported():
            temporary.chmod(0o644)
        if exclusive:
            _move_to_free_name(temporary, path)
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _if_supported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _move_to_free_name(temporary: Path, path: Path) -> None:
    """Rename a file to `path`. Raises FileExistsError if `path` exists.

    If several callers race for the same path, exactly one succeeds.
    """
    try:
        os.link(temporary, path)  # atomic: `path` appears with its complete content
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # exFAT, SMB and some FUSE file systems have no hard links. Before `replace`, `path` is an empty file here.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        temporary.replace(path)


def below(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield path and status of each file below a folder, at any depth, following links.

    Yields nothing if `root` does not exist. If links give a folder several paths, the folder is read once, by the path
    with the fewest links, so loops of links end. A dangling link is listed with the size of the link itself; reading it
    fails. Raises StorageError if `root` is a dangling link, OSError for an unreadable folder.
    """
    _check_link(root)
    yield from _walk(root, lambda names: True, bounded=False)


def names(folder: Path) -> list[str]:
    """Names of files, folders and links in a folder. The list is empty if the folder does not exist.

    Raises the errors of `below`.
    """
    try:
        return [entry.name for entry in _entries(folder)]
    except (FileNotFoundError, NotADirectoryError):
        _check_link(folder)
        return []


def matching(pattern: Path) -> list[tuple[Path, os.stat_result]]:
    """Files whose path matches a pattern with `*`, `?`, `[...]` or `**`.

    Links are followed as in `below`, and the same errors are raised. Also raises StorageError if there is a dangling
    link where the pattern needs a folder, because files behind that link might match.
    """
    wild = literal_parts(pattern.parts, lambda names: os.path.lexists(Path(*names)))
    root, parts = Path(*pattern.parts[:wild]), pattern.parts[wild:]
    if not parts:
        _check_link(root)
        return [(root, root.stat())] if root.is_file() else []
    fits = matcher("/".join(parts))
    parts_fit = [matcher(part) for part in parts]
    recursive = parts.index("**") if "**" in parts else None

    def leads(names: tuple[str, ...]) -> bool:
        if recursive is None and len(names) >= len(parts):
            return False
        return all(fit(name) for name, fit in zip(names[:recursive], parts_fit, strict=False))

    _check_link(root)
    found = []
    for name, stat in _walk(root, leads, bounded=recursive is None):
        path = Path(name)
        if not (S_ISREG(stat.st_mode) or S_ISLNK(stat.st_mode)):
            continue
        relative = path.relative_to(root)
        if fits(relative.as_posix()):
            found.append((path, stat))
        elif S_ISLNK(stat.st_mode) and leads(relative.parts):
            _check_link(path)
    return found


def link_to_nothing(path: Path) -> Path | None:
    """The dangling link that makes `path` unreachable, or None if there is no such link.

    Only one place is checked: `path` or, if nothing exists there, the nearest folder above it that exists.
    """
    for each in (path, *path.parents):
        if os.path.lexists(each):
            return each if each.is_symlink() and not os.path.exists(each) else None
    return None


def _check_link(path: Path) -> None:
    if link := link_to_nothing(path):
        raise StorageError(
            f"{link}: is a link to {os.readlink(link)}, which does not exist; mount or restore it, or remove the link"
        )


def _walk(root: Path, leads: Callable[[tuple[str, ...]], bool], bounded: bool) -> Iterator[tuple[str, os.stat_result]]:
    """Yield the files in `root`, and in each folder below it for which `leads(parts of its relative path)` is true.

    `bounded` means that `leads` accepts folders only down to some depth. Links may give a folder paths of several
    depths. The folder is then read once per depth, because its files may match the pattern at only one of these depths.
    """
    # The heap returns the folder with the fewest links in its path first, then the one with the least depth. Paths are
    # strings, because pathlib takes five times as long and a run may have tens of thousands of folders.
    waiting: list[tuple[int, int, str, tuple[str, ...]]] = [(0, 0, str(root), ())]
    read: set[tuple[int, int, int]] = set()
    while waiting:
        links, depth, folder, parts = heapq.heappop(waiting)
        try:
            stat = os.stat(folder)
            known = (stat.st_dev, stat.st_ino, depth if bounded else 0)
            if known in read:
                continue
            entries = _entries(folder)
        except (FileNotFoundError, NotADirectoryError):  # the folder was removed during the walk, or never existed
            continue
        read.add(known)
        for entry in entries:
            found = _stat(entry)
            if found is None:
                continue
            if not S_ISDIR(found.st_mode):
                yield entry.path, found
            elif leads((*parts, entry.name)):
                heapq.heappush(waiting, (links + entry.is_symlink(), depth + 1, entry.path, (*parts, entry.name)))


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not _is_temporary(entry.name)]


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The status of the file that an entry leads to. For a dangling link, this is the status of the link.

    None if the entry was removed after the listing.
    """
    try:
        return entry.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")
