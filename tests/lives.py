"""Lives of a run on one node: launch.node with the trainer, as a container starts it, and signals at chosen moments."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from demo.processes import descendants
from tests import launching, warm
from tests.patience import PATIENCE_SECONDS

SIGTERM_BIT = 1 << (signal.SIGTERM - 1)


class Life:
    """A running launch.node; `lines` is its output so far. All its processes carry a mark in their environment or name.

    A warm life starts from processes that have imported torch: for moments after the imports.
    """

    def __init__(
        self,
        run_url: str,
        *flags: str,
        ranks: int = 2,
        environment: Mapping[str, str] | None = None,
        is_warm: bool = False,
    ):
        self._name = uuid.uuid4().hex[:15]
        mark = {warm.NAME: self._name} | ({"WARM_CHILDREN": "yes"} if is_warm else {})
        facts = {"RUN_URL": run_url, "DEVICE": "cpu", "RANKS_PER_NODE": str(ranks), "CLOUD": "", "MAX_USD": ""}
        facts |= {"SKYPILOT_CLUSTER_INFO": "", "AWS_EC2_METADATA_DISABLED": "true", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "launch.node", "-m", "trainer.train", *launching.TINY, "--train.device=cpu"]
        self.process = (warm.Popen if is_warm else subprocess.Popen)(
            [*command, *flags],
            cwd=launching.REPOSITORY,
            env={**os.environ, **facts, **(environment or {}), **mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=warm.default_signals,
        )
        self.lines: list[str] = []
        self._times: list[float] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._times.append(time.monotonic())
            self.lines.append(line.rstrip("\n"))

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def until(self, holds: Callable[[], object]) -> "Life":
        """Wait; fails when the life ends before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            ended = self.process.poll() is not None
            if time.monotonic() > deadline or (ended and not holds()):
                self.kill()
                raise AssertionError(f"ended with {self.process.returncode}, or nothing happened:\n{self.output}")
            time.sleep(0.05)
        return self

    def until_said(self, text: str) -> "Life":
        return self.until(lambda: self.has_said(text))

    def has_said(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def said_at(self, text: str) -> float:
        """When (monotonic)."""
        return next(at for at, line in zip(self._times, self.lines, strict=False) if text in line)

    def lives_on(self, text: str | None, seconds: float) -> bool:
        """Wait until it has said something, and so long after that. False if it has ended before."""
        while text and not self.has_said(text) and self.process.poll() is None:
            time.sleep(0.02)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def until_it_listens(self) -> "Life":
        """Python runs, and has installed its handlers: from here on nothing may end it with another code."""
        return self.until(lambda: _caught(self.process.pid) & SIGTERM_BIT)

    def until_it_runs(self, words: str) -> "Life":
        """A process with these words in its command, below launch.node."""
        return self.until(lambda: any(words in command for command in map(_command, descendants(self.process.pid))))

    def ask(self, number: int = signal.SIGTERM) -> "Life":
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return self

    def end(self) -> int:
        """The exit code. No process may be left."""
        try:
            code = self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        deadline = time.monotonic() + PATIENCE_SECONDS
        while left := self.alive():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"left behind: {left}\n{self.output}")
            time.sleep(0.05)
        self._reader.join(PATIENCE_SECONDS)
        return code

    def alive(self) -> list[tuple[int, str]]:
        """(process, command line) of all that this life has started and that still run."""
        found = []
        mark = f"{warm.NAME}={self._name}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_named = (folder / "comm").read_text().strip() == self._name
                is_ours = is_named or mark in (folder / "environ").read_bytes().split(b"\0")
                if is_ours and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append((int(folder.name), _command(int(folder.name))))
        return found

    def kill(self) -> None:
        for pid, _ in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def resumed_from(self) -> int | None:
        """The step that it said it begins at; None if it did not come so far."""
        found = re.search(r"resumed from step (\d+)|starting at step (0)", self.output)
        return int(found[1] or found[2]) if found else None


def _command(pid: int) -> str:
    """Its command line; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _caught(pid: int) -> int:
    """The signals that a process has handlers for, as bits; none if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[1], 16)
