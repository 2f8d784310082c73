"""Reads a part of a parquet file as Arrow record batches, in bounded memory, with downloads ahead of decoding.

Fetches only the needed column chunks, with range reads that join adjacent chunks of several row groups. Decoding starts
long before the whole file has arrived. Row groups of any size are decoded in slices of a few megabytes.
"""

import io
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from core.errors import DataError
from core.settings.preparation import SourceConfig
from data_prep.sources.files import Fetched, Part, SourceFile, read_range

# Bytes per request. The latency of such a large request does not matter, and a worker's memory is much larger.
FETCH_BYTES = 16 << 20
FETCH_AHEAD = 3
# Ranges with a smaller gap are fetched together: to fetch the unwanted bytes costs less than another request.
GAP_BYTES = 1 << 20
# Decoded bytes per batch.
BATCH_BYTES = 8 << 20
# Rows of the first batch, and the largest factor by which the number of rows grows in one step.
FIRST_ROWS = 64
GROWTH = 16
FOOTER_BYTES = 64 << 10


@dataclass(frozen=True)
class _Group:
    """Row groups to fetch together, and their byte ranges."""

    rows: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        return sum(end - start for start, end in self.ranges)


def schema_of(file: SourceFile, source: SourceConfig | None = None) -> pa.Schema:
    """The Arrow schema in the file's footer. Raises DataError."""
    return _metadata(file.uri, file.size).schema.to_arrow_schema()


def read(
    part: Part, source: SourceConfig | None, columns: Collection[str], fetched: Fetched
) -> Iterator[pa.RecordBatch]:
    """Yields batches of `columns` in file order. Calls `fetched(count)` with the bytes of each group that has arrived.

    Raises DataError for a damaged file, and StorageError for a failed request.
    """
    metadata = _metadata(part.file.uri, part.file.size)
    groups = _groups(metadata, part, columns)
    waiting: deque[tuple[_Group, list[Future]]] = deque()
    with ThreadPoolExecutor(FETCH_AHEAD, thread_name_prefix="fetch") as pool:
        try:
            for group in groups:
                waiting.append((group, [pool.submit(read_range, part.file.uri, *r) for r in group.ranges]))
                if len(waiting) >= FETCH_AHEAD:
                    yield from _decode(*waiting.popleft(), metadata, part, columns, fetched)
            while waiting:
                yield from _decode(*waiting.popleft(), metadata, part, columns, fetched)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@lru_cache(maxsize=4)  # cached, because consecutive parts share a file
def _metadata(uri: str, size: int) -> pq.FileMetaData:
    tail = read_range(uri, max(0, size - FOOTER_BYTES), size)
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < needed <= size:
        tail = read_range(uri, size - needed, size)
    try:
        return pq.read_metadata(pa.BufferReader(tail))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(uri, "its footer", error) from error


def _groups(metadata: pq.FileMetaData, part: Part, columns: Collection[str]) -> Iterator[_Group]:
    wanted = [number for number in range(metadata.num_columns) if _is_of(metadata, number, columns)]
    rows: list[int] = []
    ranges: list[tuple[int, int]] = []
    for number in range(metadata.num_row_groups):
        chunks = sorted(_chunk_range(metadata.row_group(number).column(column)) for column in wanted)
        if not chunks or not part.start <= chunks[0][0] < part.end:
            continue
        rows.append(number)
        ranges = _joined(ranges + chunks)
        if sum(end - start for start, end in ranges) >= FETCH_BYTES:
            yield _Group(tuple(rows), tuple(_cut(ranges)))
            rows, ranges = [], []
    if rows:
        yield _Group(tuple(rows), tuple(_cut(ranges)))


def _is_of(metadata: pq.FileMetaData, number: int, columns: Collection[str]) -> bool:
    """Whether leaf column `number` of the file belongs to one of `columns`.

    The names of leaf columns and of `columns` may contain dots.
    """
    path = metadata.schema.column(number).path
    return any(path == name or path.startswith(f"{name}.") for name in columns)


