"""Runs one child program: its output goes on and into storage, requests to stop reach its workers, a hang ends it.

    child = Child(["torchrun", ...], environment, keep=journal.add)
    outcome = child.wait(hang_seconds=900)

The program that trains is a child of torchrun. It gets signals itself, because torchrun gives its children only
30 seconds to save. Torch-free.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
# What a worker that was asked to stop may take to save; then it is killed.
STOP_SECONDS = 90.0
DUMP_SECONDS = 15.0
# A process that outlives the child may hold its output open; we do not wait for it.
DRAIN_SECONDS = 10.0


@dataclass(frozen=True)
class Outcome:
    """How the child ended: its return code (negative: the signal), and whether it hung or was asked to stop."""

    returncode: int
    hung: bool = False
    stopped: bool = False


class Child:
    """A running program. `keep` gets every line of its output, which also goes to our standard output.

    `launched`: the program is torchrun, and its children are the workers.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        keep: Callable[[str], None],
        launched: bool = False,
    ):
        self._workers_are_children = launched
        self._keep = keep
        self._stop = threading.Event()
        self._last_output = time.monotonic()
        self._started: set[int] = set()  # all processes below the child, also once it has left them behind
        self.process = subprocess.Popen(
            command,
            # SIGABRT makes Python print the stacks of all threads before it dies, even in a stuck C call.
            env={**environment, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"},
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
        """Ask the workers to save and leave. Fit to be a signal handler."""
        self._stop.set()

    def wait(self, hang_seconds: float, stop_seconds: float = STOP_SECONDS) -> Outcome:
        """Until the child is gone, and all it started."""
        asked_at = None
        hung = False
        while self.process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            self._started |= descendants_of(self.process.pid)
            if self._stop.is_set() and asked_at is None:
                asked_at = now
                self._signal(signal.SIGTERM)
            if asked_at is not None and now - asked_at > stop_seconds:
                log.warning("still running %.0f s after it was asked to stop: killed", stop_seconds)
                break
            if now - self._last_output > hang_seconds:
                hung = True
                self._end_hang(hang_seconds)
                break
        self._kill_rest()
        self._reader.join(DRAIN_SECONDS)
        return Outcome(self.process.returncode, hung, self._stop.is_set())

    def _end_hang(self, hang_seconds: float) -> None:
        """Ask to save, which works if only one rank waits; then have all threads print where they are."""
        log.error("no line of output for %.0f s: taken as hung", hang_seconds)
        self._signal(signal.SIGUSR1)
        if self._gone_within(min(STOP_SECONDS, hang_seconds)):
            return
        log.error("it does not react: the stacks of its workers follow")
        self._signal(signal.SIGABRT)
        self._gone_within(DUMP_SECONDS)

    def _gone_within(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None

    def _signal(self, number: int) -> None:
        parent_of = parents() if self._workers_are_children else {}
        workers = [pid for pid, parent in parent_of.items() if parent == self.process.pid]
        for pid in workers or [self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _kill_rest(self) -> None:
        for pid in [*self._started, self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
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
                except OSError:  # whoever read our output is gone; the child must not block on a full pipe
                    shown = False


def parents() -> dict[int, int]:
    """Process → its parent, of everything that runs in this container."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The command, in parentheses, may hold spaces.
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return found


def descendants_of(pid: int) -> set[int]:
    parent_of = parents()
    found = {pid}
    while new := {child for child, parent in parent_of.items() if parent in found} - found:
        found |= new
    return found - {pid}
