"""Reads the documents of a part as Arrow batches of valid text. Each document gets a 128-bit key.

The key is a keyed hash of the document's id. The upper half of the key decides the split, and the lower half decides
the position in the shuffle. So the split and the shuffle depend neither on the order of the documents nor on the number
of workers and nodes.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.errors import DataError
from core.settings.preparation import FilterConfig, SourceConfig
from data_prep.sources import chat, columns, kinds
from data_prep.sources.files import Fetched, Part

KEY_BYTES = 16
# Within a part, the share of bad rows is checked once this number of rows is read. The share is checked again for the
# whole dataset.
JUDGED_ROWS = 1000


@dataclass(frozen=True)
class Batch:
    """Texts without nulls, and their keys, (N, 2), uint64.

    Column 0 of the keys decides the split, and column 1 the order.
    """

    texts: pa.LargeStringArray
    keys: np.ndarray

    def only(self, mask: np.ndarray) -> "Batch":
        return Batch(self.texts.filter(pa.array(mask)), self.keys[mask])

    @property
    def text_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of each text, (N,), int64."""
        return np.diff(offsets_of(self.texts))


def read(
    part: Part,
    source: SourceConfig,
    keep: FilterConfig,
    seed: int,
    dropped: Counter,
    fetched: Fetched,
) -> Iterator[Batch]:
    """Yields the documents of a part that pass the row filters, in order.

    Counts the other documents in `dropped` by reason. Raises DataError if more than `source.max_bad_share` of the rows
    are bad.
    """
    columns.check(part.file, source, keep)
    rows = 0
    for batch in kinds.kind_of(part.file).read(part, source, columns.wanted(source, keep), fetched):
        rows += batch.num_rows
        yield _documents(batch, source, keep, seed, dropped)
        if rows >= JUDGED_ROWS:
            _judge(part, rows, dropped["bad"], source)


def _documents(batch: pa.RecordBatch, source: SourceConfig, keep: FilterConfig, seed: int, dropped: Counter) -> Batch:
    texts = batch.column(source.text_column)
    texts = chat.texts_of(texts) if chat.is_chat(texts.type) else _as_text(texts)
    ids = _as_text(batch.column(source.id_column)) if source.id_column else None
    good = _valid(texts)
    if ids is not None and ids.null_count:
        good = pc.and_(good, pc.is_valid(ids))
    dropped["bad"] += len(good) - good.true_count
    for reason, passes in _filters(batch, keep):
        passes = pc.fill_null(passes, False)
        dropped[reason] += pc.and_not(good, passes).true_count
        good = pc.and_(good, passes)
    if good.true_count < len(good):
        texts = texts.filter(good)
        ids = ids.filter(good) if ids is not None else None
    return Batch(texts, _keys(ids if ids is not None else texts, seed))


def _as_text(values: pa.Array) -> pa.LargeStringArray:
    """The values as text. Bytes are not checked here: `_valid` finds values that are not UTF-8."""
    return pc.cast(values, options=pc.CastOptions(pa.large_string(), allow_invalid_utf8=True))


def _valid(texts: pa.LargeStringArray) -> pa.BooleanArray:
    """Mask of the rows with text. Parquet files may contain text that is not valid UTF-8."""
    good = pc.is_valid(texts)
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        good = pa.array([valid and _is_utf8(texts[row]) for row, valid in enumerate(good.to_pylist())])
    return good


def _is_utf8(text: pa.LargeStringScalar) -> bool:
    try:
        text.as_py()
    except UnicodeDecodeError:
        return False
    return True


def _filters(batch: pa.RecordBatch, keep: FilterConfig) -> Iterator[tuple[str, pa.BooleanArray]]:
    # The column is cast first, because Arrow can compare neither half floats nor views of strings.
    if keep.min_score is not None:
        yield "low_score", pc.greater_equal(batch.column(keep.score_column).cast(pa.float64()), keep.min_score)
    if keep.languages:
        languages = _as_text(batch.column(keep.language_column))
        yield "language", pc.is_in(languages, pa.array(keep.languages, pa.large_string()))


def _keys(values: pa.LargeStringArray, seed: int) -> np.ndarray:
    """Keyed hashes of the values, (N, 2), uint64."""
    keyed = hashlib.blake2b(digest_size=KEY_BYTES, key=str(seed).encode())
    digests = []
    for value in buffers(values):
        one = keyed.copy()
        one.update(value)
        digests.append(one.digest())
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)


def _judge(part: Part, rows: int, bad: int, source: SourceConfig) -> None:
    if bad > source.max_bad_share * rows:
        raise DataError(
            f"{part}: {bad} of the first {rows} rows have no text, no id or no valid UTF-8, more than "
            f"source.max_bad_share = {source.max_bad_share:g}; check text_column and id_column, or raise that share"
        )


def offsets_of(values: pa.LargeStringArray) -> np.ndarray:
    """Offsets of the values in the data buffer, (n + 1,), int64, without a copy.

    Arrow's conversions to NumPy import pandas if it is installed, which takes half a second in each worker.
    """
    if not len(values):
        return np.zeros(1, np.int64)
    return np.frombuffer(values.buffers()[1], np.int64)[values.offset : values.offset + len(values) + 1]


def buffers(values: pa.LargeStringArray) -> Iterator[memoryview]:
    """The bytes of each value, without a copy."""
    data = values.buffers()[2]
    whole = memoryview(data) if data is not None else memoryview(b"")
    for start, end in pairwise(offsets_of(values).tolist()):
        yield whole[start:end]
