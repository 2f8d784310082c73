"""Completes a dataset: chooses the validation documents, orders the shards and writes the manifest.

The shards of the parts are final. Only the candidates for validation are read again. The candidates with the lowest
hashes become the validation split, up to `data.val_tokens` tokens. So the split follows the rule "hash below a
threshold" and does not depend on the order of parts. The other candidates become training shards.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from shlex import quote

import numpy as np

from core import storage
from core.data import manifest
from core.data.manifest import Manifest, ShardEntry, Split, TokenizerInfo
from core.data.shard import HEADER_BYTES
from core.data.vocabulary import FILE_NAME, GPT2_END_OF_TEXT, GPT2_SHA256, GPT2_VOCAB_SIZE
from core.errors import DataError
from core.settings.preparation import PrepConfig
from data_prep import limit
from data_prep import part as parts
from data_prep.limit import order
from data_prep.pack import ShardWriter
from data_prep.part import PartRecord
from data_prep.plan import PrepPlan
from data_prep.sources.files import Part

log = logging.getLogger(__name__)

READ_THREADS = 16
# An id is reported if at least LEAST_SHARED documents have it, and more than the share LARGEST_SHARE of all documents.
LEAST_SHARED = 10
LARGEST_SHARE = 0.01
GPT2 = TokenizerInfo("gpt2", GPT2_VOCAB_SIZE, GPT2_END_OF_TEXT, FILE_NAME, GPT2_SHA256)


@dataclass(frozen=True)
class _Chosen:
    threshold: int
    documents: int


def finalize(config: PrepConfig, plan: PrepPlan) -> Manifest:
    """Writes the manifest. Raises DataError if parts are missing, or if no document is left for training."""
    data = config.data
    todo = limit.needed(plan, data.url)
    absent = [part.name for part in limit.missing(plan, data.url)]
    if absent:
        raise DataError(
            f"{data.url}: {len(absent)} of {len(todo)} parts are missing ({', '.join(absent[:5])}"
            f"{', …' if len(absent) > 5 else ''}); run python -m data_prep.prepare with the same settings and "
            "--phase=all"
        )
    records = _read_records(config, plan, todo)
    _judge(records, config)
    shared = _shared_key(records, config)
    if shared:
        log.warning("%s", shared)
    chosen = _choose(records, config)
    with (
        ShardWriter(data.url, "val/{:05d}.bin", data.shard_tokens, GPT2_END_OF_TEXT, data.shuffle) as val,
        ShardWriter(data.url, "train/rest-{:05d}.bin", data.shard_tokens, GPT2_END_OF_TEXT, data.shuffle) as rest,
    ):
        for key, document in _candidates(records, config):
            (val if key < chosen.threshold else rest).add(document, order(key, data.seed))
    train_shards = [shard for record in records for shard in record.shards] + list(rest.entries)
    if data.shuffle:
        train_shards.sort(key=lambda shard: order(shard.name, data.seed))
    documents = sum(record.documents for record in records)
    splits = {
        "train": _split(train_shards, documents - chosen.documents),
        "val": _split(val.entries, chosen.documents),
    }
    if not splits["train"].tokens:
        raise DataError(
            f"{config.source.place}: no document is left for training (dropped: "
            f"{_words(_sum(record.dropped for record in records)) or 'none'}); "
            f"{shared or 'check the filters and the source'}"
        )
    made = Manifest(
        GPT2,
        source={
            **plan.origin,
            "files": len(plan.files),
            "bytes": plan.source_bytes,
            "plan_sha256": plan.sha256,
        },
        split_rule={
            "rule": "val if the first 8 bytes, big-endian, of blake2b(id, digest_size=16, key=str(seed)) "
            "are below the threshold",
            "hashed": config.source.id_column or "text",
            "seed": data.seed,
            "threshold": chosen.threshold,
            "val_fraction": data.val_fraction,
            "val_tokens": data.val_tokens,
        },
        splits=splits,
        stats=_stats(records),
    )
    manifest.write(data.url, made)
    return made


def _read_records(config: PrepConfig, plan: PrepPlan, todo: Sequence[Part]) -> list[PartRecord]:
    in_source = sorted(todo, key=lambda part: part.index)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        records = list(pool.map(lambda part: parts.read_record(config.data.url, part.name), in_source))
    for part, record in zip(in_source, records, strict=True):
        if record.identity != plan.identity_of(part):
            raise DataError(
                f"{config.data.url}: part {record.part} was made with other settings or another source; "
                "choose another data.url, or delete that folder"
            )
    return records


def _judge(records: list[PartRecord], config: PrepConfig) -> None:
    bad = sum(record.dropped.get("bad", 0) for record in records)
    rows = sum(record.documents + sum(record.dropped.values()) for record in records)
    if bad > config.source.max_bad_share * rows:
        raise DataError(
            f"{config.source.place}: {bad} of {rows} rows have no text, no id or no valid UTF-8, more than "
            f"source.max_bad_share = {config.source.max_bad_share:g}; "
            "check text_column and id_column, or raise that share"
        )


def _shared_key(records: list[PartRecord], config: PrepConfig) -> str:
    """A sentence about the most frequent id, if so many documents have this id that it distorts the split, else ""."""
    total: Counter[int] = Counter()
    for record in records:
        total.update(dict(record.shared))
    documents = sum(record.documents for record in records)
    count = max(total.values(), default=0)
    if count < LEAST_SHARED or count <= documents * min(LARGEST_SHARE, config.data.val_fraction or 1):
        return ""
    key = config.source.id_column
    if not key:
        return (
            f"{count} of {documents} documents have the same text, and so fall into the same split; "
            "prepare a new set with --filter.drop_duplicates=true to keep one of them"
        )
    return (
        f"{count} of {documents} documents have the same id (column {key!r}), and so fall into the same split; "
        "prepare a new set with --source.id_column= (empty), so that the text decides, or name a column of unique ids"
    )


def _choose(records: list[PartRecord], config: PrepConfig) -> _Chosen:
    """Chooses the threshold of the validation split.

    Documents with equal ids have equal hashes, so they are always in the same split.
    """
    candidates = sorted(candidate for record in records for candidate in record.candidates)
    limit = config.data.val_tokens
    tokens = number = 0
    while number < len(candidates) and (not limit or tokens < limit):
        key = candidates[number][0]
        while number < len(candidates) and candidates[number][0] == key:
            tokens += candidates[number][1]
            number += 1
    if tokens < limit or (config.data.val_fraction and not tokens):
        log.warning(
            "validation has %d tokens, %s; raise data.val_fraction (now %g) and prepare a new set for more",
            tokens,
            f"not the {limit} that data.val_tokens asks for" if limit else "no document fell into it",
            config.data.val_fraction,
        )
    if number == len(candidates):
        return _Chosen(int(config.data.val_fraction * 2**64), number)
    return _Chosen(candidates[number][0], number)


def _candidates(records: list[PartRecord], config: PrepConfig) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (split key, token ids) of all candidates. The seed determines the order. One part is in memory."""
    ordered = records
    if config.data.shuffle:
        ordered = sorted(records, key=lambda record: order(record.part, config.data.seed))
    for record in ordered:
        tokens = np.concatenate([np.zeros(0, np.uint16), *_tokens(record.candidate_shards, config.data.url)])
        start = 0
        for key, length in record.candidates:
            # The end-of-text token is left out, because the shard writer adds it again.
            yield key, tokens[start + 1 : start + length].copy()
            start += length


