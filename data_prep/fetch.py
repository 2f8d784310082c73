"""Imports token shards from other programs, without tokenizing.

    python -m data_prep.fetch data_prep/configs/fineweb-edu-10bt-ready.yaml --data.url=s3://BUCKET/fineweb-edu-10bt

Reads from the Hub, a bucket or a disk: llm.c's .bin files (magic 20240520 version 1 with uint16, and 20240801 version 7
with uint32), NumPy's .npy of any integer type, and plain uint16 .bin without a header. Checks every token. Writes
shards, the vocabulary and, last, manifest.json. A record per shard lets an interrupted import continue. Refuses sources
that would silently give wrong tokens: a file in both splits, ids wider than their type, unknown headers.
"""

from core import stop

if __name__ == "__main__":
    stop.listen()  # this call comes before the imports, which take seconds

import functools
import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from core import storage, untrusted
from core.console import progress, run_entry, set_up_logging
from core.data import manifest
from core.data.manifest import Manifest, ShardEntry, Split
from core.data.shard import HEADER_BYTES, MAGIC, header_bytes
from core.data.vocabulary import GPT2_END_OF_TEXT, GPT2_VOCAB_SIZE, store_vocabulary
from core.errors import CapReached, DataError
from core.exit_codes import CAPPED, OK, tell_launcher
from core.settings import loader as settings
from core.settings.preparation import FetchConfig
from core.stores import hub
from data_prep import booking, hellaswag, plan
from data_prep.finalize import GPT2, print_summary
from data_prep.plan import PrepPlan
from data_prep.sources.files import SourceFile

log = logging.getLogger(__name__)

