"""Child processes that never outlive the demo."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence


def die_with_parent() -> None:
    """For `preexec_fn`. Linux: the kernel ends the child when we die, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


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


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL for a process and all it started, as when a machine goes away."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
