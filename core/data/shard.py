"""Writes and parses token shards: a header of 1024 bytes, then little-endian tokens.

The header has llm.c's format (256 int32: magic 20240520, version 1, token count), so llm.c, build-nanogpt and
modded-nanogpt can read the files. The fourth field, zero in llm.c, holds the bits per token. docs/formats.md documents
the fields.
"""

from dataclasses import dataclass

import numpy as np

from core.errors import DataError

HEADER_BYTES = 1024
MAGIC = 20240520
VERSION = 1
MAX_TOKENS = 2**31 - 1  # the header holds the count as an int32
DTYPES = {16: np.dtype("<u2"), 32: np.dtype("<u4")}


@dataclass(frozen=True)
class ShardHeader:
    """The two fields of a shard's header that differ between shards: the number of tokens, and the bits per token."""

    tokens: int
    bits: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.bits]

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.tokens * self.dtype.itemsize


def header_bytes(tokens: int, bits: int = 16) -> bytes:
    """The header of a shard with `tokens` tokens of `bits` bits."""
    if not 0 < tokens <= MAX_TOKENS or bits not in DTYPES:
        raise ValueError(f"a shard holds 1 to {MAX_TOKENS} tokens of 16 or 32 bits, not {tokens} of {bits}")
    fields = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    fields[:4] = MAGIC, VERSION, tokens, bits
    return fields.tobytes()


def shard_bytes(tokens: np.ndarray) -> bytes:
    """A whole shard with the tokens of a one-dimensional uint16 or uint32 array."""
    if tokens.ndim != 1 or tokens.dtype not in DTYPES.values():
        raise ValueError(f"tokens must be one-dimensional uint16 or uint32, not {tokens.dtype} of shape {tokens.shape}")
    return header_bytes(len(tokens), tokens.dtype.itemsize * 8) + tokens.tobytes()


def parse_header(data: bytes, where: str) -> ShardHeader:
    """Parses the first 1024 bytes of the shard at the URI `where`. Raises DataError."""
    if len(data) < HEADER_BYTES:
        raise DataError(
            f"{where}: only {len(data)} bytes, a shard starts with a header of {HEADER_BYTES}; "
            "delete the set and prepare it again"
        )
    fields = np.frombuffer(data[:HEADER_BYTES], dtype="<i4")
    magic, version, tokens, bits = (int(field) for field in fields[:4])
    if magic != MAGIC:
        raise DataError(f"{where}: magic number is {magic}, a token shard has {MAGIC}; it is not a token shard")
    if version != VERSION:
        raise DataError(
            f"{where}: shard version {version} is not {VERSION}; "
            "it was written by another release: use that release, or delete the set and prepare it again"
        )
    if bits not in DTYPES or tokens < 1:
        raise DataError(f"{where}: header says {tokens} tokens of {bits} bits; delete the set and prepare it again")
    return ShardHeader(tokens, bits)


def check_size(header: ShardHeader, size: int, where: str) -> None:
    """Raises DataError if the size of an object does not match its header."""
    if size != header.file_bytes:
        raise DataError(
            f"{where}: {size} bytes, but its header promises {header.tokens} tokens, "
            f"which take {header.file_bytes}; delete the set and prepare it again"
        )
