"""Rows of a small JSON-lines or parquet file as plain dictionaries."""

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from core import storage
from core.errors import DataError


def read(uri: str) -> list[Any]:
    """All rows; a line that is no JSON becomes None. Raises DataError for another kind of file."""
    data = storage.read_bytes(uri)
    if uri.endswith(".parquet"):
        try:
            return pq.read_table(io.BytesIO(data)).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{uri}: cannot be read as parquet ({error}); copy it again") from error
    if uri.endswith(".jsonl"):
        return [_row(line) for line in data.splitlines() if line.strip()]
    raise DataError(f"{uri}: unknown kind of file; give one that ends in .jsonl or .parquet")


def lines(rows: list[dict[str, Any]]) -> bytes:
    """JSON lines, ASCII only, as Python's json writes them by default."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _row(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
