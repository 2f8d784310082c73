"""What a task has found so far, in storage, so that an evaluation that was cut off goes on where it was.

    with Kept("s3://bucket/runs/first/evaluations/step-00001000/partial/perplexity-01ab", ranks, books.check) as kept:
        kept.found        # by key, of all attempts before
        kept.add({"17": [-12.5, False]})

Each rank adds to a journal of its own (core.run.journal): at most a few seconds are lost.
"""

import time
from collections.abc import Callable
from typing import Any

from core import stop, storage
from core.run import journal
from core.run.journal import Journal
from trainer.distributed.process_group import Ranks, gather_objects, on_main


class Kept:
    def __init__(self, folder: str, ranks: Ranks, check: Callable[[], None]):
        """`check` is called after each addition, and raises to stop."""
        self.folder = folder
        self.check = check
        self._ranks = ranks
        self.found: dict[str, Any]
        self.found, attempt = on_main(lambda: (_read(folder), time.time_ns()), ranks)
        self._journal = Journal(storage.join(folder, f"{attempt}-rank-{ranks.rank:05d}"))
        stop.on_leaving(self._journal.close)

    def add(self, values: dict[str, Any]) -> None:
        """Plain values that this rank has found."""
        self._journal.add({"values": values})
        self.check()

    def discard(self) -> None:
        """Remove it all: the result is stored. On all ranks, after `with` has ended."""
        gather_objects(None, self._ranks)  # every journal is closed
        on_main(self._delete, self._ranks)

    def _delete(self) -> None:
        for info in storage.list_objects(self.folder):
            storage.delete(info.uri)

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()


def _read(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attempt in storage.list_names(folder):
        events, _ = journal.read(storage.join(folder, attempt))  # what cannot be read is computed again
        for event in events:
            found |= event["values"]
    return found
