"""Encodes text as GPT-2 token ids. The engine is gigatoken, or tiktoken on platforms without a wheel of gigatoken.

tiktoken is the reference. Both engines treat all characters of a document as ordinary text. "<|endoftext|>" in a
document becomes the seven tokens of its spelling, and never the token 50256. Only the shard writer adds that token.

The input is an Arrow array, the output one flat array of ids. The fast path creates no Python strings. gigatoken gets
one document per call, because its batch calls are not faster for web pages and need the package awkward, which takes
0.3 s to import.
"""

import logging
import os
import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from core.data.vocabulary import Vocabulary
from core.errors import ConfigError, DataError
from data_prep.sources.documents import buffers

log = logging.getLogger(__name__)

# gigatoken caches every distinct word: 20 MB of random words take 120 MB. If the process takes more than
# RENEW_RESIDENT_BYTES, a new tokenizer replaces the old one in 0.05 s. A new tokenizer has an empty cache and is three
# times slower, so a tokenizer is kept for at least RENEW_TEXT_BYTES of text.
RENEW_RESIDENT_BYTES = 640 << 20
RENEW_TEXT_BYTES = 64 << 20

# At the start of each part, a check compares both engines on CHECK_SHARE of the part's source bytes, but at least on
# CHECK_LEAST_BYTES and at most on CHECK_BYTES.
CHECK_BYTES = 256 << 10
CHECK_LEAST_BYTES = 64 << 10
CHECK_SHARE = 1 / 128
# Long documents are skipped: many short documents test more, and tiktoken takes a second for some words of a megabyte.
CHECK_DOCUMENT_BYTES = 100 << 10


class Engine(Protocol):
    name: str

    def encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all documents, flat (uint16), and the offsets of the N documents, (N + 1,), int64.

        Texts must be valid UTF-8 without nulls.
        """


def open_engine(choice: str, vocabulary: Vocabulary) -> Engine:
    """Opens the engine that `tokenizer.engine` names. Raises ConfigError if gigatoken is required but missing."""
    if choice == "tiktoken":
        return TiktokenEngine(vocabulary)
    try:
        return GigatokenEngine(vocabulary)
    except ImportError as error:
        if choice == "gigatoken":
            raise ConfigError(
                f"tokenizer.engine is gigatoken, which cannot be imported here ({error}); "
                "run `pip install gigatoken`, or set --tokenizer.engine=tiktoken"
            ) from error
        log.warning("gigatoken has no wheel for this platform: encoding with tiktoken, about 20 times slower")
        return TiktokenEngine(vocabulary)


class TiktokenEngine:
    """The reference engine (openai/tiktoken, `encode_ordinary`)."""

    name = "tiktoken"

    def __init__(self, vocabulary: Vocabulary):
        self._encoding = vocabulary.encoding()

    def encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        return _flat([self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts.to_pylist()])


class GigatokenEngine:
    """The engine gigatoken on one thread. Worker processes encode several parts in parallel."""

    name = "gigatoken"

    def __init__(self, vocabulary: Vocabulary):
        from gigatoken.gigatoken_rs import BPETokenizer

        self._load = BPETokenizer.from_tiktoken
        self._rank_file = vocabulary.stored
        self._fresh()

    def encode(self, texts: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
        encode = self._tokenizer.encode
        flat = _flat([encode(bytes(text)) for text in buffers(texts)])
        self._text_bytes += texts.nbytes
        if self._text_bytes > RENEW_TEXT_BYTES and resident_bytes() > RENEW_RESIDENT_BYTES:
            self._fresh()
        return flat

    def _fresh(self) -> None:
        self._tokenizer = None  # free the old tokenizer before the new one is made
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "gpt2.tiktoken")
            path.write_bytes(self._rank_file)
            # No special tokens are given, because "<|endoftext|>" in a document must stay text.
            self._tokenizer = self._load(path, "gpt2", None)
        self._text_bytes = 0


class Check:
    """Compares an engine with tiktoken on the first documents of a part."""

    def __init__(self, vocabulary: Vocabulary):
        self._reference = TiktokenEngine(vocabulary)
        self._left = 0

    def restart(self, part_bytes: int) -> None:
        """Starts the check of a part that has `part_bytes` source bytes."""
        self._left = min(CHECK_BYTES, max(CHECK_LEAST_BYTES, int(part_bytes * CHECK_SHARE)))

    def compare(self, texts: pa.LargeStringArray, ids: np.ndarray, offsets: np.ndarray, where: str) -> None:
        """Raises DataError if the ids of a document differ from tiktoken's."""
        for number in range(len(texts)):
            if self._left <= 0:
                return
            one = texts.slice(number, 1)
            length = len(one[0].as_buffer())
            if length > CHECK_DOCUMENT_BYTES:
                continue
            self._left -= length
            if not np.array_equal(self._reference.encode(one)[0], ids[offsets[number] : offsets[number + 1]]):
                text = one[0].as_py()
                raise DataError(
                    f"{where}: the fast tokenizer and tiktoken disagree on the document that starts {text[:60]!r}; "
                    "nothing of this part was stored: run again with --tokenizer.engine=tiktoken"
                )


def _flat(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Joins the ids (uint32) of N documents: flat ids (uint16) and offsets, (N + 1,), int64."""
    offsets = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(document) for document in documents], out=offsets[1:])
    ids = np.empty(offsets[-1], np.uint16)
    if documents:
        np.concatenate(documents, out=ids, casting="unsafe")
    return ids, offsets


def resident_bytes() -> int:
    """Resident memory of this process in bytes. It is 0 on systems without /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
