"""Stores append-only lists of events in object storage, which has immutable objects only.

A journal is a folder of JSON-lines objects. An object's name contains the sequence numbers of its events
(`00000000-00000011.jsonl`). A background thread stores new events every few seconds. From time to time it merges small
objects into one, so that a day has a few hundred objects instead of twenty thousand. After a SIGKILL at most the events
of the last `flush_seconds` are missing. If an event is in two objects, a reader takes it once.
"""

import json
import logging
import math
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from core import storage, untrusted
from core.errors import LauncherError, ObjectNotFound

log = logging.getLogger(__name__)

FLUSH_SECONDS = 3.0
OBJECTS_PER_CHUNK = 100
# In bytes. Waiting events that reach FLUSH_BYTES are stored early. Small objects that reach CHUNK_BYTES are merged.
FLUSH_BYTES = 4 << 20
CHUNK_BYTES = 4 << 20
READ_ATTEMPTS = 3
# Objects above this size are not read. An object may be large, because all events that waited during an outage of the
# store become one object.
LARGEST_BYTES = 256 << 20
_NAME = re.compile(r"^(\d{8,15})-(\d{8,15})\.jsonl\Z")


class Journal:
    """Writes one journal folder; thread-safe. `close` stores the rest and stops the thread.

    Storing never blocks `add`. While the store does not answer, events wait in memory. An outage is logged once and
    does not stop the caller. `before_flush` is called before each periodic flush, for instance to add a heartbeat.
    """

    def __init__(self, folder: str, flush_seconds: float | None = None, before_flush=None):
        self.folder = folder
        self._flush_seconds = FLUSH_SECONDS if flush_seconds is None else flush_seconds
        self._before_flush = before_flush
        self._lock = threading.Lock()
        self._store_lock = threading.Lock()
        self._pending: list[str] = []
        self._pending_bytes = 0
        self._chunk_bytes = 0
        self._next = 0
        self._chunk_lines: list[str] = []
        self._chunk_objects: list[str] = []
        self._failing = False
        self._failing_since = math.inf
        self.failure = ""  # the error of the newest attempt
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"journal {folder.rsplit('/', 1)[-1]}", daemon=True)
        self._thread.start()

    def add(self, event: Mapping[str, Any]) -> None:
        """Append one event of JSON types. NaN and infinity are stored as null."""
        line = json.dumps(_finite(event), separators=(",", ":"))
        with self._lock:
            self._pending.append(line)
            self._pending_bytes += len(line) + 1  # json.dumps writes ASCII
            if self._pending_bytes >= FLUSH_BYTES and not self._failing:
                self._wake.set()

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the events that wait in memory."""
        return self._pending_bytes

    @property
    def failing_seconds(self) -> float:
        """Seconds since the store began to fail, or 0 if the newest attempt succeeded."""
        return max(0.0, time.monotonic() - self._failing_since)

    def flush(self) -> bool:
        """Store all events added so far. Returns False if the store failed; the events then wait in memory."""
        with self._store_lock:
            return self._store()

    def close(self) -> bool:
        """Store the rest and stop the thread. Returns False if the store failed."""
        self._stop.set()
        self._wake.set()
        self._thread.join()
        with self._store_lock:
            return self._store() and self._compact()

    def _run(self) -> None:
        while True:
            self._wake.wait(self._flush_seconds)
            self._wake.clear()
            if self._stop.is_set():
                return
            if self._before_flush:
                self._before_flush()
            with self._store_lock:
                if self._store() and (
                    len(self._chunk_objects) >= OBJECTS_PER_CHUNK or self._chunk_bytes >= CHUNK_BYTES
                ):
                    self._compact()

    def _store(self) -> bool:
        with self._lock:
            lines = list(self._pending)
        if not lines:
            return True
        name = _name(self._next, self._next + len(lines) - 1)
        data = _encode(lines)
        began = time.monotonic()
        try:
            storage.write_bytes(storage.join(self.folder, name), data)
        except LauncherError as error:
            if not self._failing:
                log.warning("%s: events wait in memory until the store answers again: %s", self.folder, error)
            self._failing = True
            self._failing_since = min(self._failing_since, began)
            self.failure = str(error)
            return False
        if self._failing:
            log.warning("%s: stored again, nothing was lost", self.folder)
        self._failing = False
        self._failing_since = math.inf
        with self._lock:
            del self._pending[: len(lines)]
            self._pending_bytes -= len(data)
        # Only neighbours can be merged, and a large object never is. So the small objects before it are merged now.
        if len(data) >= CHUNK_BYTES:
            self._compact()
        self._next += len(lines)
        if len(data) < CHUNK_BYTES:
            self._chunk_lines += lines
            self._chunk_objects.append(name)
            self._chunk_bytes += len(data)
        return True

    def _compact(self) -> bool:
        whole = _name(self._next - len(self._chunk_lines), self._next - 1)
        try:
            if len(self._chunk_objects) < 2:
                return True
            storage.write_bytes(storage.join(self.folder, whole), _encode(self._chunk_lines))
            for name in self._chunk_objects:
                storage.delete(storage.join(self.folder, name))
        except LauncherError as error:
            log.warning("%s: small objects were not merged, so listings take longer: %s", self.folder, error)
            return False
        finally:
            self._chunk_lines = []
            self._chunk_objects = []
            self._chunk_bytes = 0
        return True


def read(folder: str, after: int = -1) -> tuple[list[dict[str, Any]], list[str]]:
    """The events of a journal after number `after`, in order, and a sentence for each unreadable object."""
    return _together(stream(folder, after))


def stream(folder: str, after: int = -1) -> Iterator[tuple[list[dict[str, Any]], list[str]]]:
    """Like `read`, but yields object by object, for a journal that is larger than the memory."""
    for attempt in range(READ_ATTEMPTS):
        try:
            for last, events, problems in _each_object((info.uri for info in storage.list_objects(folder)), after):
                yield events, problems
                after = last
            return
        except ObjectNotFound:  # the writer has replaced objects after the listing
            if attempt == READ_ATTEMPTS - 1:
                raise


def read_objects(uris: Iterable[str], after: int = -1) -> tuple[list[dict[str, Any]], list[str]]:
    """Like `read`, for the objects `uris` of a listing.

    An object is not fetched if a larger object contains its events. Raises ObjectNotFound if an object was replaced
    after the listing; the caller then lists again.
    """
    return _together((events, problems) for _, events, problems in _each_object(uris, after))


def _together(parts: Iterable[tuple[list[Any], list[str]]]) -> tuple[list[Any], list[str]]:
    events: list[Any] = []
    problems: list[str] = []
    for some_events, some_problems in parts:
        events += some_events
        problems += some_problems
    return events, problems


def _each_object(uris: Iterable[str], after: int) -> Iterator[tuple[int, list[dict[str, Any]], list[str]]]:
    """Yield for each object in order: the last sequence number read so far, the object's new events, and problems."""
    ranges = [(*numbers, uri) for uri in uris if (numbers := sequence_numbers(uri))]
    for first, last, uri in sorted(ranges, key=lambda item: (item[0], -item[1])):
        if last <= after:
            continue
        events: list[dict[str, Any]] = []
        problems = []
        try:
            lines = storage.read_bytes(uri, LARGEST_BYTES).decode().splitlines()
        except ObjectNotFound:
            raise
        except (LauncherError, UnicodeDecodeError) as error:
            yield after, [], [f"{uri}: skipped, it cannot be read ({error})"]
            continue
        if len(lines) != last - first + 1:
            problems.append(f"{uri}: holds {len(lines):,} events, its name says {last - first + 1:,}")
            last = min(last, first + len(lines) - 1)
        for number, line in enumerate(lines[: last - first + 1], first):
            try:
                event = untrusted.parse_json(line)
                if not isinstance(event, dict):
                    raise ValueError("it is not a JSON object")
            except ValueError as error:
                problems.append(f"{uri}: line {number - first + 1} skipped, it is not valid JSON ({error})")
                continue
            if number > after:
                events.append(event)
        after = max(after, last)
        yield after, events, problems


def sequence_numbers(uri: str) -> tuple[int, int] | None:
    """First and last sequence number in an object's name, or None for an object of another kind."""
    match = _NAME.match(uri.rsplit("/", 1)[-1])
    numbers = (int(match.group(1)), int(match.group(2))) if match else (1, 0)
    return numbers if numbers[0] <= numbers[1] else None


def _name(first: int, last: int) -> str:
    return f"{first:08d}-{last:08d}.jsonl"


def _encode(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
