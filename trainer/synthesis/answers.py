"""Reads the prompts of a synthesis and stores every call and answer, so that no answer is lost or paid for twice.

    RUN_URL/answers/segment-000001/00000000-00000015.jsonl      (a journal per segment, see core.run.journal)

The event `begun` is stored before a call, with the call's maximum cost. The event `answer`, `left_out` or `failed` is
stored after the call, with the actual cost. If the process was killed during a call, the call has no second event. Such
a call counts at its maximum cost.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from core import storage, untrusted
from core.data.sets import conversation_prompt
from core.errors import DataError
from core.run import journal
from core.run.folder import RunFolder

PAUSE_SECONDS = 1.0  # time between two attempts to store events


@dataclass(frozen=True)
class Prompt:
    """`digest` is a hash of the text without case and extra white space. Prompts with the same digest are equal."""

    messages: tuple[dict[str, str], ...]
    digest: str


@dataclass(frozen=True)
class Prompts:
    """The distinct prompts of a file, the number of duplicates, and the file's SHA-256."""

    prompts: tuple[Prompt, ...]
    duplicates: int
    fingerprint: str


def read_prompts(uri: str) -> Prompts:
    """Reads the lines of a .txt file, or rows of a .jsonl file with `prompt` or `messages`.

    Raises a DataError that names the malformed line.
    """
    if not uri.endswith((".txt", ".jsonl")):
        raise DataError(f"{uri}: unknown kind of file; give .txt with a prompt per line, or .jsonl")
    content = storage.read_bytes(uri)
    found: dict[str, Prompt] = {}
    count = 0
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        count += 1
        try:
            row = {"prompt": line.decode()} if uri.endswith(".txt") else untrusted.parse_json(line)
            messages = conversation_prompt(row)
        except ValueError as error:
            raise DataError(f"{uri}: line {number} {error}; give a text as `prompt`, or `messages`") from error
        digest = digest_of(messages)
        found.setdefault(digest, Prompt(tuple(messages), digest))
    if not found:
        raise DataError(f"{uri}: contains no prompt; give one per line")
    return Prompts(tuple(found.values()), count - len(found), hashlib.sha256(content).hexdigest())


def digest_of(messages: list[dict[str, str]]) -> str:
    """SHA-256 of a conversation without case and extra white space."""
    text = "\n".join(f"{each['role']}: {each['content']}" for each in messages)
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()


@dataclass
class StoredAnswers:
    """The stored answers.

    `rows` holds a row for each answer, `left_out` the reason for each omitted answer, both by key. `usd` is the cost of
    all calls.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    usd: float = 0.0

    def add(self, event: Mapping[str, Any]) -> None:
        """Adds the answer of an event. The cost of the call is not added."""
        if event["event"] == "answer":
            self.rows[event["key"]] = event["row"]
            self.left_out.pop(event["key"], None)  # an earlier call may have been declined
        elif event["event"] == "left_out":
            self.left_out[event["key"]] = event["why"]


def read_answers(run_url: str) -> StoredAnswers:
    """Reads the answers of all segments. Raises DataError if an answer cannot be read, because it was paid for."""
    stored = StoredAnswers()
    folder = RunFolder(run_url).answers
    for segment in sorted(storage.list_names(folder)):
        events, problems = journal.read(storage.join(folder, segment))
        if problems:
            raise DataError(
                f"{problems[0]}; restore this file from a backup, or delete it: its prompts are then asked again"
            )
        open_calls: dict[str, float] = {}
        for number, event in enumerate(events):
            if not _is_event(event):
                raise DataError(
                    f"{storage.join(folder, segment)}: event {number} is damaged or was not written by this "
                    "program; restore this folder from a backup, or delete it: its prompts are then asked again"
                )
            if event["event"] == "begun":
                open_calls[event["key"]] = event["usd"]
                continue
            open_calls.pop(event["key"], None)
            stored.usd += event["usd"]
            stored.add(event)
        stored.usd += sum(open_calls.values())
    return stored


def _is_event(event: Mapping[str, Any]) -> bool:
    kind, usd = event.get("event"), event.get("usd")
    if not isinstance(event.get("key"), str) or isinstance(usd, bool) or not isinstance(usd, int | float) or usd < 0:
        return False
    if kind == "answer":
        row = event.get("row")
        messages = row.get("messages") if isinstance(row, dict) else None
        return isinstance(messages, list) and all(isinstance(each, dict) for each in messages)
    return kind in ("begun", "failed") or (kind == "left_out" and isinstance(event.get("why"), str))


class AnswerLog:
    """Stores the events of a segment. Events that arrive together are stored together."""

    def __init__(self, run_url: str, segment: int):
        self._journal = journal.Journal(RunFolder(run_url).segment(segment).answers)
        self._waiting: list[asyncio.Future] = []
        self._task: asyncio.Task | None = None

    async def put(self, event: Mapping[str, Any]) -> None:
        """Returns when the event is stored.

        While the store is unavailable, this method waits, so that no further call is made.
        """
        self._journal.add(event)
        stored = asyncio.get_running_loop().create_future()
        self._waiting.append(stored)
        if self._task is None:
            self._task = asyncio.create_task(self._store())
        await stored

    async def _store(self) -> None:
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
