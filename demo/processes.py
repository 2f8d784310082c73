"""Child processes that never outlive the demo."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """For `preexec_fn`. Linux: the kernel sends the child this signal when we die, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    """A process group of its own; its output, errors included, comes line by line."""
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
    """SIGKILL for a process and all that descend from it, as when a machine goes away.

    A process group is not enough: torchrun puts each of its workers into a session of its own.
    """
    if process.poll() is not None:
        return  # its number may be another process's by now
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP)  # it must not restart what we kill
    for pid in [process.pid, *descendants(process.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Children, their children and so on."""
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
    """(process, its parent) of all processes: from /proc, or from `ps` where there is none (macOS)."""
    if not Path("/proc/self/stat").exists():
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        return [(int(child), int(parent)) for child, parent in map(str.split, listing.splitlines())]
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            # The name of the program, in parentheses, may hold spaces and parentheses itself.
            found.append((int(stat.parent.name), int(stat.read_text(errors="replace").rsplit(")", 1)[1].split()[1])))
    return found
