"""Supervises one child program: stores its output, passes requests to stop to its workers, and ends it if it hangs.

    child = Child(["torchrun", ...], environment, keep=journal.add)
    outcome = child.wait(hang_seconds=900)

Workers are children of torchrun. This module sends signals directly to the workers, because torchrun gives its children
only 30 seconds to save. A request to stop also creates STOP_FILE. If STOP_FILE exists, a worker knows that a SIGTERM is
a request to stop, or that the request came before the worker started (core.stop).

A program counts as hung if it neither prints a byte nor touches PULSE_FILE (core.pulse) for HANG_MINUTES.
"""

import codecs
import contextlib
import io
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

from core import pulse, stop
from core.environment import positive

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
# Minutes after which a silent program counts as hung. A collective gives up earlier, after ten minutes, and names the
# missing rank.
HANG_MINUTES = 15.0
# Seconds that a worker has to save before SIGKILL.
STOP_SECONDS = stop.SECONDS
DUMP_SECONDS = 15.0
# Longest wait in seconds for the end of the output. A process that outlives the child may keep the pipe open.
DRAIN_SECONDS = 10.0
DRAIN_AFTER_STOP_SECONDS = 3.0
KILL_SECONDS = 2.0
# Seconds to wait for the end of a process after SIGKILL. A process that has not ended by then waits in the kernel,
# perhaps forever.
AFTER_SIGKILL_SECONDS = 20.0
READ_BYTES = 1 << 16
# Longer lines are cut before they are stored.
LINE_CHARACTERS = 1 << 16


@dataclass(frozen=True)
class Outcome:
    """The end of a child: the return code (negative for a signal), and whether it hung or was asked to stop.

    `answered` means that the program seemed to hang, but made progress when it was asked to save. `stacks` means that
    the program printed its stacks.
    """

    returncode: int
    hung: bool = False
    stopped: bool = False
    answered: bool = False
    stacks: bool = False


