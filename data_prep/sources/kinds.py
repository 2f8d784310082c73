"""How each kind of source file is read. A new kind is a row here."""

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
    """Files whose names end in one of `suffixes`.

    `divisible` files are cut into parts, others are one each. `columns` are the same for all rows (`fixed`), may differ
    from row to row (`by row`), or `none`. `read` gives the columns that are asked for, which are mapped to what they
    hold: `text`, `id` or `number`.
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
    SourceKind((".jsonl.gz", ".jsonl.zst"), False, "by row", lines.schema_of, lines.read),
    SourceKind((".json", ".json.gz", ".json.zst"), False, "by row", json.schema_of, json.read),
    SourceKind((".txt", ".txt.gz", ".txt.zst"), False, "none", text.schema_of, text.read),
    _STREAMED,
)
SUFFIXES = tuple(suffix for kind in KINDS for suffix in kind.suffixes)


def of_name(uri: str) -> SourceKind | None:
    """The kind that the ending of a file's name says."""
    return next((kind for kind in KINDS if has_suffix(uri, kind.suffixes)), None)


def kind_of(file: SourceFile) -> SourceKind:
    """Raises DataError for a file that nothing here can read."""
    kind = _STREAMED if file.reader else of_name(file.uri)
    if kind is None:
        raise DataError(f"{file.uri}: unknown kind of source; give files that end in {', '.join(SUFFIXES)}")
    return kind
