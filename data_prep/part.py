"""Prepares one part: reads, filters, encodes and splits its documents, and stores shards and a record.

Writes below the data URL the shards `train/<part>-<number>.bin`, the candidates for validation as shards
`parts/<part>-val-<number>.bin` and, last, the record `parts/<part>.json`. The plan alone determines the content of all
these objects. An interrupted part is prepared again. Two processes that prepare the same part store the same bytes.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from core import storage, untrusted
from core.data.manifest import ShardEntry
from core.data.vocabulary import GPT2_END_OF_TEXT
from core.errors import DataError
from core.settings.preparation import PrepConfig
from data_prep.encode import Check, Engine
from data_prep.pack import ShardWriter
from data_prep.plan import PrepPlan, record_uri
from data_prep.sources import documents
from data_prep.sources.files import Part

# Document lengths are counted in classes [2**k, 2**(k+1)).
LENGTH_CLASSES = 32
LARGEST_RECORD = 1 << 30  # largest size of a record in bytes; a candidate for validation takes 30 bytes
# Number of the most common split keys that a record stores. These keys show whether many documents have the same id.
SHARED_KEYS = 16


@dataclass(frozen=True)
class PartRecord:
    """The record of a finished part. `identity` is a hash of everything that its shards depend on (data_prep/plan.py).

    The split key of a document is a hash of its id, which decides the document's split. `shared` holds the most common
    split keys, each with the number of documents that have it. `candidates` holds, for each candidate for validation,
    its split key and its number of tokens, in the order of `candidate_shards`. This number includes the end-of-text
    token.
    """

    part: int
    identity: str
    shards: tuple[ShardEntry, ...]
    candidate_shards: tuple[ShardEntry, ...]
    candidates: tuple[tuple[int, int], ...]
    documents: int
    tokens: int
    text_bytes: int
    dropped: dict[str, int] = field(default_factory=dict)
    length_classes: tuple[int, ...] = ()
    shared: tuple[tuple[int, int], ...] = ()

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()


@dataclass
class WorkerState:
    """The state of a worker process. It is the same for all parts that the process prepares."""

    config: PrepConfig
    plan: PrepPlan
    engine: Engine
    check: Check | None
    fetched: Callable[[int], None]


def read_record(data_url: str, name: str) -> PartRecord:
    """Reads the record of a part. Raises ObjectNotFound if the part is unfinished, DataError if it is damaged."""
    uri = record_uri(data_url, name)
    try:
        document: dict[str, Any] = untrusted.read_json(uri, LARGEST_RECORD)
        for key in ("shards", "candidate_shards"):
            document[key] = tuple(ShardEntry(**entry) for entry in document[key])
            for shard in document[key]:
                untrusted.check_name(shard.name, uri)
        document["candidates"] = tuple((int(key), int(tokens)) for key, tokens in document["candidates"])
        document["shared"] = tuple((int(key), int(count)) for key, count in document["shared"])
        return PartRecord(**document)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{uri}: not a record of a part ({error}); delete it and prepare again") from error


def prepare(part: Part, state: WorkerState, drops: np.ndarray | None = None) -> PartRecord:
    """Prepares a part. The documents whose numbers are in `drops` are left out.

    Raises DataError, StorageError. An error leaves no record.
    """
    config, data = state.config, state.config.data
    threshold = int(data.val_fraction * 2**64)
    dropped: Counter[str] = Counter()
    lengths = np.zeros(LENGTH_CLASSES, np.int64)
    candidates: list[tuple[int, int, np.ndarray]] = []
    keys: list[np.ndarray] = []
    tokens = text_bytes = seen = 0
    if state.check:
        state.check.restart(part.end - part.start)
    with ShardWriter(
        data.url, f"train/{part.name}-{{:03d}}.bin", data.shard_tokens, GPT2_END_OF_TEXT, data.shuffle
    ) as train:
        for batch in documents.read(part, config.source, config.filter, data.seed, dropped, state.fetched):
            if drops is not None:
                numbers = np.arange(seen, seen + len(batch.texts))
                seen += len(batch.texts)
                batch = batch.only(~np.isin(numbers, drops, assume_unique=True))
                dropped["duplicate"] += len(numbers) - len(batch.texts)
            ids, offsets = state.engine.encode(batch.texts)
            if state.check:
                state.check.compare(batch.texts, ids, offsets, str(part))
            sizes = np.diff(offsets)
            keep = _length_filter(sizes, config, dropped)
            lengths += np.bincount(np.log2(sizes[keep]).astype(int), minlength=LENGTH_CLASSES)[:LENGTH_CLASSES]
            keys.append(batch.keys[keep, 0])
            tokens += int(sizes[keep].sum()) + int(keep.sum())
            text_bytes += int(batch.text_bytes[keep].sum())
            bounds = offsets.tolist()
            splits = batch.keys[:, 0].tolist()
            orders = batch.keys[:, 1].tolist()
            for number in np.flatnonzero(keep).tolist():
                document = ids[bounds[number] : bounds[number + 1]]
                if splits[number] < threshold:
                    candidates.append((splits[number], orders[number], document.copy()))
                else:
                    train.add(document, orders[number])
    if data.shuffle:
        candidates.sort(key=lambda candidate: candidate[1])
    with ShardWriter(data.url, f"parts/{part.name}-val-{{:03d}}.bin", 2**30, GPT2_END_OF_TEXT, False) as val:
        for _, order, document in candidates:
            val.add(document, order)
    record = PartRecord(
        part=part.index,
        identity=state.plan.identity_of(part),
        shards=train.entries,
        candidate_shards=val.entries,
        candidates=tuple((split, len(document) + 1) for split, _, document in candidates),
        documents=int(lengths.sum()),
        tokens=tokens,
        text_bytes=text_bytes,
        dropped=dict(sorted((+dropped).items())),
        length_classes=tuple(lengths.tolist()),
        shared=_most_common(keys),
    )
    storage.write_bytes(record_uri(data.url, part.name), record.to_bytes())
    return record


def _most_common(keys: list[np.ndarray]) -> tuple[tuple[int, int], ...]:
    found, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *keys]), return_counts=True)
    first = np.argsort(-counts, kind="stable")[:SHARED_KEYS]
    return tuple(zip(found[first].tolist(), counts[first].tolist(), strict=True))


def _length_filter(sizes: np.ndarray, config: PrepConfig, dropped: Counter) -> np.ndarray:
    """A mask (N,) of the documents whose length in tokens is allowed. Counts the other documents in `dropped`."""
    short = sizes < config.filter.min_tokens
    long = sizes > config.filter.max_tokens if config.filter.max_tokens else np.zeros(len(sizes), bool)
    dropped["empty"] += int((sizes == 0).sum())
    dropped["short"] += int((short & (sizes > 0)).sum())
    dropped["long"] += int(long.sum())
    return ~(short | long)
