"""Finds the items of an evaluation set that occur in the training text.

An item counts as seen if the training shards contain any `run` consecutive tokens of its text (GPT-3 used 13, Brown et
al. 2020, appendix C). Each rank reads its share of the shards, one at a time. A rank holds in memory one shard, one
number per token of the set, and a table of 16 MB. A match that crosses the boundary of two shards is not found.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from core import storage
from core.console import progress
from core.data.manifest import Manifest
from trainer.distributed.process_group import Ranks, gather_objects
from trainer.evals.hellaswag import text_of
from trainer.evals.perplexity import read_shard
from trainer.evals.progress import PartialResults

BASE = np.uint64(0x9E3779B97F4A7C15)  # base of the polynomial: any odd number with well mixed bits
TABLE_BITS = 24
CHUNK_TOKENS = 1 << 20  # tokens hashed at a time, so that the arrays fit the CPU's caches


def item_tokens(item, encoding) -> np.ndarray:
    """Tokens of a HellaSwag item: the context and the right ending, without the activity label."""
    context, endings, label = text_of(item)
    context = context.partition(": ")[2]
    return np.array(encoding.encode_ordinary(f"{context} {endings[label]}"), np.uint64)


def seen(
    items: Sequence[np.ndarray], data_url: str, manifest: Manifest, run: int, ranks: Ranks, partial: PartialResults
) -> list[int]:
    """The numbers of the items that share `run` consecutive tokens with the training shards.

    The result is the same on all ranks.
    """
    hashes_of = [hashes(tokens, run) for tokens in items]
    known = np.concatenate([np.empty(0, np.uint64), *hashes_of])
    order = np.argsort(known, kind="stable")
    sorted_hashes = known[order]
    owners = np.repeat(np.arange(len(items)), [len(each) for each in hashes_of])[order]
    table = np.zeros(1 << TABLE_BITS, bool)
    table[_places(sorted_hashes)] = True

    shards = manifest.split("train", data_url).shards
    found = set()
    for name in (shard.name for shard in shards if shard.name in partial.found):
        found.update(partial.found[name])
    left = [shard for shard in shards if shard.name not in partial.found]
    mine: set[int] = set()
    with progress("contamination", sum(shard.tokens for shard in left) / ranks.world, "tokens per rank") as bar:
        for shard in left[ranks.rank :: ranks.world]:
            hits: set[int] = set()
            for piece in _pieces(read_shard(storage.join(data_url, shard.name), manifest), run):
                candidates = hashes(piece, run)
                candidates = candidates[table[_places(candidates)]]
                first = np.searchsorted(sorted_hashes, candidates, "left")
                last = np.searchsorted(sorted_hashes, candidates, "right")
                for begin, end in zip(first.tolist(), last.tolist(), strict=True):
                    hits.update(owners[begin:end].tolist())
            partial.add({shard.name: sorted(hits)})
            mine |= hits
            bar.advance(shard.tokens)
    return sorted(found.union(*gather_objects(mine, ranks)))


def hashes(tokens: np.ndarray, run: int) -> np.ndarray:
    """64-bit polynomial hashes of all sequences of `run` tokens, shape (T - run + 1,), computed by doubling."""
    if len(tokens) < run:
        return np.empty(0, np.uint64)
    done = 0
    value = np.empty(0, np.uint64)
    power, factor = (tokens.astype(np.uint64) + np.uint64(1)) * BASE, BASE  # hashes of 1, 2, 4, ... tokens
    size = 1
    while done < run:
        if run & size:
            if done:
                count = len(tokens) - done - size + 1
                value = value[:count] * factor + power[done : done + count]
            else:
                value = power
            done += size
        if done < run:
            power = power[: len(power) - size] * factor + power[size:]
            factor = np.uint64(int(factor) ** 2 % (1 << 64))
            size *= 2
    # Multiplication carries differences to higher bits only. The steps below mix the higher bits into the lower bits.
    value = value ^ (value >> np.uint64(29))
    value = value * np.uint64(0xBF58476D1CE4E5B9)
    return value ^ (value >> np.uint64(32))


def _places(values: np.ndarray) -> np.ndarray:
    return (values >> np.uint64(64 - TABLE_BITS)).astype(np.int64)


def _pieces(tokens: np.ndarray, run: int) -> Iterator[np.ndarray]:
    """Overlapping chunks. Any `run` consecutive tokens are within one of the chunks."""
    for first in range(0, len(tokens), CHUNK_TOKENS):
        yield tokens[first : first + CHUNK_TOKENS + run - 1]
