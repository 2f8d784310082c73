"""Packs documents into shards of exactly `shard_tokens` tokens. A shard is uploaded while the next shard is filled.

An end-of-text token precedes each document. A shard's documents are sorted by a hash of their ids. This shuffle needs
no random generator and is the same on every machine. A document at the end of a shard continues in the next shard.
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter

import numpy as np

from core import storage
from core.data.manifest import ShardEntry
from core.data.shard import header_bytes


class ShardWriter:
    """Context manager: `add` documents, then read `entries`. `name` is a format string for the shard's number.

    Memory holds at most the documents of one shard, that shard, and the previous shard during its upload.
    """

    def __init__(self, data_url: str, name: str, shard_tokens: int, end_of_text: int, shuffle: bool):
        self._data_url = data_url
        self._name = name
        self._shard_tokens = shard_tokens
        self._end_of_text = np.array([end_of_text], dtype=np.uint16)
        self._shuffle = shuffle
        self._carry = np.zeros(0, np.uint16)
        self._documents: list[tuple[int, np.ndarray]] = []
        self._tokens = 0
        self._stored: list[Future[ShardEntry]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="upload")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                while self._tokens:
                    self._flush()
                self._await(0)
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def entries(self) -> tuple[ShardEntry, ...]:
        """The shards in order. The list is complete once the context has ended."""
        return tuple(future.result() for future in self._stored)

    def add(self, ids: np.ndarray, order: int) -> None:
        """Adds a document (uint16 ids without end-of-text). `order` is the document's sort key in a shuffled shard."""
        self._documents.append((order, ids))
        self._tokens += len(ids) + 1
        while self._tokens >= self._shard_tokens:
            self._flush()

    def _flush(self) -> None:
        if self._shuffle:
            self._documents.sort(key=itemgetter(0))
        cut = min(self._tokens, self._shard_tokens)
        pieces = [self._carry]
        for _, ids in self._documents:
            pieces += (self._end_of_text, ids)
        ends = np.cumsum([len(piece) for piece in pieces])
        whole = int(np.searchsorted(ends, cut, side="right"))
        # The document at the end of the shard is divided. This shard takes the tokens that fit.
        rest = cut - (int(ends[whole - 1]) if whole else 0)
        taken = [*pieces[:whole], *(piece[:rest] for piece in pieces[whole : whole + 1])]
        # The tokens are copied once, together with the header. This copy is hashed and stored.
        shard = b"".join([header_bytes(cut), *(piece.astype("<u2", copy=False) for piece in taken)])
        self._carry = np.concatenate([np.zeros(0, np.uint16), *pieces[whole:]])[rest:]
        self._documents.clear()
        self._tokens -= cut
        self._await(1)
        name = self._name.format(len(self._stored))
        self._stored.append(self._pool.submit(_store, self._data_url, name, shard, cut))

    def _await(self, unfinished: int) -> None:
        """Waits until at most `unfinished` uploads are in progress. Raises the errors of finished uploads."""
        for future in self._stored[: len(self._stored) - unfinished]:
            future.result()


def _store(data_url: str, name: str, shard: bytes, tokens: int) -> ShardEntry:
    digest = hashlib.sha256(shard).hexdigest()
    storage.write_bytes(storage.join(data_url, name), shard)
    return ShardEntry(name, tokens, len(shard), digest)
