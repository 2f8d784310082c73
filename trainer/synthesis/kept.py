"""Every call and every answer of a synthesis, in the run's folder, so that nothing paid for is lost or paid twice.

    RUN_URL/answers/segment-000001/00000000-00000015.jsonl      a journal per segment (core.run.journal)

Before a call `begun` is stored with the most that it can cost, after it what became of it: `answer`, `left_out` or
`failed`, with what it cost. A call whose end is not there, because this process was killed, counts in full.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core import storage
from core.errors import DataError
from core.run import journal
from core.run.folder import RunFolder

PAUSE_SECONDS = 1.0


@dataclass
class Known:
    """What earlier segments have left: by key, rows and reasons for leaving out; and what all their calls cost."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    usd: float = 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "answer":
            self.rows[event["key"]] = event["row"]
        elif event["event"] == "left_out":
            self.left_out[event["key"]] = event["why"]


def read(run_url: str) -> Known:
    """Raises DataError for answers that are there and cannot be read: they were paid for."""
    known = Known()
    folder = RunFolder(run_url).answers
    for segment in sorted(storage.list_names(folder)):
        events, problems = journal.read(storage.join(folder, segment))
        if problems:
            raise DataError(f"{problems[0]}; restore it from a backup, or delete it to have its prompts asked again")
        open_calls: dict[str, float] = {}
        for event in events:
            if event["event"] == "begun":
                open_calls[event["key"]] = event["usd"]
                continue
            open_calls.pop(event["key"], None)
            known.usd += event["usd"]
            known.take(event)
        known.usd += sum(open_calls.values())
    return known


class Keeper:
    """Stores events; `put` returns when an event is safe. Events that come together are stored together."""

    def __init__(self, run_url: str, segment: int):
        self._journal = journal.Journal(RunFolder(run_url).segment(segment).answers)
        self._waiting: list[asyncio.Future] = []
        self._task: asyncio.Task | None = None

    async def put(self, event: Mapping[str, Any]) -> None:
        self._journal.add(event)
        safe = asyncio.get_running_loop().create_future()
        self._waiting.append(safe)
        if self._task is None:
            self._task = asyncio.create_task(self._store())
        await safe

    async def _store(self) -> None:
        """While the store is away nothing is asked, for nothing could be kept."""
        while self._waiting:
            waiting = list(self._waiting)
            if not await asyncio.to_thread(self._journal.flush):
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            self._waiting = self._waiting[len(waiting) :]
            for each in waiting:
                if not each.done():
                    each.set_result(None)
        self._task = None

    def close(self) -> None:
        self._journal.close()
