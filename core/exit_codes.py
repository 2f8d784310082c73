"""What an exit code tells the launcher. docs/formats.md lists them too."""

import os
from pathlib import Path

# SkyPilot's recover_on_exit_codes names PREEMPTED and BAD_NODE, never CAPPED.
OK = 0
FAILED = 1
PREEMPTED = 33
CAPPED = 34
BAD_NODE = 35


def tell_launcher(code: int) -> None:
    """torchrun exits with 1 whatever its workers say, so the code is also left in EXIT_CODE_FILE, if that is set."""
    if path := os.environ.get("EXIT_CODE_FILE"):
        whole = Path(f"{path}.{os.getpid()}")
        whole.write_text(f"{code}\n")
        whole.replace(path)  # the launcher reads all of it or nothing
