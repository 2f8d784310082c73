"""Lists the kinds of source files and their readers. A new kind is a row of KINDS."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from core.errors import DataError
from core.settings.preparation import SourceConfig
from data_prep.sources import json_files as json
from data_prep.sources import lines, parquet, streamed, text
from data_prep.sources.files import Fetched, Part, SourceFile, has_suffix


@dataclass(frozen=True)
class SourceKind:
    """A kind of source file, recognized by `suffixes`.

    `divisible` files are cut into parts. Any other file is one part. `columns` is `fixed` if all rows have the same
    columns, `by row` if they may differ between rows, and `none` if there are no columns. `read` yields the requested
    columns. The third argument of `read` maps these columns to their content: `text`, `id` or `number`.
    """

    suffixes: tuple[str, ...]
    divisible: bool
    columns: Literal["fixed", "by row", "none"]
    schema: Callable[[SourceFile, SourceConfig], pa.Schema]
    read: Callable[[Part, SourceConfig, Mapping[str, str], Fetched], Iterator[pa.RecordBatch]]


_STREAMED = SourceKind(
    (".csv", ".csv.gz", ".csv.zst", ".tsv", ".tsv.gz", ".tsv.zst", ".arrow", ".tar"),
    False,
    "fixed",
    streamed.schema_of,
    streamed.read,
)
KINDS = (
    SourceKind((".parquet",), True, "fixed", parquet.schema_of, parquet.read),
    SourceKind((".jsonl", ".ndjson"), True, "by row", lines.schema_of, lines.read),
    SourceKind((".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst"), False, "by row", lines.schema_of, lines.read),
    SourceKind((".json", ".json.gz", ".json.zst"), False, "by row", json.schema_of, json.read),
    SourceKind((".txt", ".txt.gz", ".txt.zst"), False, "none", text.schema_of, text.read),
    _STREAMED,
)
SUFFIXES = tuple(suffix for kind in KINDS for suffix in kind.suffixes)


def of_name(uri: str) -> SourceKind | None:
    """The kind of a file by its suffix, or None."""
    return next((kind for kind in KINDS if has_suffix(uri, kind.suffixes)), None)


def is_streamed(file: SourceFile) -> bool:
    """Whether `datasets` reads a file."""
    return kind_of(file) is _STREAMED


def is_text(file: SourceFile) -> bool:
    """Whether a file is plain text. The ids of its documents contain its name."""
    return not file.reader and (kind := of_name(file.uri)) is not None and kind.read is text.read


def kind_of(file: SourceFile) -> SourceKind:
    """The kind of a file. Raises DataError for an unknown kind."""
    kind = _STREAMED if file.reader else of_name(file.uri)
    if kind is None:
        raise DataError(f"{file.uri}: unknown kind of source; give files that end in {', '.join(SUFFIXES)}")
    return kind
