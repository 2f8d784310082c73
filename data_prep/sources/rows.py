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
    """All rows of a file. A line of invalid JSON becomes None. Raises DataError for another kind of file."""
    if has_suffix(uri, PARQUET):
        try:
            return pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{uri}: cannot be read as parquet ({error}); write it again as JSON lines") from error
    if not has_suffix(uri, JSON_SUFFIXES):
        raise DataError(f"{uri}: unknown kind of file; give one that ends in {', '.join(JSON_SUFFIXES)} or .parquet")
    data = b"".join(blocks.content(SourceFile(uri, storage.size_of(uri), ""), lambda count: None))
    whole = lines.parsed(data)  # a .json file may be one list of rows
    if isinstance(whole, list):
        return whole
    return [lines.parsed(line) for line in data.splitlines() if line.strip()]
