"""Runs a command with a time limit that holds even if SIGKILL does not end the process.

    done = run_within(["nvidia-smi"], 60.0)

A process that waits inside a driver ends only when the driver answers. subprocess.run would wait for such a process
even after the limit, and a rented machine would keep running.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence


def run_within(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a command. Returns its exit code and its output as text. Raises subprocess.TimeoutExpired, OSError.

    After the limit, the command and its child processes are killed. The function does not wait for their end.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
