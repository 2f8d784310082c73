"""Finds exact duplicates of documents in the whole dataset, in bounded memory.

A first pass over the source stores the sorted hashes of all texts of each part. Each node then reads the hashes of all
parts, one range of hash values at a time, and stores the numbers of the duplicates in the node's parts. Of several
equal documents, the first in the order of the source is kept, so the result does not depend on the number or speed of
the nodes.

    parts/<part>-<content>.hashes   257 int64 offsets, then each document's hash (two uint64) and number (uint32)
    parts/<part>-<plan>.drops        uint32 numbers, ascending

The names of these files contain a hash of everything that their content depends on. So the texts of a corrected source
are hashed again.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from core import storage
from data_prep.part import WorkerState
from data_prep.plan import PrepPlan
from data_prep.sources import documents
from data_prep.sources.files import Part

BUCKETS = 256  # one bucket for each value of the first byte of the hash
ENTRY = np.dtype([("upper", "<u8"), ("lower", "<u8"), ("number", "<u4")])
# Bytes of memory per document to sort a range of hashes. A range is so small that its sorting fits into MEMORY_BYTES.
SORT_BYTES = 64
MEMORY_BYTES = 512 << 20
THREADS = 16


def hash_part(part: Part, state: WorkerState) -> None:
    """Stores the hashes of a part's documents, in the order in which `documents.read` yields the documents."""
    config = state.config
    digests: list[bytes] = []
    for batch in documents.read(part, config.source, config.filter, config.data.seed, Counter(), state.fetched):
        digests += [hashlib.blake2b(text, digest_size=16).digest() for text in documents.buffers(batch.texts)]
    halves = np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)
    entries = np.empty(len(halves), ENTRY)
    entries["upper"], entries["lower"] = halves[:, 0], halves[:, 1]
    entries["number"] = np.arange(len(halves))
    entries.sort(order=("upper", "lower", "number"))
    first_bytes = (entries["upper"] >> np.uint64(56)).astype(np.int64)
    offsets = np.searchsorted(first_bytes, np.arange(BUCKETS + 1)).astype("<i8")
    storage.write_bytes(_hashes(config.data.url, state.plan, part), offsets.tobytes() + entries.tobytes())


def hashed(plan: PrepPlan, data_url: str) -> set[str]:
    """Names of the parts whose hashes are stored."""
    known = _stored(data_url)
    return {part.name for part in plan.parts if _hashes(data_url, plan, part) in known}


def find(plan: PrepPlan, mine: Sequence[Part], data_url: str) -> None:
    """Stores the numbers of the duplicates in the parts `mine`. Needs the hashes of all parts."""
    known = _stored(data_url)
    if all(_drops(data_url, plan, part) in known for part in mine):
        return
    parts = plan.parts
    places = {part.index: _hashes(data_url, plan, part) for part in parts}
    with ThreadPoolExecutor(THREADS) as pool:
        offsets = list(pool.map(_offsets, places.values()))
        drops: dict[int, list[np.ndarray]] = defaultdict(list)
        for low, high in _ranges(np.sum([np.diff(each) for each in offsets], axis=0)):
            pieces = pool.map(lambda job: _entries(*job), [
                (places[part.index], int(each[low]), int(each[high])) for part, each in zip(parts, offsets, strict=True)
            ])  # fmt: skip
            for index, numbers in _repeated(list(pieces)):
                drops[index].append(numbers)
        for part in mine:
            found = np.sort(np.concatenate([np.zeros(0, "<u4"), *drops[part.index]]))
            storage.write_bytes(_drops(data_url, plan, part), found.astype("<u4").tobytes())


def drops_of(data_url: str, plan: PrepPlan, part: Part) -> np.ndarray:
    """Numbers of a part's duplicates, ascending (uint32)."""
    return np.frombuffer(storage.read_bytes(_drops(data_url, plan, part)), "<u4")


def _repeated(pieces: list[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (index of a part, numbers of its documents whose hash occurred before)."""
    entries = np.concatenate(pieces)
    origin = np.repeat(np.arange(len(pieces), dtype=np.uint32), [len(piece) for piece in pieces])
    # A stable sort keeps equal hashes in the order of parts and documents.
    order = np.lexsort((entries["lower"], entries["upper"]))
    entries, origin = entries[order], origin[order]
    same = (entries["upper"][1:] == entries["upper"][:-1]) & (entries["lower"][1:] == entries["lower"][:-1])
    repeated = np.flatnonzero(same) + 1
    for index in np.unique(origin[repeated]).tolist():
        yield index, entries["number"][repeated[origin[repeated] == index]]


def _ranges(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yields ranges of adjacent buckets that fit into MEMORY_BYTES."""
    low = total = 0
    for bucket, count in enumerate(counts.tolist()):
        if total and (total + count) * SORT_BYTES > MEMORY_BYTES:
            yield low, bucket
            low, total = bucket, 0
        total += count
    yield low, len(counts)


def _offsets(uri: str) -> np.ndarray:
    return np.frombuffer(storage.read_range(uri, 0, 8 * (BUCKETS + 1)), "<i8")


def _entries(uri: str, start: int, end: int) -> np.ndarray:
    head = 8 * (BUCKETS + 1)
    size = ENTRY.itemsize
    return np.frombuffer(storage.read_range(uri, head + start * size, head + end * size), ENTRY)


def _hashes(data_url: str, plan: PrepPlan, part: Part) -> str:
    return storage.join(data_url, f"parts/{part.name}-{plan.content_of(part)[:12]}.hashes")


def _drops(data_url: str, plan: PrepPlan, part: Part) -> str:
    return storage.join(data_url, f"parts/{part.name}-{plan.sha256[:12]}.drops")


def _stored(data_url: str) -> set[str]:
    folder = storage.join(data_url, "parts")
    return {storage.join(folder, name) for name in storage.list_names(folder)}
