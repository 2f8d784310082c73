"""Reads JSON lines as Arrow record batches.

A line belongs to the part in which it starts, so that several workers can share a large file. A compressed file is one
part, because reading cannot start in the middle. A line that is not a JSON object, or whose text is not a string,
becomes a row without text, which counts as bad.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from core.errors import DataError
from core.settings.preparation import SourceConfig
from data_prep.sources import blocks, chat
from data_prep.sources.files import Fetched, Part, SourceFile

# This limit bounds the memory for a file without line breaks.
LONGEST_LINE_BYTES = 256 << 20
# Number of first rows from which the columns are inferred.
SAMPLE_ROWS = 100


def schema_of(file: SourceFile, source: SourceConfig | None = None) -> pa.Schema:
    """The columns of the first rows. A column of mixed types has the type null."""
    return schema_of_rows(blocks.head(file))


def schema_of_rows(start: bytes) -> pa.Schema:
    """The result of `schema_of` for a file that begins with these bytes."""
    pieces = start.split(b"\n")
    # The last line may be incomplete, unless it is the only one.
    rows = [row for row in map(_row, pieces[:-1] or pieces) if row][:SAMPLE_ROWS]
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.schema([(name, _type([row.get(name) for row in rows])) for name in names])


def read(
    part: Part, source: SourceConfig | None, columns: Mapping[str, str], fetched: Fetched
) -> Iterator[pa.RecordBatch]:
    """Yields batches in file order. `columns` maps names to `text`, `id` or `number`.

    Values of another type become null. Raises DataError for a damaged compressed file.
    """
    rows: list[dict[str, Any]] = []
    size = 0
    for line in _lines(part, fetched):
        if not line.strip():
            continue
        rows.append(_row(line))
        size += len(line)
        if size >= blocks.BLOCK_BYTES:
            yield _batch(rows, columns)
            rows, size = [], 0
    if rows:
        yield _batch(rows, columns)


def is_object(line: bytes) -> bool:
    """Whether a line is a JSON object with at least one field."""
    return bool(_row(line))


def _type(values: list[Any]) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, RecursionError):
        return pa.null()


def _row(line: bytes) -> dict[str, Any]:
    row = parsed(line)
    return row if isinstance(row, dict) else {}


def parsed(line: bytes) -> Any:
    """The value of a JSON line. None if Python cannot parse the line."""
    try:
        return json.loads(line)
    # The line is not JSON, is not UTF-8, has a number with too many digits, or is nested too deeply.
    except (ValueError, RecursionError):
        return None


def _batch(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> pa.RecordBatch:
    types = {"number": pa.float64(), "id": pa.large_string(), "text": pa.large_string()}
    converted = [_converted(row, columns) for row in rows]
    arrays = [
        pa.array([values[number] for values in converted], types[holds])
        for number, holds in enumerate(columns.values())
    ]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _converted(row: dict[str, Any], columns: Mapping[str, str]) -> list[Any]:
    """The values of a row by column. If a value cannot be converted, all values are null, and the row counts as bad."""
    try:
        return [_CONVERT[holds](row.get(name)) for name, holds in columns.items()]
    except (OverflowError, RecursionError):  # an integer beyond float64
        return [None] * len(columns)


def _text(value: Any) -> str | None:
    value = chat.text_of(value) if isinstance(value, list) else value
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        # A lone surrogate (JSON allows it) becomes U+FFFD, as in tiktoken.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _id(value: Any) -> str | None:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


_CONVERT: dict[str, Callable[[Any], Any]] = {"text": _text, "id": _id, "number": _number}


def _lines(part: Part, fetched: Fetched) -> Iterator[bytes]:
    if part.start == 0 and part.end == part.file.size:
        yield from split(blocks.content(part.file, fetched), part.file.uri)
        return
    # The preceding byte shows whether a line starts at `start`. The last line may extend beyond `end`.
    position = max(0, part.start - 1)
    found = split(blocks.ranged(part.file.uri, position, part.file.size, fetched), part.file.uri)
    for number, line in enumerate(found):
        if number or not part.start:
            yield line
        position += len(line) + 1
        if position >= part.end:
            return


def split(content: Iterator[bytes], uri: str) -> Iterator[bytes]:
    """Yields the lines of a file, without their line breaks. Raises DataError for a line above LONGEST_LINE_BYTES."""
    pending = b""
    for block in content:
        pieces = (pending + block).split(b"\n")
        pending = pieces.pop()
        yield from pieces
        if len(pending) > LONGEST_LINE_BYTES:
            raise DataError(
                f"{uri}: a line is longer than {LONGEST_LINE_BYTES} bytes; "
                "JSON lines have one document per line: check that the file is of that kind"
            )
    if pending:
        yield pending
