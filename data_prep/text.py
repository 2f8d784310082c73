"""JSON lines and plain text as Arrow record batches, like those of a parquet file.

A JSON line belongs to the part in whose byte range it starts, so a large file is read by many workers. Compressed
files cannot be entered in the middle: each is one part. A plain text file is one document, its name the id.
A line that is no JSON object, or whose text is no string, becomes a row without text, which is counted as bad.
"""

import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from core import storage
from core.errors import DataError
from data_prep.plan import Part

BLOCK_BYTES = 8 << 20
BLOCKS_AHEAD = 3
# No document of text is that long; a file without line ends must not fill the memory.
LONGEST_LINE_BYTES = 256 << 20


def read_whole(part: Part, columns: Sequence[str], fetched: Callable[[int], None]) -> Iterator[pa.RecordBatch]:
    """One document: the file. The first column is the text, the second (if asked for) the file's name."""
    data = storage.read_bytes(part.file.uri)
    fetched(len(data))
    values = [data, part.file.uri.rsplit("/", 1)[-1].encode()][: len(columns)]
    arrays = [pa.array([value], pa.large_binary()).view(pa.large_string()) for value in values]
    yield pa.RecordBatch.from_arrays(arrays, names=list(columns))


def read_lines(part: Part, columns: Mapping[str, str], fetched: Callable[[int], None]) -> Iterator[pa.RecordBatch]:
    """Batches in file order; `columns` says what each holds (`text`, `id`, `number`), and what does not is null.

    Raises DataError for a damaged compressed file.
    """
    rows: list[dict[str, Any]] = []
    size = 0
    for line in _lines(part, fetched):
        if not line.strip():
            continue
        rows.append(_row(line))
        size += len(line)
        if size >= BLOCK_BYTES:
            yield _batch(rows, columns)
            rows, size = [], 0
    if rows:
        yield _batch(rows, columns)


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError
        return {}
    return row if isinstance(row, dict) else {}


def _batch(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> pa.RecordBatch:
    types = {"number": pa.float64(), "id": pa.large_string(), "text": pa.large_string()}
    arrays = [
        pa.array([_CONVERT[holds](row.get(name)) for row in rows], types[holds]) for name, holds in columns.items()
    ]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:
        # A lone surrogate (JSON can write one) becomes U+FFFD, as in tiktoken.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _id(value: Any) -> str | None:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


_CONVERT: dict[str, Callable[[Any], Any]] = {"text": _text, "id": _id, "number": _number}


def _lines(part: Part, fetched: Callable[[int], None]) -> Iterator[bytes]:
    if part.file.uri.endswith(".jsonl"):
        # The byte before tells whether a line starts at `start`; the last line may end beyond `end`.
        begin = max(0, part.start - 1)
        pending = b""
        position = begin
        skipping = part.start > 0
        for block in _blocks(part.file.uri, begin, part.file.size, fetched):
            pieces = (pending + block).split(b"\n")
            pending = pieces.pop()
            for piece in pieces:
                if not skipping:
                    yield piece
                skipping = False
                position += len(piece) + 1
                if position >= part.end:
                    return
            _check_line(pending, part)
        if pending and not skipping:
            yield pending
        return
    kind = "gzip" if part.file.uri.endswith(".gz") else "zstd"
    stream = _Stream(_blocks(part.file.uri, 0, part.file.size, fetched))
    try:
        with pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), kind) as plain:
            pending = b""
            while block := plain.read(BLOCK_BYTES):
                pieces = (pending + block).split(b"\n")
                pending = pieces.pop()
                yield from pieces
                _check_line(pending, part)
            if pending:
                yield pending
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{part.file.uri}: cannot be decompressed ({' '.join(str(error).split())[:160]}); "
            "the file is damaged or truncated: copy it again, then run the same command"
        ) from error


def _check_line(pending: bytes, part: Part) -> None:
    if len(pending) > LONGEST_LINE_BYTES:
        raise DataError(
            f"{part.file.uri}: a line is longer than {LONGEST_LINE_BYTES} bytes; "
            "JSON lines have one document per line: check that the file is of that kind"
        )


def _blocks(uri: str, start: int, end: int, fetched: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of a range in order, some blocks ahead of the reader."""
    ranges = ((at, min(end, at + BLOCK_BYTES)) for at in range(start, end, BLOCK_BYTES))
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(BLOCKS_AHEAD, thread_name_prefix="fetch") as pool:
        try:
            for each in ranges:
                waiting.append(pool.submit(storage.read_range, uri, *each))
                if len(waiting) >= BLOCKS_AHEAD:
                    block = waiting.popleft().result()
                    fetched(len(block))
                    yield block
            while waiting:
                block = waiting.popleft().result()
                fetched(len(block))
                yield block
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Stream(io.RawIOBase):
    """An iterator of blocks as a file that is read from front to back."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        if not self._rest:
            self._rest = next(self._blocks, b"")
        count = len(self._rest) if count < 0 else count
        piece, self._rest = self._rest[:count], self._rest[count:]
        return piece
