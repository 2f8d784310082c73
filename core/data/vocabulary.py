"""Reads, checks and stores GPT-2's byte-pair vocabulary, and opens it with tiktoken.

The stored form is tiktoken's rank file. It has one line per token: the base64 of the token's bytes, a space, and the
token's rank. OpenAI publishes the vocabulary in another form, the merges file `vocab.bpe`. This module reads both.
"""

import base64
import binascii
import functools
import hashlib
from dataclasses import dataclass, field

from core import storage
from core.errors import ConfigError, DataError, ObjectNotFound

# tiktoken's pattern for GPT-2, written with possessive quantifiers, because tiktoken matches these fastest.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_VOCAB_SIZE = 50257
GPT2_END_OF_TEXT = 50256
LARGEST_BYTES = 64 << 20  # GPT-2's file has 0.8 MB
FILE_NAME = "tokenizer/gpt2.tiktoken"
# SHA-256 of the rank file that `rank_file` writes for OpenAI's vocab.bpe.
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


@dataclass(frozen=True)
class Vocabulary:
    """GPT-2's vocabulary. `stored` is a tiktoken rank file."""

    stored: bytes = field(repr=False)

    @property
    def sha256(self) -> str:
        """SHA-256 of the stored form."""
        return GPT2_SHA256

    @functools.cached_property
    def ranks(self) -> dict[bytes, int]:
        """The id of each token, by the token's bytes."""
        return _ranks_of_rank_file(self.stored, "the vocabulary")

    def encoding(self):
        """The tiktoken encoding. The first call imports tiktoken."""
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


_parsed: dict[str, Vocabulary] = {}  # GPT-2's vocabulary, by the SHA-256 of each file from which it was read


def parse(data: bytes, where: str) -> Vocabulary:
    """Reads a rank file or GPT-2's vocab.bpe. Raises DataError for any vocabulary other than GPT-2's."""
    digest = hashlib.sha256(data).hexdigest()
    if digest not in _parsed:
        stored = data if digest == GPT2_SHA256 else _as_rank_file(data, where)
        _parsed[digest] = _parsed.setdefault(GPT2_SHA256, Vocabulary(stored))
    return _parsed[digest]


def _as_rank_file(data: bytes, where: str) -> bytes:
    """The stored form of GPT-2's vocabulary. Raises DataError for any other vocabulary."""
    ranks = _ranks_of_merges(data, where) if data.startswith(b"#version") else _ranks_of_rank_file(data, where)
    stored = rank_file(ranks)
    sha256 = hashlib.sha256(stored).hexdigest()
    if sha256 != GPT2_SHA256:
        raise DataError(
            f"{where}: {len(ranks)} ranks with checksum {sha256[:12]}…, "
            f"GPT-2's are {GPT2_VOCAB_SIZE - 1} with {GPT2_SHA256[:12]}…; "
            "give OpenAI's vocab.bpe or the tokenizer file of a prepared data set"
        )
    return stored


def read(uri: str) -> Vocabulary:
    """Reads and checks a vocabulary file. Raises ObjectNotFound, DataError."""
    return parse(storage.read_bytes(uri, LARGEST_BYTES), uri)


def store_vocabulary(vocab_url: str, data_url: str) -> str:
    """Stores the vocabulary below `data_url` unless it is there. Returns its URI.

    If `vocab_url` is empty, tiktoken downloads the vocabulary. Raises ConfigError, DataError.
    """
    uri = storage.join(data_url, FILE_NAME)
    try:
        read(uri)
    except ObjectNotFound:
        storage.write_bytes(uri, elsewhere(vocab_url).stored)
    return uri


def elsewhere(vocab_url: str) -> Vocabulary:
    """The vocabulary at `vocab_url`. If `vocab_url` is empty, tiktoken downloads the vocabulary.

    Raises ConfigError, DataError.
    """
    return read(vocab_url) if vocab_url else _from_tiktoken()


def _from_tiktoken() -> Vocabulary:
    import tiktoken

    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # tiktoken raises the errors of its HTTP library
        raise ConfigError(
            "tokenizer.vocab_url is empty and tiktoken could not download GPT-2's vocabulary "
            f"({type(error).__name__}); set it (or VOCAB_URL) to a copy of vocab.bpe"
        ) from error
    return parse(rank_file(ranks), "tiktoken's gpt2")


def rank_file(ranks: dict[bytes, int]) -> bytes:
    """The content of a tiktoken rank file with these ranks."""
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
                f"{where}: line {number} is not a token rank; give OpenAI's vocab.bpe or a tiktoken rank file"
            ) from None
    return ranks


def _ranks_of_merges(data: bytes, where: str) -> dict[bytes, int]:
    """Ranks of vocab.bpe, which spells each byte as a printable character (openai/gpt-2, bytes_to_unicode)."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    stand_ins = {chr(byte): byte for byte in printable}
    order = list(printable)
    for byte in range(256):
        if byte not in printable:
            stand_ins[chr(256 + len(order) - len(printable))] = byte
            order.append(byte)
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}
    try:
        for line in data.decode().splitlines()[1:]:
            if line:
                halves = (bytes(stand_ins[character] for character in half) for half in line.split(" "))
                ranks[b"".join(halves)] = len(ranks)
    except (KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: line {len(ranks) - 254} spells no byte pair; give OpenAI's vocab.bpe") from error
    return ranks
