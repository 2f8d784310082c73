"""Reads the rows of small sets: all rows of one file, as Python objects."""

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from core import storage
from core.errors import DataError
from data_prep.sources import blocks, lines
from data_prep.sources.files import SourceFile, has_suffix

PARQUET = (".parquet",)
JSON_SUFFIXES = tuple(kind + packed for kind in (".jsonl", ".ndjson", ".json") for packed in ("", ".gz", ".zst"))


def is_file_of_rows(uri: str) -> bool:
    """Whether `read_rows` reads a file of this name."""
    return has_suffix(uri, (*JSON_SUFFIXES, *PARQUET))


def read_rows(uri: str) -> list[Any]:
    """All rows of a file. A line of invalid JSON, or a row with text that is not UTF-8, becomes None.

    Raises DataError for another kind of file.
    """
    if has_suffix(uri, PARQUET):
        try:
            return _rows_of(pq.read_table(io.BytesIO(storage.read_bytes(uri))))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{uri}: cannot be read as parquet ({error}); write it again as JSON lines") from error
    if not has_suffix(uri, JSON_SUFFIXES):
        raise DataError(f"{uri}: unknown kind of file; give one that ends in {', '.join(JSON_SUFFIXES)} or .parquet")
    data = b"".join(blocks.content(SourceFile(uri, storage.size_of(uri), ""), lambda count: None))
    whole = lines.parsed(data)  # a .json file may be one list of rows
    if isinstance(whole, list):
        return whole
    return [lines.parsed(line) for line in data.splitlines() if line.strip()]


def _rows_of(table: pa.Table) -> list[Any]:
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        rows = [_row_of(table.slice(number, 1)) for number in range(table.num_rows)]
    return [_with_text(row) for row in rows] if "binary" in str(table.schema) else rows


def _row_of(table: pa.Table) -> dict[str, Any] | None:
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _with_text(value: Any) -> Any:
    """Convert bytes that are UTF-8 to text, because some writers of parquet do not mark strings as strings."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, dict):
        return {key: _with_text(each) for key, each in value.items()}
    return [_with_text(each) for each in value] if isinstance(value, list) else value
