"""Writes the ledger of a run: the machine of each segment and its time by phase.

    RUN_URL/ledger/segment-000001/start.jsonl                    created exclusively, which claims the segment's number
    RUN_URL/ledger/segment-000001/events/00000000-00000004.jsonl its timeline (core.run.journal)

The timeline is a list of spans without gaps. A span splits its wall time into seconds by phase, which add up to its
length. So the phases of a segment add up to its time, and their dollars add up to the bill. A heartbeat ends and stores
the current span every few seconds, so a SIGKILL loses only the record of the last seconds. docs/formats.md describes
each field.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from core import storage
from core.errors import ObjectExists, RunError
from core.run.folder import RunFolder
from core.run.journal import Journal
from core.run.machine import Machine, launcher_facts
from core.run.phases import LEDGER_PHASES, STEP_PHASES, check_mark
from core.stores import meter

VERSION = 1
CLOCK_JUMP_SECONDS = 5.0


def claim_segment(folder: RunFolder, start_event: Mapping[str, Any]) -> int:
    """Claim the next segment number by creating its start object. Returns the number.

    Machines that start at the same time get different numbers; the highest number owns the run.
    """
    number = (folder.segment_numbers() or [0])[-1] + 1
    while True:
        event = {"event": "start", "version": VERSION, "segment": number, **start_event}
        data = (json.dumps(event, separators=(",", ":")) + "\n").encode()
        try:
            storage.write_bytes(folder.segment(number).start, data, exclusive=True)
            return number
        except ObjectExists:
            number += 1


def check_owner(folder: RunFolder, segment: int) -> None:
    """Raises RunError if a newer segment has taken over this run: this machine has then been replaced."""
    newest = (folder.segment_numbers() or [segment])[-1]
    if newest > segment:
        raise RunError(
            f"{folder}: segment {newest} has taken over this run, so segment {segment} stops writing; two "
            f"machines may not train one run: stop this machine, or give it another run.url"
        )


class Ledger:
    """Writes one segment's ledger. One phase is current at any moment, and spans have no gaps between them.

    The paid time of the segment began at `started_at`, and this process at `process_started_at` (unix seconds). The
    time between the two is booked as phase `setup`. The time from the start of the process until the first `switch` is
    booked as `init`. Times advance by the monotonic clock, so no span becomes negative if the wall clock is set back.
    Such a jump is recorded as a mark.
    """

    def __init__(
        self,
        folder: RunFolder,
        machine: Machine,
        program: Mapping[str, Any],
        started_at: float | None = None,
        process_started_at: float | None = None,
        flush_seconds: float | None = None,
    ):
        now = time.time()
        self._wall_origin = now
        self._monotonic_origin = time.monotonic()
        process_started_at = now if process_started_at is None else min(process_started_at, now)
        started_at = process_started_at if started_at is None else min(started_at, process_started_at)
        self.folder = folder
        self.machine = machine
        self.started_at = started_at
        self.process_started_at = process_started_at
        self.segment = claim_segment(
            folder,
            {
                "time": started_at,
                "machine": asdict(machine),
                "program": dict(program),
                "launcher": launcher_facts(os.environ),
                "tags": [tag.strip() for tag in os.environ.get("RUN_TAGS", "").split(",") if tag.strip()],
            },
        )
        self._lock = threading.RLock()
        self._phase = "init"
        self._phase_start = process_started_at
        self._span_start = started_at
        self._seconds: dict[str, float] = {"setup": process_started_at - started_at}
        self._steps: list[list[float]] = []
        self._totals: dict[str, float] = {}
        self._step_totals = [0.0 for _ in STEP_PHASES]
        self._jump_seen = 0.0
        self._closed = False
        self.journal = Journal(folder.segment(self.segment).events, flush_seconds, self._heartbeat)

    def now(self) -> float:
        """Unix seconds that never decrease within this process."""
        return self._wall_origin + time.monotonic() - self._monotonic_origin

    def switch(self, phase: str) -> None:
        """Begin `phase`. All time from now until the next `switch` belongs to this phase."""
        if phase not in LEDGER_PHASES:
            raise ValueError(f"unknown phase {phase!r}")
        with self._lock:
            self._settle()
            self._phase = phase

    @contextlib.contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Begin `phase` for the time of the block, then continue the phase before it."""
        before = self._phase
        self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)

    def step_done(self, step: int) -> None:
        """Complete optimizer step `step`, counted from 1.

        Its time is the train and data-wait time since the previous step.
        """
        with self._lock:
            self._settle()
            seconds = [self._totals.get(phase, 0.0) for phase in STEP_PHASES]
            self._steps.append(
                [step, *(round(now - before, 6) for now, before in zip(seconds, self._step_totals, strict=True))]
            )
            self._step_totals = seconds

    def mark(self, name: str, **details: Any) -> None:
        """Record a mark, a dated fact. Raises ValueError if core.run.phases.MARKS does not list it."""
        check_mark(name, set(details))
        self.journal.add({"event": "mark", "time": self.now(), "name": name, **details})

    def elapsed_seconds(self) -> float:
        return self.now() - self.started_at

    def spent_usd(self) -> float | None:
        """Dollars of this segment so far, or None if the price is unknown."""
        price = self.machine.price
        return price and price.usd(self.elapsed_seconds())

    def flush(self) -> bool:
        self._heartbeat()
        return self.journal.flush()

    def close(self, reason: str, step: int | None = None, **details: Any) -> bool:
        """Write the last span and the reason for the end, and store everything. A second call does nothing.

        The reason is finished, preempted, failed, cap or interrupted. Returns False if the store failed.
        """
        with self._lock:
            if self._closed:
                return True
            self._closed = True
            self._emit_span()
            self.journal.add({"event": "end", "time": self.now(), "reason": reason, "step": step, **details})
        return self.journal.close()

    def _settle(self) -> None:
        now = self.now()
        self._add(self._phase, now - self._phase_start)
        self._phase_start = now

    def _add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        self._totals[phase] = self._totals.get(phase, 0.0) + seconds

    def _heartbeat(self) -> None:
        with self._lock:
            if not self._closed:
                self._emit_span()

    def _emit_span(self) -> None:
        self._settle()
        end = self._phase_start
        jump = time.time() - end
        if abs(jump - self._jump_seen) > CLOCK_JUMP_SECONDS:
            self.journal.add({"event": "mark", "time": end, "name": "clock_jump", "seconds": jump - self._jump_seen})
            self._jump_seen = jump
        if end > self._span_start:
            phases = {name: seconds for name in LEDGER_PHASES if (seconds := self._seconds.get(name, 0.0)) > 0}
            span = {"event": "span", "start": self._span_start, "end": end, "phases": phases, "steps": self._steps}
            moved = meter.moved()
            self.journal.add(span | ({"moved": moved} if any(moved) else {}))
        self._span_start = end
        self._seconds = {}
        self._steps = []
