"""Defines the exit codes by which the launcher decides what to do next. docs/formats.md lists them too."""

import os
from pathlib import Path

# launch/node/container.sh has a copy of these codes. A managed job in sky/ restarts only after PREEMPTED and BAD_NODE,
# because its `recover_on_exit_codes` lists only these two.
OK = 0  # the program reached its end
FAILED = 1  # the job ends
PREEMPTED = 33  # the program was asked to stop and has saved its work: the job starts again
CAPPED = 34  # the cap on dollars is reached: the job ends
BAD_NODE = 35  # this machine is bad or hung: the job starts again on another one
NO_STORAGE = 36  # the bucket failed for too long: the job ends, because another machine would use the same bucket


def tell_launcher(code: int) -> None:
    """Write the code to the file EXIT_CODE_FILE, if it is set: torchrun exits with 1 for any failure of a worker."""
    if path := os.environ.get("EXIT_CODE_FILE"):
        whole = Path(f"{path}.{os.getpid()}")
        whole.write_text(f"{code}\n")
        whole.replace(path)  # atomic: the launcher may read at any moment
