"""Shows the supervisor of a node that this program makes progress, even while it prints nothing.

    pulse.beat()      called after each exchange between ranks; each step and each batch of an evaluation ends with one

launch.node sets PULSE_FILE and watches that file's modification time (launch/node/supervise.py). Without PULSE_FILE,
`beat` does nothing.
"""

import contextlib
import os
import time
from pathlib import Path

EVERY_SECONDS = 1.0
_due = 0.0


def beat() -> None:
    """Touch PULSE_FILE, once a second at most."""
    global _due
    now = time.monotonic()
    if now < _due:
        return
    _due = now + EVERY_SECONDS
    if path := os.environ.get("PULSE_FILE"):
        with contextlib.suppress(OSError):  # the launcher has ended, or its disk is full
            Path(path).touch()
