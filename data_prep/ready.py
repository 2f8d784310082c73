"""Import of token shards that others have made: every token checked, cut into our shards, with our manifest.

Reads llm.c's .bin files (magic 20240520 version 1 with uint16, and 20240801 version 7 with uint32), NumPy's .npy,
and plain uint16 .bin without a header. Each shard is one piece of work with its record, so an import that was cut
off continues.
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from core import hub, manifest, storage
from core.console import progress
from core.errors import DataError
from core.manifest import Manifest, ShardEntry, Split
from core.schema_prep import FetchConfig
from core.shard import HEADER_BYTES, MAGIC, header_bytes
from core.vocabulary import GPT2_END_OF_TEXT, GPT2_VOCAB_SIZE
from data_prep import part, plan, words
from data_prep.finalize import GPT2
from data_prep.plan import Plan, SourceFile

log = logging.getLogger(__name__)

SUFFIXES = (".bin", ".npy")
# karpathy/llm.c, dev/data/data_common.py: (magic, version) → token type.
LLMC_HEADERS = {(MAGIC, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}


@dataclass(frozen=True)
class _Tokens:
    """Where the tokens lie in a source file."""

    file: SourceFile
    offset: int
    count: int
    dtype: np.dtype


@dataclass(frozen=True)
class _Piece:
    """One shard to write: tokens [start, end) of a source file."""

    name: str
    source: _Tokens
    start: int
    end: int

    @property
    def record(self) -> str:
        return self.name.removesuffix(".bin").replace("/", "-")


def fetch(config: FetchConfig) -> Manifest:
    """Import what is not imported yet. Raises ConfigError, DataError, StorageError."""
    data_url = config.data.url
    files = {
        split: plan.list_files(plan.pinned(url, config.source.revision, data_url), SUFFIXES)
        for split, url in (("train", config.source.train_url), ("val", config.source.val_url))
        if url
    }
    todo = Plan(plan.identity_of(config), tuple(file for each in files.values() for file in each))
    if plan.claim(todo, data_url):
        log.info("%s is complete already, from the same source: nothing to do", data_url)
        return manifest.read(data_url)
    words.store(config.tokenizer.vocab_url, data_url)
    pieces = {split: list(_pieces(split, each, config.data.shard_tokens)) for split, each in files.items()}
    done = part.done_parts(data_url)
    left = [piece for each in pieces.values() for piece in each if piece.record not in done]
    total = sum((piece.end - piece.start) * piece.source.dtype.itemsize for piece in left)
    with progress("fetch", total, "source bytes") as bar, ThreadPoolExecutor(config.workers) as pool:
        try:
            for piece in pool.map(lambda each: _copy(each, data_url), left):
                bar.advance((piece.end - piece.start) * piece.source.dtype.itemsize)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    splits = {split: _split(each, data_url) for split, each in pieces.items()}
    splits.setdefault("val", Split(0, 0, ()))
    made = Manifest(
        GPT2,
        source={
            "url": config.source.train_url,
            "revision": hub.parse(todo.files[0].uri).revision if config.source.train_url.startswith("hf://") else "",
            "files": len(todo.files),
            "bytes": todo.source_bytes,
            "plan_sha256": todo.sha256,
        },
        split_rule={"rule": "as in the source", "val_url": config.source.val_url},
        splits=splits,
        stats={
            "documents": sum(split.documents for split in splits.values()),
            "tokens": sum(split.tokens for split in splits.values()),
            "dropped": {},
        },
    )
    manifest.write(data_url, made)
    return made


def _pieces(split: str, files: tuple[SourceFile, ...], shard_tokens: int) -> Iterator[_Piece]:
    number = 0
    for file in files:
        tokens = _tokens_of(file)
        for start in range(0, tokens.count, shard_tokens):
            yield _Piece(f"{split}/{number:05d}.bin", tokens, start, min(tokens.count, start + shard_tokens))
            number += 1


def _tokens_of(file: SourceFile) -> _Tokens:
    """Find out of what kind a file is. Raises DataError if its size is not what its header says."""
    head = storage.read_range(file.uri, 0, min(file.size, HEADER_BYTES))
    if file.uri.endswith(".npy"):
        tokens = _npy(file, head)
    else:
        fields = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
        dtype = LLMC_HEADERS.get((fields[0], fields[1]))
        if dtype is None:
            tokens = _Tokens(file, 0, file.size // 2, np.dtype("<u2"))
        else:
            tokens = _Tokens(file, HEADER_BYTES, fields[2], dtype)
    expected = tokens.offset + tokens.count * tokens.dtype.itemsize
    if file.size != expected or not tokens.count:
        raise DataError(
            f"{file.uri}: {file.size} bytes, but {tokens.count} tokens of {tokens.dtype.itemsize} bytes take "
            f"{expected}; it is truncated or of another kind: copy it again"
        )
    return tokens


def _npy(file: SourceFile, head: bytes) -> _Tokens:
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise DataError(f"{file.uri}: no .npy file ({error}); copy it again") from error
    if len(shape) != 1 or dtype.kind not in "iu" or dtype.byteorder == ">":
        raise DataError(f"{file.uri}: holds {dtype} of shape {shape}, not a row of token ids")
    return _Tokens(file, stream.tell(), shape[0], dtype)


def _copy(piece: _Piece, data_url: str) -> _Piece:
    """Read, check and store one shard, then record it."""
    source = piece.source
    width = source.dtype.itemsize
    data = storage.read_range(source.file.uri, source.offset + piece.start * width, source.offset + piece.end * width)
    tokens = np.frombuffer(data, source.dtype)
    if int(tokens.max()) >= GPT2_VOCAB_SIZE or int(tokens.min()) < 0:
        wrong = int(np.argmax((tokens >= GPT2_VOCAB_SIZE) | (tokens < 0)))
        raise DataError(
            f"{source.file.uri}: token {piece.start + wrong} is {tokens[wrong]}, GPT-2's ids end at "
            f"{GPT2_VOCAB_SIZE - 1}; the file is damaged or was made with another tokenizer"
        )
    shard = header_bytes(len(tokens)) + tokens.astype("<u2").tobytes()
    storage.write_bytes(storage.join(data_url, piece.name), shard)
    entry = ShardEntry(piece.name, len(tokens), len(shard), hashlib.sha256(shard).hexdigest())
    documents = int(np.count_nonzero(tokens == GPT2_END_OF_TEXT))
    record = json.dumps({"shard": asdict(entry), "documents": documents}, sort_keys=True)
    storage.write_bytes(part.record_uri(data_url, piece.record), record.encode())
    return piece


def _split(pieces: list[_Piece], data_url: str) -> Split:
    records = [json.loads(storage.read_bytes(part.record_uri(data_url, piece.record))) for piece in pieces]
    shards = tuple(ShardEntry(**record["shard"]) for record in records)
    return Split(sum(shard.tokens for shard in shards), sum(record["documents"] for record in records), shards)