class Child:
    """A running program. `keep` is called with every line of the program's output.

    The lines are also written to our standard output. `launched` means that the program is torchrun and its children
    are the workers. The event `asked` is set to stop the program.
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
        self._aborted = self._stacks = False
        self._is_gone = True  # whether the child has ended; False if even SIGKILL did not end it
        self._stop = asked or threading.Event()
        self._stop_file = environment.get("STOP_FILE")
        self._asked: set[int] = set()  # processes that got SIGTERM
        self._stop_seconds = STOP_SECONDS
        self._kill_at = math.inf
        self._pulse_file = environment.get("PULSE_FILE")
        self._pulse = 0  # the last known modification time (ns) of PULSE_FILE
        self._last_progress = time.monotonic()
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
            bufsize=0,
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
        hung = answered = False
        while self.process.poll() is None:
            time.sleep(POLL_SECONDS)
            pulse.sign_of_life()
            self._started |= descendants_of(self.process.pid)
            self._pass_stop_on()
            if self._is_overdue():
                log.warning("still running %.0f s after it was asked to stop: killed", stop_seconds)
                break
            if not self._stop.is_set() and self._silent_seconds() > hang_seconds:
                hung = True
                answered = self._end_hang(hang_seconds)
                break
        code = self._kill_rest()
        self._reader.join(DRAIN_AFTER_STOP_SECONDS if self._stop.is_set() else DRAIN_SECONDS)
        return Outcome(code, hung or not self._is_gone, self._stop.is_set(), answered, self._stacks)

    def _silent_seconds(self) -> float:
        """Seconds since the last output or pulse. A pulse is any change of PULSE_FILE's time, forwards or backwards."""
        if self._pulse_file:
            with contextlib.suppress(FileNotFoundError):
                pulse = Path(self._pulse_file).stat().st_mtime_ns
                if pulse != self._pulse:
                    self._pulse, self._last_progress = pulse, time.monotonic()
        return time.monotonic() - self._last_progress

    def _pass_stop_on(self) -> None:
        """Send SIGTERM once to every worker, including new workers. If there is no worker yet, send it to the child."""
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

    def _end_hang(self, hang_seconds: float) -> bool:
        """Ask the workers to save and to exit. If the program does not exit, make all threads print their stacks.

        The workers can save if the program is slow but not stuck, or if one rank alone is stuck. Returns whether the
        program exited and had stored something new before it did.
        """
        log.error("neither output nor a step for %.0f s: the program is asked to save and to end", hang_seconds)
        _send(signal.SIGUSR1, self._workers() or [self.process.pid])
        before = self._pulse
        if self._gone_within(min(STOP_SECONDS, hang_seconds)):
            self._silent_seconds()
            return self._pulse != before
        log.error("it does not react: the stacks of its workers follow, as far as they can still print them")
        self._aborted = True
        _send(signal.SIGABRT, self._workers() or [self.process.pid])
        self._gone_within(DUMP_SECONDS)
        return False

    def _gone_within(self, seconds: float) -> bool:
        """Whether the child ends within `seconds`. A request to stop may shorten this time."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline and not self._is_overdue():
            time.sleep(POLL_SECONDS)
            self._pass_stop_on()
        return self.process.returncode is not None

    def _workers(self) -> list[int]:
        if not self._workers_are_children:
            return [self.process.pid]
        return [pid for pid, parent in parents().items() if parent == self.process.pid]

    def _kill_rest(self) -> int:
        """Kill all remaining processes.

        Returns the child's return code, or the code of SIGKILL if SIGKILL does not end the child.
        """
        _send(signal.SIGKILL, [*self._started, self.process.pid])
        try:
            return self.process.wait(AFTER_SIGKILL_SECONDS)
        except subprocess.TimeoutExpired:
            log.error("process %d is killed and does not end: it waits for a driver or a disk", self.process.pid)
            self._is_gone = False
            return -signal.SIGKILL

    def _read(self) -> None:
        shown = True
        lines = _Lines(self._take)
        decode = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True).decode
        while data := self.process.stdout.read(READ_BYTES):
            self._last_progress = time.monotonic()
            text = decode(data)
            lines.add(text)
            if shown:
                try:
                    sys.stdout.write(text)
                    sys.stdout.flush()
                # The output of this program cannot be written any more. The child's output is still read, because the
                # child would block on a full pipe.
                except OSError:
                    shown = False
        lines.add(decode(b"", True))
        lines.end()

    def _take(self, line: str) -> None:
        # The first line that Python's fault handler prints.
        self._stacks |= self._aborted and "Fatal Python error" in line
        self._keep(line)


class _Lines:
    """Cuts text into lines for `keep`.

    To limit the memory, a line is cut after LINE_CHARACTERS, and a note marks the cut.
    """

    def __init__(self, keep: Callable[[str], None]):
        self._keep = keep
        self._parts: list[str] = []
        self._held = self._cut = 0

    def add(self, text: str) -> None:
        *whole, rest = text.split("\n")
        for line in whole:
            self._take(line)
            self._give()
        self._take(rest)

    def end(self) -> None:
        """Pass the last line to `keep`, even if it has no line end."""
        if self._parts:
            self._give()

    def _take(self, text: str) -> None:
        taken = text[: LINE_CHARACTERS - self._held]
        self._cut += len(text) - len(taken)
        self._held += len(taken)
        if taken:
            self._parts.append(taken)

    def _give(self) -> None:
        more = f" ... ({self._cut:,} more characters)" if self._cut else ""
        self._keep("".join(self._parts) + more)
        self._parts, self._held, self._cut = [], 0, 0


def hang_minutes(environment: Mapping[str, str]) -> float:
    """The minutes without output and without steps after which a program counts as hung.

    Raises ConfigError.
    """
    return positive(environment, "HANG_MINUTES") or HANG_MINUTES


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
    """The parent of each process in this container, by process id. Zombies are left out."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name of the command, in parentheses, may contain spaces.
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
