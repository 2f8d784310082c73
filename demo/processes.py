"""Starts child processes that end with the demo, and kills processes with all their descendants."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """To be called in a child process (`preexec_fn`).

    On Linux, the kernel then sends the signal `number` to the child when the parent dies, even if SIGKILL ends the
    parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    """Start a process in a new session, with standard output and errors in one pipe, line by line."""
    return subprocess.Popen(
        command,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def kill_tree(process: subprocess.Popen) -> None:
    """Send SIGKILL to a process and all its descendants, as if the machine had failed.

    A signal to the process group is not enough, because torchrun starts each worker in a new session.
    """
    if process.poll() is not None:
        return  # the id may belong to another process by now
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP)  # the process is stopped first, so that it cannot restart killed children
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Ids of the children of a process, their children, and so on."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents():
        children.setdefault(parent, []).append(child)
    found, waiting = [], [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found += new
        waiting += new
    return found


def _parents() -> list[tuple[int, int]]:
    """The pair (process, its parent) for all processes.

    It is read from /proc or, on systems without /proc (macOS), from `ps`.
    """
    if not Path("/proc/self/stat").exists():
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        return [(int(child), int(parent)) for child, parent in map(str.split, listing.splitlines())]
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            # The program's name, in parentheses, may contain spaces and parentheses.
            found.append((int(stat.parent.name), int(stat.read_text(errors="replace").rsplit(")", 1)[1].split()[1])))
    return found