def _tokens(shards: tuple[ShardEntry, ...], data_url: str) -> Iterator[np.ndarray]:
    for shard in shards:
        uri = storage.join(data_url, shard.name)
        data = storage.read_bytes(uri)
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            raise DataError(f"{uri}: its checksum has changed; delete that part's .json and prepare again")
        yield np.frombuffer(data, dtype="<u2", offset=HEADER_BYTES)


def _split(shards: list[ShardEntry] | tuple[ShardEntry, ...], documents: int) -> Split:
    return Split(sum(shard.tokens for shard in shards), documents, tuple(shards))


def _stats(records: list[PartRecord]) -> dict:
    return {
        "documents": sum(record.documents for record in records),
        "tokens": sum(record.tokens for record in records),
        "text_bytes": sum(record.text_bytes for record in records),
        "dropped": _sum(record.dropped for record in records),
        "length_classes": np.sum([record.length_classes for record in records], axis=0).tolist(),
    }


def _sum(counts: Iterator[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _words(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in counts.items())


def print_summary(made: Manifest, url: str) -> None:
    """Prints the content of a finished dataset and the next commands."""
    stats = made.stats
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in stats["dropped"].items())
    print(f"documents  {stats['documents']:,}" + (f" (dropped: {dropped})" if dropped else ""))
    for name, split in made.splits.items():
        print(f"{name:<10} {split.tokens:,} tokens, {split.documents:,} documents, {len(split.shards)} shards")
    if not made.splits["val"].tokens:
        print("           no validation tokens: training will report no validation loss")
    print(f"set        {url} (fingerprint {made.fingerprint[:12]})")
    print(f"check it   python -m data_prep.verify {quote(url)}")
    command = f"torchrun --nproc-per-node=N -m trainer.train CONFIG {quote(f'--data.url={url}')} --run.url=RUN_URL"
    print(f"train      {command}")