def _chunk_range(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        start = min(start, chunk.dictionary_page_offset)
    return start, start + chunk.total_compressed_size


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start - joined[-1][1] <= GAP_BYTES:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _cut(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Cuts large ranges, so that the pieces are fetched in parallel and retried separately."""
    for start, end in ranges:
        for at in range(start, end, FETCH_BYTES):
            yield at, min(end, at + FETCH_BYTES)


def _decode(
    group: _Group,
    pieces: list[Future],
    metadata: pq.FileMetaData,
    part: Part,
    columns: Collection[str],
    fetched: Fetched,
) -> Iterator[pa.RecordBatch]:
    spans = _Spans([(r[0], future.result()) for r, future in zip(group.ranges, pieces, strict=True)], part.file.size)
    pieces.clear()
    fetched(group.bytes)
    where = f"row groups {group.rows[0]} to {group.rows[-1]}"
    try:
        file = pq.ParquetFile(pa.PythonFile(spans, mode="r"), metadata=metadata)
        yield from _batches(file, group.rows, columns)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(part.file.uri, where, error) from error


def _batches(file: pq.ParquetFile, groups: Sequence[int], columns: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Yields batches of about BATCH_BYTES of decoded values.

    A small encoded size does not mean a small decoded size, because a dictionary stores a long text once for all rows
    that contain it. So the number of rows per batch follows from the decoded size of earlier batches. Each change of
    this number needs a new reader, which decodes the earlier rows once more.
    """
    rows = min(FIRST_ROWS, _rows_by_encoded_size(file, groups))
    done = 0
    while True:
        found = file.iter_batches(batch_size=rows, row_groups=list(groups), columns=list(columns), use_threads=False)
        at = 0
        for batch in found:
            new = batch.slice(max(0, done - at))
            at += batch.num_rows
            if not new.num_rows:
                continue
            done += new.num_rows
            decoded = new.nbytes / new.num_rows
            yield from _sliced(new)
            wanted = max(1, min(GROWTH * rows, int(BATCH_BYTES / max(1.0, decoded))))
            wanted = min(wanted, _rows_by_encoded_size(file, groups))
            if rows > 4 * wanted or (wanted > 2 * rows and done <= GROWTH * rows):
                rows = wanted
                break
        else:
            return


def _rows_by_encoded_size(file: pq.ParquetFile, groups: Sequence[int]) -> int:
    found = [file.metadata.row_group(number) for number in groups]
    row_bytes = sum(each.total_byte_size for each in found) / max(1, sum(each.num_rows for each in found))
    return max(1, int(BATCH_BYTES / max(1.0, row_bytes)))


def _sliced(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """A batch in pieces of about BATCH_BYTES."""
    rows = max(1, batch.num_rows * BATCH_BYTES // max(1, batch.nbytes))
    return (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _unreadable(uri: str, where: str, error: Exception) -> DataError:
    said = f"{uri}: {where} cannot be read as parquet ({' '.join(str(error).split())[:160]}); "
    if isinstance(error, pa.ArrowNotImplementedError | pa.ArrowTypeError | pa.ArrowKeyError):
        return DataError(said + f"Arrow {pa.__version__} lacks a feature of it: write it again with plain columns")
    if isinstance(error, pa.ArrowMemoryError):
        return DataError(said + "memory is short: run the same command again with fewer --workers")
    return DataError(said + "if another copy fails too, write the file again; then run the same command")


class _Spans(io.RawIOBase):
    """A file object for the parquet reader, with only some of the file's byte ranges in memory."""

    def __init__(self, spans: list[tuple[int, bytes]], size: int):
        self._spans = spans
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        end = self._size if count < 0 else min(self._size, self._at + count)
        found = []
        while self._at < end:
            for start, data in self._spans:
                if start <= self._at < start + len(data):
                    piece = memoryview(data)[self._at - start : end - start]
                    found.append(piece)
                    self._at += len(piece)
                    break
            else:
                raise OSError(f"bytes from {self._at} were not fetched; the file's footer gives wrong offsets")
        return bytes(found[0]) if len(found) == 1 else b"".join(found)
