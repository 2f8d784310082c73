"""Small sets beside the token shards: evaluation questions and instruction data, as JSON lines with a checksum.

    DATA_URL/sets/<name>.jsonl   one row per line
    DATA_URL/sets/<name>.json    what it is, its rows, bytes and SHA-256; written last

So GPU nodes depend on nobody else's server, and every node sees the same rows.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core import storage
from core.errors import DataError, ObjectNotFound

FORMAT = "rows"
VERSION = 1


@dataclass(frozen=True)
class SetInfo:
    """What a set holds and where it is from."""

    name: str
    schema: str
    source: str
    licence: str
    rows: int
    bytes: int
    sha256: str


def write(data_url: str, name: str, schema: str, source: str, licence: str, data: bytes) -> SetInfo:
    """Store JSON lines, then what they are."""
    info = SetInfo(name, schema, source, licence, data.count(b"\n"), len(data), hashlib.sha256(data).hexdigest())
    storage.write_bytes(_uri(data_url, f"{name}.jsonl"), data)
    document = {"format": FORMAT, "version": VERSION, **asdict(info)}
    storage.write_bytes(_uri(data_url, f"{name}.json"), (json.dumps(document, indent=1) + "\n").encode())
    return info


def info_of(data_url: str, name: str) -> SetInfo:
    """Raises DataError if there is no such set."""
    uri = _uri(data_url, f"{name}.json")
    try:
        document = json.loads(storage.read_bytes(uri))
        if (document.pop("format"), document.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"not {FORMAT} version {VERSION}")
        return SetInfo(**document)
    except ObjectNotFound as error:
        raise DataError(
            f"{uri}: there is no set {name!r}; store it first: python -m data_prep.sets {name} {data_url}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{uri}: no description of a set ({error}); store it again") from error


def read(data_url: str, name: str) -> Sequence[dict[str, Any]]:
    """All rows of a set, its checksum compared. Raises DataError."""
    info = info_of(data_url, name)
    uri = _uri(data_url, f"{name}.jsonl")
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise DataError(
            f"{uri}: its content is not what was stored; store it again: python -m data_prep.sets {name} {data_url}"
        )
    return [json.loads(line) for line in data.splitlines()]


def read_if_there(data_url: str, name: str) -> Sequence[dict[str, Any]] | None:
    """All rows of a set, or None if it was never stored."""
    return read(data_url, name) if storage.exists(_uri(data_url, f"{name}.json")) else None


def _uri(data_url: str, name: str) -> str:
    return storage.join(data_url, "sets", name)
