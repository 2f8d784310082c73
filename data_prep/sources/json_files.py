"""Reads .json files.

If the first line is an object, the file is read as JSON lines, else as one document by `datasets`.
"""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import pyarrow as pa

from core.errors import DataError
from core.settings.preparation import SourceConfig
from data_prep.sources import blocks, lines, streamed
from data_prep.sources.files import Fetched, Part, SourceFile

LARGEST_DOCUMENT_BYTES = 128 << 20
# Assumed compression ratio of JSON.
PACKED_RATIO = 8


def schema_of(file: SourceFile, source: SourceConfig) -> pa.Schema:
    return (lines if _has_lines(file) else streamed).schema_of(file, source)


def read(part: Part, source: SourceConfig, columns: Mapping[str, str], fetched: Fetched) -> Iterator[pa.RecordBatch]:
    return (lines if _has_lines(part.file) else streamed).read(part, source, columns, fetched)


@lru_cache(maxsize=4)
def _has_lines(file: SourceFile) -> bool:
    start = blocks.head(file).lstrip()
    first, separator, _ = start.partition(b"\n")
    # The file has JSON lines if its first line is an object, or is longer than the block that was read.
    if start.startswith(b"{") and (not separator or lines.is_object(first)):
        return True
    limit = LARGEST_DOCUMENT_BYTES // (PACKED_RATIO if blocks.compression_of(file.uri) else 1)
    if file.size > limit:
        raise DataError(
            f"{file.uri}: is one JSON document, which is read whole, of {file.size} bytes, more than {limit}; "
            "write it as JSON lines: jq -c '.[]' FILE.json > FILE.jsonl"
        )
    return False
