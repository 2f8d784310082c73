"""Byte-pair vocabularies: read, check, store beside the shards, and open with tiktoken.

The stored form is tiktoken's rank file (one line per token: base64 of its bytes, a space, its rank), which any
tiktoken loads. The GPT-2 merges file (`vocab.bpe`) is read too, because that is how OpenAI publishes it.
"""

import base64
import binascii
import functools
import hashlib
from dataclasses import dataclass, field

from core import storage
from core.errors import DataError

# tiktoken's own pattern for GPT-2, in the possessive form that it runs fastest with.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_VOCAB_SIZE = 50257
GPT2_END_OF_TEXT = 50256
FILE_NAME = "tokenizer/gpt2.tiktoken"
# SHA-256 of the rank file that `rank_file` makes of OpenAI's vocab.bpe.
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


@dataclass(frozen=True)
class Vocabulary:
    """GPT-2's ranks; `stored` is the stored form, a tiktoken rank file."""

    stored: bytes = field(repr=False)

    @property
    def sha256(self) -> str:
        """Of the stored form."""
        return GPT2_SHA256

    @functools.cached_property
    def ranks(self) -> dict[bytes, int]:
        """The bytes of a token → its id."""
        return _ranks_of_rank_file(self.stored, "the vocabulary")

    def encoding(self):
        """The tiktoken encoding of these ranks (tiktoken is imported here)."""
        return self._encoding

    @functools.cached_property
    def _encoding(self):
        import tiktoken

        return tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=self.ranks,
            special_tokens={"<|endoftext|>": GPT2_END_OF_TEXT},
            explicit_n_vocab=GPT2_VOCAB_SIZE,
        )


@functools.lru_cache(maxsize=2)
def parse(data: bytes, where: str) -> Vocabulary:
    """Ranks from a rank file or from GPT-2's vocab.bpe. Raises DataError unless they are exactly GPT-2's."""
    if hashlib.sha256(data).hexdigest() == GPT2_SHA256:
        return Vocabulary(data)
    ranks = _ranks_of_merges(data) if data.startswith(b"#version") else _ranks_of_rank_file(data, where)
    stored = rank_file(ranks)
    sha256 = hashlib.sha256(stored).hexdigest()
    if sha256 != GPT2_SHA256:
        raise DataError(
            f"{where}: {len(ranks)} ranks with checksum {sha256[:12]}…, "
            f"GPT-2's are {GPT2_VOCAB_SIZE - 1} with {GPT2_SHA256[:12]}…; "
            "give OpenAI's vocab.bpe or the tokenizer file of a prepared data set"
        )
    return Vocabulary(stored)


def read(uri: str) -> Vocabulary:
    """Load and check a vocabulary file. Raises ObjectNotFound, DataError."""
    return parse(storage.read_bytes(uri), uri)


def rank_file(ranks: dict[bytes, int]) -> bytes:
    """The stored form."""
    return b"".join(
        base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    )


def _ranks_of_rank_file(data: bytes, where: str) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{where}: line {number} is no token rank; give OpenAI's vocab.bpe or a tiktoken rank file"
            ) from None
    return ranks


def _ranks_of_merges(data: bytes) -> dict[bytes, int]:
    """GPT-2's merges are written with stand-ins for unprintable bytes (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    stand_ins = {chr(byte): byte for byte in printable}
    order = list(printable)
    for byte in range(256):
        if byte not in printable:
            stand_ins[chr(256 + len(order) - len(printable))] = byte
            order.append(byte)
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
    for line in data.decode().splitlines()[1:]:
        if line:
            ranks[b"".join(bytes(stand_ins[character] for character in half) for half in line.split(" "))] = len(ranks)
    return ranks
