"""Shows the supervisor of a node that this program makes progress, even while it prints nothing.

    pulse.beat()            called at the end of each step and of each batch of an evaluation
    pulse.sign_of_life()    called by the supervisor, so that launch/node/switch.py does not end the machine

launch.node sets PULSE_FILE and watches the modification time of that file (launch/node/supervise.py).
launch/node/container.sh sets ALIVE_FILE. If PULSE_FILE is not set, `beat` does nothing. If ALIVE_FILE is not set,
`sign_of_life` does nothing.
"""

import contextlib
import os
import time
from pathlib import Path

EVERY_SECONDS = 1.0
_due: dict[str, float] = {}


def beat() -> None:
    """Touch PULSE_FILE, once a second at most."""
    _touch("PULSE_FILE")


def sign_of_life() -> None:
    """Touch ALIVE_FILE, once a second at most."""
    _touch("ALIVE_FILE")


def _touch(variable: str) -> None:
    now = time.monotonic()
    if now < _due.get(variable, 0.0):
        return
    _due[variable] = now + EVERY_SECONDS
    if path := os.environ.get(variable):
        with contextlib.suppress(OSError):  # the launcher has ended, or its disk is full
            Path(path).touch()
