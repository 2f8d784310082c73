"""Supervises one child program: stores its output, passes requests to stop to its workers, and ends a hang.

    child = Child(["torchrun", ...], environment, keep=journal.add)
    outcome = child.wait(hang_seconds=900)

Workers are children of torchrun. They get signals directly, because torchrun gives its children only 30 seconds to
save. STOP_FILE exists after a request to stop. It marks a SIGTERM as such a request, and shows a worker that starts
later that there was one (core.stop).
"""

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core import stop
from core.errors import ConfigError

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
# Longer than the ten minutes after which a collective gives up and names the missing rank.
HANG_MINUTES = 15.0
# Grace period for a worker to save before SIGKILL.
STOP_SECONDS = stop.SECONDS
DUMP_SECONDS = 15.0
# Limit of waiting for output, which a process that outlives the child may hold open.
DRAIN_SECONDS = 10.0
DRAIN_AFTER_STOP_SECONDS = 3.0
KILL_SECONDS = 2.0


@dataclass(frozen=True)
class Outcome:
    """The end of a child: return code (negative: the signal), and whether it hung or was asked to stop."""

    returncode: int
    hung: bool = False
    stopped: bool = False


class Child:
    """A running program. `keep` gets every line of its output, which also goes to our standard output.

    `launched` means that the program is torchrun and its children are the workers. `asked` is set to stop it.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        keep: Callable[[str], None],
        launched: bool = False,
        asked: threading.Event | None = None,
    ):
        self._workers_are_children = launched
        self._keep = keep
        self._stop = asked or threading.Event()
        self._stop_file = environment.get("STOP_FILE")
        self._asked: set[int] = set()  # processes that got SIGTERM
        self._stop_seconds = STOP_SECONDS
        self._kill_at = math.inf
        self._last_output = time.monotonic()
        self._started: set[int] = set()  # all descendants of the child, orphans included
        self.process = subprocess.Popen(
            command,
            # SIGABRT makes Python print the stacks of all threads before it dies, even in a stuck C call.
            env={
                **environment,
                "PYTHONFAULTHANDLER": "1",
                "PYTHONUNBUFFERED": "1",
                "PARENT_PID": str(os.getpid()),  # the child ends with this process
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="output of the child", daemon=True)
        self._reader.start()

    def stop(self, *_: object) -> None:
        """Ask the workers to save and exit. May serve as a signal handler."""
        self._stop.set()

    def wait(self, hang_seconds: float, stop_seconds: float = STOP_SECONDS) -> Outcome:
        """Wait until the child and all its descendants have ended."""
        self._stop_seconds = stop_seconds
        hung = False
        while self.process.poll() is None:
            time.sleep(POLL_SECONDS)
            self._started |= descendants_of(self.process.pid)
            self._pass_stop_on()
            if self._is_overdue():
                log.warning("still running %.0f s after it was asked to stop: killed", stop_seconds)
                break
            if not self._stop.is_set() and time.monotonic() - self._last_output > hang_seconds:
                hung = True
                self._end_hang(hang_seconds)
                break
        self._kill_rest()
        self._reader.join(DRAIN_AFTER_STOP_SECONDS if self._stop.is_set() else DRAIN_SECONDS)
        return Outcome(self.process.returncode, hung, self._stop.is_set())

    def _pass_stop_on(self) -> None:
        """Send SIGTERM once to every worker, new ones included; to the launcher before there are workers."""
        if not self._stop.is_set():
            return
        if self._kill_at == math.inf:
            self._kill_at = time.monotonic() + self._stop_seconds
            log.info("the program is asked to stop and gets %.0f s to save", self._stop_seconds)
            if self._stop_file:
                Path(self._stop_file).touch()
        workers = set(self._workers())
        if not workers and not self._asked:
            workers = {self.process.pid}
        _send(signal.SIGTERM, workers - self._asked)
        self._asked |= workers

    def _is_overdue(self) -> bool:
        return time.monotonic() > self._kill_at

    def _end_hang(self, hang_seconds: float) -> None:
        """Ask the workers to save, which works if only one rank waits; then make all threads print their stacks."""
        log.error("no line of output for %.0f s: the program counts as hung", hang_seconds)
        _send(signal.SIGUSR1, self._workers() or [self.process.pid])
        if self._gone_within(min(STOP_SECONDS, hang_seconds)):
            return
        log.error("it does not react: the stacks of its workers follow")
        _send(signal.SIGABRT, self._workers() or [self.process.pid])
        self._gone_within(DUMP_SECONDS)

    def _gone_within(self, seconds: float) -> bool:
        """Whether the child ends in that time, which a request to stop may shorten."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline and not self._is_overdue():
            time.sleep(POLL_SECONDS)
            self._pass_stop_on()
        return self.process.returncode is not None

    def _workers(self) -> list[int]:
        if not self._workers_are_children:
            return [self.process.pid]
        return [pid for pid, parent in parents().items() if parent == self.process.pid]

    def _kill_rest(self) -> None:
        _send(signal.SIGKILL, [*self._started, self.process.pid])
        self.process.wait()

    def _read(self) -> None:
        shown = True
        for line in self.process.stdout:
            self._last_output = time.monotonic()
            self._keep(line.rstrip("\n"))
            if shown:
                try:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                except OSError:  # our reader is gone; keep draining, or the child blocks on a full pipe
                    shown = False


def hang_minutes(environment: Mapping[str, str]) -> float:
    """HANG_MINUTES: silence after which a program counts as hung. Raises ConfigError."""
    text = environment.get("HANG_MINUTES") or str(HANG_MINUTES)
    try:
        if 0 < float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise ConfigError(f"HANG_MINUTES is {text!r}, must be a number above 0")


def _send(number: int, pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_descendants() -> None:
    """Send SIGKILL to all descendants of this process."""
    deadline = time.monotonic() + KILL_SECONDS
    while (found := descendants_of(os.getpid())) and time.monotonic() < deadline:
        _send(signal.SIGKILL, found)
        time.sleep(0.05)


def parents() -> dict[int, int]:
    """The parent of each process in this container, by process id; without zombies."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The command, in parentheses, may contain spaces.
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(stat.parent.name)] = int(parent)
    return found


def descendants_of(pid: int) -> set[int]:
    parent_of = parents()
    found = {pid}
    while new := {child for child, parent in parent_of.items() if parent in found} - found:
        found |= new
    return found - {pid}