SUFFIXES = (".bin", ".npy")
# The token type for each (magic, version), as in dev/data/data_common.py of karpathy/llm.c.
LLMC_HEADERS = {(MAGIC, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
SAMPLE_BYTES = 64 << 10

USAGE = """
python -m data_prep.fetch [CONFIG.yaml] [--key=value ...]

Check token shards of another program and copy them below data.url, with a manifest. Safe to run again.
"""


@dataclass(frozen=True)
class _Tokens:
    """Position and type of the tokens in a source file."""

    file: SourceFile
    offset: int
    count: int
    dtype: np.dtype


@dataclass(frozen=True)
class _Piece:
    """A shard to write: tokens [start, end) of a source file."""

    name: str
    source: _Tokens
    start: int
    end: int

    @property
    def record(self) -> str:
        return self.name.removesuffix(".bin").replace("/", "-")

    @property
    def content(self) -> list:
        """The values that the shard depends on, as its record stores them."""
        return [*self.source.file.content, self.start, self.end]


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(settings.help_text(FetchConfig, USAGE))
        return 0
    set_up_logging()
    config = settings.load(FetchConfig, arguments, os.environ)
    log.info("%s", settings.describe(config, "--help has the others"))
    try:
        with booking.open_log("data_prep.fetch", 0, config.max_usd, config.shutdown_reserve_seconds) as segment:
            hellaswag.ensure(config.data.url, config.evaluation_sets)
            check = functools.partial(booking.check_cap, segment, config.data.url, config.max_usd)
            made = fetch(config, segment.switch, check)
    except CapReached as reached:
        log.warning("%s", reached)
        tell_launcher(CAPPED)
        return CAPPED
    print_summary(made, config.data.url)
    return OK


def fetch(
    config: FetchConfig, enter: Callable[[str], None] = lambda phase: None, check: Callable[[], None] = lambda: None
) -> Manifest:
    """Imports the shards that are missing and writes the manifest. Raises ConfigError, DataError, StorageError.

    Calls `enter` at the start of each phase of the ledger. Calls `check` after each shard; `check` may raise an error
    to end the import.
    """
    data_url = config.data.url
    files = {
        split: plan.list_files(plan.pinned(url, config.source.revision, data_url), SUFFIXES)
        for split, url in (("train", config.source.train_url), ("val", config.source.val_url))
        if url
    }
    _check_splits(files)
    pieces = {split: list(_pieces(split, each, config.data.shard_tokens)) for split, each in files.items()}
    todo = PrepPlan(plan.identity_of(config), tuple(file for each in files.values() for file in each))
    todo, complete = plan.claim(todo, data_url, lambda finished, found: _accepts(finished, pieces, data_url))
    if complete:
        log.info("%s is complete already, from the same source", data_url)
        return manifest.read(data_url)
    enter("prep")
    store_vocabulary(config.tokenizer.vocab_url, data_url)
    done = plan.done_parts(data_url)
    left = [piece for each in pieces.values() for piece in each if piece.record not in done]
    total = sum((piece.end - piece.start) * piece.source.dtype.itemsize for piece in left)
    with progress("fetch", total, "source bytes") as bar, ThreadPoolExecutor(config.workers) as pool:
        try:
            for piece in pool.map(lambda each: _copy(each, data_url), left):
                bar.advance((piece.end - piece.start) * piece.source.dtype.itemsize)
                check()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    enter("finalize")
    splits = {split: _split(each, data_url) for split, each in pieces.items()}
    for name, split in splits.items():
        if not split.documents:
            log.warning(
                "%s: no end-of-text token (%d) occurs in the %s split: documents have no boundaries, and the ids may "
                "belong to another vocabulary (such as characters); check how the source was tokenized",
                data_url,
                GPT2_END_OF_TEXT,
                name,
            )
    splits.setdefault("val", Split(0, 0, ()))
    made = Manifest(
        GPT2,
        source={
            "url": config.source.train_url,
            "revision": hub.revision_of(todo.files[0].uri),
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


def _check_splits(files: Mapping[str, tuple[SourceFile, ...]]) -> None:
    """Raises DataError for a file that would be imported twice: in both splits, or in one split under two names."""
    train, val = files["train"], files.get("val", ())
    remedy = "narrow source.train_url, for example to *train*, or leave source.val_url empty"
    places: dict[str, str] = {}
    for split, file in [("train", file) for file in train] + [("val", file) for file in val]:
        place = _place(file.uri)
        if place not in places:
            places[place] = split
        elif places[place] == split:
            raise DataError(f"{file.uri}: has two names in the {split} split; narrow source.{split}_url to one of them")
        else:
            raise DataError(f"{file.uri}: is in both splits, so that validation would measure training text; {remedy}")
    for one, other in itertools.product(train, val):
        if _same_content(one, other):
            raise DataError(
                f"{one.uri}: has the content of {other.uri}, so that validation would measure training text; {remedy}"
            )


def _place(uri: str) -> str:
    """A unique name of a file, with links resolved."""
    return os.path.realpath(storage.local_path(uri)) if storage.is_local(uri) else uri


def _same_content(one: SourceFile, other: SourceFile) -> bool:
    if (one.size, one.tail_sha256) != (other.size, other.tail_sha256):
        return False
    return one.size <= plan.TAIL_BYTES or _sha256(one.uri) == _sha256(other.uri)


def _sha256(uri: str) -> str:
    digest = hashlib.sha256()
    for chunk in storage.chunks(uri):
        digest.update(chunk)
    return digest.hexdigest()


def _pieces(split: str, files: tuple[SourceFile, ...], shard_tokens: int) -> Iterator[_Piece]:
    number = 0
    for file in files:
        tokens = _tokens_of(file)
        for start in range(0, tokens.count, shard_tokens):
            yield _Piece(f"{split}/{number:05d}.bin", tokens, start, min(tokens.count, start + shard_tokens))
            number += 1


def _tokens_of(file: SourceFile) -> _Tokens:
    """Detects the format of a file. Raises DataError if its size contradicts its header, or its ids are wider than
    their type."""
    head = storage.read_range(file.uri, 0, min(file.size, SAMPLE_BYTES))
    if file.uri.endswith(".npy"):
        tokens = _npy(file, head)
    else:
        fields = np.frombuffer(head[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), "<i4").tolist()
        dtype = LLMC_HEADERS.get((fields[0], fields[1]))
        if dtype is None and len(head) >= HEADER_BYTES and not any(fields[4:]):
            raise DataError(
                f"{file.uri}: has an unknown header (magic {fields[0]}, version {fields[1]}); "
                "give llm.c's shards of GPT-2's tokens, or save the ids as .npy"
            )
        if dtype is None:
            tokens = _Tokens(file, 0, file.size // 2, np.dtype("<u2"))
        else:
            tokens = _Tokens(file, HEADER_BYTES, fields[2], dtype)
    expected = tokens.offset + tokens.count * tokens.dtype.itemsize
    if file.size != expected or not tokens.count:
        raise DataError(
            f"{file.uri}: {file.size} bytes, but {tokens.count} tokens of {tokens.dtype.itemsize} bytes take "
            f"{expected}; it is truncated or has another format: copy it again"
        )
    end = len(head) - (len(head) - tokens.offset) % tokens.dtype.itemsize
    _check_width(np.frombuffer(head[tokens.offset : end], tokens.dtype), file.uri, 0)
    return tokens


def _check_width(tokens: np.ndarray, uri: str, first: int) -> None:
    """Raises DataError if 16-bit numbers look like halves or quarters of wider ids.

    The upper parts of wider ids are mostly zero, whereas the id 0 is rare in text. `first` is the position of the first
    of these numbers in the file.
    """
    if tokens.dtype != np.dtype("<u2"):
        return
    for words_per_id in (4, 2):
        rows = tokens[: len(tokens) // words_per_id * words_per_id].reshape(-1, words_per_id)
        used = np.count_nonzero(rows, axis=0)
        low = int(np.argmax(used))
        if len(rows) < 4 or 2 * np.delete(used, low).max() >= used[low]:
            continue
        kind = f"u{2 * words_per_id}"
        swapped = (first + low) % words_per_id == words_per_id - 1  # big-endian
        read = f"np.fromfile('FILE.bin', '{'>' if swapped else '<'}{kind}')"
        every = {2: "every second", 4: "three of four"}[words_per_id]
        raise DataError(
            f"{uri}: {every} of its 16-bit numbers are zero, so its ids are {16 * words_per_id} bits wide and would be "
            f"read as {words_per_id} tokens each; save them with their type: np.save('FILE.npy', {read})"
        )


def _npy(file: SourceFile, head: bytes) -> _Tokens:
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except ValueError as error:
        raise DataError(f"{file.uri}: not an .npy file ({error}); copy it again") from error
    if len(shape) != 1 or dtype.kind not in "iu":
        raise DataError(
            f"{file.uri}: holds {dtype} of shape {shape}, not a list of token ids; save a one-dimensional integer array"
        )
    return _Tokens(file, stream.tell(), shape[0], dtype)


def _copy(piece: _Piece, data_url: str) -> _Piece:
    """Reads, checks and stores one shard, then its record."""
    source = piece.source
    width = source.dtype.itemsize
    data = storage.read_range(source.file.uri, source.offset + piece.start * width, source.offset + piece.end * width)
    tokens = np.frombuffer(data, source.dtype)
    _check_width(tokens, source.file.uri, piece.start)
    if int(tokens.max()) >= GPT2_VOCAB_SIZE or int(tokens.min()) < 0:
        wrong = int(np.argmax((tokens >= GPT2_VOCAB_SIZE) | (tokens < 0)))
        raise DataError(
            f"{source.file.uri}: token {piece.start + wrong} is {tokens[wrong]}, GPT-2's ids end at "
            f"{GPT2_VOCAB_SIZE - 1}; the file is damaged or was made with another tokenizer: "
            "copy it again, or prepare its text (python -m data_prep.prepare)"
        )
    shard = header_bytes(len(tokens)) + tokens.astype("<u2").tobytes()
    storage.write_bytes(storage.join(data_url, piece.name), shard)
    entry = ShardEntry(piece.name, len(tokens), len(shard), hashlib.sha256(shard).hexdigest())
    documents = int(np.count_nonzero(tokens == GPT2_END_OF_TEXT))
    record = json.dumps({"shard": asdict(entry), "documents": documents, "source": piece.content}, sort_keys=True)
    storage.write_bytes(plan.record_uri(data_url, piece.record), record.encode())
    return piece


def _accepts(finished: set[str], pieces: Mapping[str, list[_Piece]], data_url: str) -> bool:
    """Whether the finished shards of another plan are the shards that this plan would make."""
    wanted = {piece.record: piece.content for each in pieces.values() for piece in each}
    records = {name: _record(data_url, name) for name in finished}
    return all(name in wanted and record.get("source") == wanted[name] for name, record in records.items())


def _split(pieces: list[_Piece], data_url: str) -> Split:
    records = [_record(data_url, piece.record) for piece in pieces]
    try:
        shards = tuple(ShardEntry(**record["shard"]) for record in records)
        return Split(sum(shard.tokens for shard in shards), sum(record["documents"] for record in records), shards)
    except (KeyError, TypeError) as error:
        raise DataError(f"{data_url}/parts: a record is damaged ({error}); delete them and import again") from error


def _record(data_url: str, name: str) -> Mapping[str, Any]:
    """The record of a shard. Raises DataError if it is damaged."""
    uri = plan.record_uri(data_url, name)
    try:
        return untrusted.read_object(uri)
    except ValueError as error:
        raise DataError(f"{uri}: not a record of a shard ({error}); delete it and import again") from error


if __name__ == "__main__":
    run_entry(main)
