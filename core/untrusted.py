"""Checks data from storage.

Strangers may be able to write to a bucket. So the names, sizes, JSON and texts in a bucket are not trusted.

    path = untrusted.inside(folder, name)          # the local path of an object, checked to be inside the folder
    document = untrusted.read_json(uri)            # JSON whose size, depth and numbers are limited

Only this module checks names of objects. `core.output.visible` makes the texts of objects harmless to a terminal.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core import output, storage
from core.errors import DataError, ObjectDamaged

# An S3 key has at most 1,024 bytes.
NAME_BYTES = 1024
# Largest JSON document that is read. A manifest of 100,000 shards has only 20 MB.
DOCUMENT_BYTES = 256 << 20
# Deepest nesting that is read. The documents of this project have at most eight levels.
DEEPEST = 64
# Limit of whole numbers. The largest ones in the documents of this project are hashes of 64 bits.
LARGEST_WHOLE = 2**64
NO_LENGTH = str(int(1e30))  # the model_max_length that transformers writes for a tokenizer without limit

_DRIVE = re.compile(r"(?:^|/)[A-Za-z]:")


# --- names -----------------------------------------------------------------------------------------------------


def mistake_in_name(name: Any) -> str | None:
    """The mistake in an object's name below a folder, or None for a good name.

    The text completes a sentence that begins with the name. A good name is relative. None of its parts is empty, `.` or
    `..`, and all of its characters are printable.
    """
    if not isinstance(name, str):
        return "is not a text"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "holds half a character"
    if not 0 < size <= NAME_BYTES:
        return f"has {size:,} bytes, must have 1 to {NAME_BYTES:,}"
    if not name.isprintable():
        return "holds a character that is not printable"
    if name.startswith("/") or "\\" in name or _DRIVE.search(name):
        return "is not relative"
    if {"", ".", ".."} & set(name.split("/")):
        return "has an empty part, or a part . or .."
    return None


def check_name(name: Any, where: str) -> str:
    """Returns `name` unchanged if it has no mistake (`mistake_in_name`).

    Otherwise raises DataError. Its message begins with `where`, the place of the name.
    """
    if problem := mistake_in_name(name):
        raise DataError(
            f"{where}: the name {output.visible(repr(name)[:200])} {problem}; nothing was written: someone may have "
            "changed the bucket, so remove that object, or store it again from its source"
        )
    return name


def inside(folder: Path, name: Any, where: str) -> Path:
    """The local path of the object `name` in `folder`.

    Raises DataError if the path leads out of `folder` after its links are followed.
    """
    path = folder / check_name(name, where)
    root, real = folder.resolve(), path.resolve()
    if root not in real.parents:
        raise DataError(f"{where}: {path} leads to {real}, out of {root}; nothing was written: remove that link")
    return path


def memory_bytes() -> int:
    """The memory of this machine. A larger object cannot be read as a whole."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# --- JSON ------------------------------------------------------------------------------------------------------


def read_json(uri: str, most: int = DOCUMENT_BYTES, is_finite: bool = True) -> Any:
    """The value of an object's JSON. Raises ObjectNotFound, StorageError, and ValueError as `parse_json` does."""
    try:
        data = storage.read_bytes(uri, most)
    except ObjectDamaged as error:
        raise ValueError(str(error)) from error
    return parse_json(data, is_finite)


def read_object(uri: str) -> dict[str, Any]:
    """Like `read_json`, for a document that must be a JSON object. Raises ValueError for any other JSON value."""
    document = read_json(uri)
    if not isinstance(document, dict):
        raise ValueError("not a JSON object")
    return document


def parse_json(data: bytes | str, is_finite: bool = True) -> Any:
    """The value of a JSON text. Raises ValueError with the reason for any other text.

    Also raises ValueError if the JSON is nested deeper than DEEPEST or holds a whole number of 2^64 or more. Unless
    `is_finite` is false, NaN and infinity are refused too.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = (_DECODER if is_finite else _WITH_NAN).decode(text)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from None
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [each for container in level for each in _children(container) if isinstance(each, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEEPEST} deep")


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _whole(text: str) -> int:
    if text == NO_LENGTH:
        return int(text)
    if len(text) > 20 or not -LARGEST_WHOLE < (number := int(text)) < LARGEST_WHOLE:
        raise ValueError(f"it holds a whole number of {len(text)} digits")
    return number


def _real(text: str) -> float:
    number = float(text)
    if number - number:  # true for infinity, because the difference is NaN
        raise ValueError(f"it holds the number {text[:20]}, which is out of range")
    return number


def _constant(text: str) -> Any:
    raise ValueError(f"it holds {text}, which JSON does not have as a number")


_DECODER = json.JSONDecoder(parse_float=_real, parse_int=_whole, parse_constant=_constant)
_WITH_NAN = json.JSONDecoder(parse_int=_whole)
