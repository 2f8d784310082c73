"""Reads sizes and byte ranges of source files at https:// addresses.

Each read is one request, which huggingface_hub retries. A server that ignores ranges sends whole files. In this case,
small files are kept in memory, and large files are refused.
"""

from functools import lru_cache
from shlex import quote
from typing import Any

from core.errors import ObjectNotFound, StorageError

TIMEOUT_SECONDS = 60.0
# Largest file to keep in memory if its server does not support ranges.
WHOLE_BYTES = 256 << 20


def size_of(uri: str) -> int:
    """Size of a file in bytes. Raises StorageError, ObjectNotFound."""
    whole, data = _get(uri, 0, 1)
    return len(data) if whole is None else whole


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file. Raises StorageError, ObjectNotFound."""
    if end <= start:
        return b""
    whole, data = _get(uri, start, end)
    found = data[start:end] if whole is None else data
    if len(found) != end - start:
        raise StorageError(
            f"{uri}: the server sent {len(found)} of {end - start} bytes from {start}; the file has changed or the "
            "connection broke: run the same command again"
        )
    return found


def _get(uri: str, start: int, end: int) -> tuple[int | None, bytes]:
    """Returns the file's size and the range, or None and the whole file from a server that ignores ranges."""
    if uri in _no_ranges:
        return None, _whole(uri)
    with _answer(uri, {"Range": f"bytes={start}-{end - 1}"}) as answer:
        if answer.status_code == 206:
            return int(answer.headers["Content-Range"].rpartition("/")[2]), answer.read()
    _no_ranges.add(uri)
    return None, _whole(uri)


_no_ranges: set[str] = set()


@lru_cache(maxsize=2)
def _whole(uri: str) -> bytes:
    pieces, size = [], 0
    with _answer(uri, {}) as answer:
        for piece in answer.iter_bytes():
            size += len(piece)
            if size > WHOLE_BYTES:
                raise StorageError(
                    f"{uri}: is larger than {WHOLE_BYTES} bytes, and its server sends no byte ranges; "
                    f"download it (curl -LO {quote(uri)}) and give the local file"
                )
            pieces.append(piece)
    return b"".join(pieces)


class _answer:
    """Context manager of a server's response. Raises StorageError or ObjectNotFound if the server refuses."""

    def __init__(self, uri: str, headers: dict[str, str]):
        from huggingface_hub.utils import http_stream_backoff

        self._uri = uri
        # Without this header a server may send a range of the compressed bytes, which would be useless.
        headers = headers | {"Accept-Encoding": "identity"}
        self._stream = http_stream_backoff("GET", uri, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True)

    def __enter__(self) -> Any:
        try:
            answer = self._stream.__enter__()
        except Exception as error:
            said = " ".join(str(error).split())[:160] or type(error).__name__
            raise StorageError(f"{self._uri}: could not read ({said}); check the address and the network") from error
        if answer.status_code in (200, 206):
            return answer
        self._stream.__exit__(None, None, None)
        if answer.status_code == 404:
            raise ObjectNotFound(f"{self._uri}: not found; check the URL")
        raise StorageError(
            f"{self._uri}: could not read (the server answers {answer.status_code}); check the address, "
            "or download the file and give the local copy"
        )

    def __exit__(self, *error: Any) -> None:
        self._stream.__exit__(*error)
