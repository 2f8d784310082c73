"""Reads source files from front to back: fetches blocks ahead of the reader and decompresses them."""

import contextlib
import io
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from core.errors import DataError
from data_prep.sources.files import Fetched, SourceFile, has_suffix, read_range

BLOCK_BYTES = 8 << 20
BLOCKS_AHEAD = 3
HEAD_BYTES = 1 << 20
SAMPLE_BYTES = 256 << 10
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}


def compression_of(uri: str) -> str | None:
    """Arrow's name of a file's compression, or None."""
    return next((kind for suffix, kind in COMPRESSIONS.items() if has_suffix(uri, (suffix,))), None)


def ranged(uri: str, start: int, end: int, fetched: Fetched) -> Generator[bytes, None, None]:
    """Yields the blocks of a byte range in order and fetches BLOCKS_AHEAD of them in advance."""
    ranges = ((at, min(end, at + BLOCK_BYTES)) for at in range(start, end, BLOCK_BYTES))
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(BLOCKS_AHEAD, thread_name_prefix="fetch") as pool:
        try:
            for each in ranges:
                waiting.append(pool.submit(read_range, uri, *each))
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


def content(file: SourceFile, fetched: Fetched) -> Generator[bytes, None, None]:
    """Yields the blocks of a whole file, decompressed according to its suffix. Raises DataError for a damaged file."""
    raw = ranged(file.uri, 0, file.size, fetched)
    kind = compression_of(file.uri)
    if kind is None:
        yield from raw
        return
    try:
        with Stream(raw) as packed, pa.CompressedInputStream(pa.PythonFile(packed, mode="r"), kind) as plain:
            while block := plain.read(BLOCK_BYTES):
                yield block
    except (pa.ArrowException, OSError) as error:
        raise _undecodable(file, kind, error) from error


def _undecodable(file: SourceFile, kind: str, error: Exception) -> DataError:
    said = f"{file.uri}: cannot be decompressed ({' '.join(str(error).split())[:160]}); "
    if read_range(file.uri, 0, min(file.size, len(MAGIC[kind]))) != MAGIC[kind]:
        return DataError(said + f"it does not begin as {kind} does: copy it again, or give it the suffix of its format")
    return DataError(said + "the file is damaged or truncated: copy it again, then run the same command")


def head(file: SourceFile) -> bytes:
    """The first block of a file, decompressed."""
    if compression_of(file.uri):
        with contextlib.closing(content(file, _uncounted)) as found:
            return next(found, b"")
    return read_range(file.uri, 0, min(file.size, HEAD_BYTES))


def sample(file: SourceFile) -> bytes:
    """The beginning of a file, decompressed: at least the first line of most files. Reads at most HEAD_BYTES.

    The result is empty if these bytes contain no complete compressed block. Raises DataError for a small damaged file.
    """
    if not (kind := compression_of(file.uri)):
        return read_range(file.uri, 0, min(file.size, SAMPLE_BYTES))
    if file.size <= HEAD_BYTES:
        return head(file)
    packed = read_range(file.uri, 0, HEAD_BYTES)
    try:
        with pa.CompressedInputStream(pa.BufferReader(packed), kind) as plain:
            return plain.read(SAMPLE_BYTES)
    except (pa.ArrowException, OSError) as error:
        if not packed.startswith(MAGIC[kind]):
            raise _undecodable(file, kind, error) from error
        return b""


def _uncounted(count: int) -> None:
    pass


class Stream(io.RawIOBase):
    """A file object that reads the blocks of a generator from front to back."""

    def __init__(self, blocks: Generator[bytes, None, None]):
        self._blocks = blocks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Stops the fetching threads.

        The caller must close the stream, because the garbage collector may run in one of these threads, which would
        then wait for itself.
        """
        self._blocks.close()
        super().close()

    def read(self, count: int = -1) -> bytes:
        if count < 0:
            return self.readall()
        if not self._rest:
            self._rest = memoryview(next(self._blocks, b""))
        piece, self._rest = self._rest[:count], self._rest[count:]
        return bytes(piece)

    def readall(self) -> bytes:
        whole = bytes(self._rest) + b"".join(self._blocks)
        self._rest = memoryview(b"")
        return whole

    def readinto(self, buffer: memoryview) -> int:
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


class SeekableStream(Stream):
    """A seekable file for mostly sequential reading. A seek to another position discards the fetched blocks.

    After each read, `reached` is called with the new position.
    """

    def __init__(self, file: SourceFile, reached: Callable[[int], None]):
        super().__init__(ranged(file.uri, 0, file.size, _uncounted))
        self._file = file
        self._reached = reached
        self._at = 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        if 0 <= target - self._at <= len(self._rest):
            self._rest = self._rest[target - self._at :]
            self._at = target
        else:
            self._move_to(target)
        return target

    def read(self, count: int = -1) -> bytes:
        piece = super().read(count)
        self._at += len(piece)
        self._reached(self._at)
        return piece

    def _move_to(self, position: int) -> None:
        self._blocks.close()
        self._at = position
        self._rest = memoryview(b"")
        self._blocks = ranged(self._file.uri, position, self._file.size, _uncounted)
