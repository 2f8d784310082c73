"""Exit codes by which the launcher decides what to do next. docs/formats.md lists them too."""

import os
from pathlib import Path

# SkyPilot's recover_on_exit_codes names PREEMPTED and BAD_NODE, never CAPPED or NO_STORAGE: another machine has no more
# money, and no better bucket.
OK = 0
FAILED = 1
PREEMPTED = 33
CAPPED = 34
BAD_NODE = 35
NO_STORAGE = 36


def tell_launcher(code: int) -> None:
    """Write the code to EXIT_CODE_FILE, if set, because torchrun exits with 1 whatever its workers exit with."""
    if path := os.environ.get("EXIT_CODE_FILE"):
        whole = Path(f"{path}.{os.getpid()}")
        whole.write_text(f"{code}\n")
        whole.replace(path)  # atomic: the launcher may read at any moment
