"""Records after a program that its machine is still up, every ten seconds, in RUN_URL/machines/ATTEMPT/alive.json.

    python -m launch.node.alive

launch/node/container.sh runs this module in a separate container after each program. The module ends with the machine,
with the machine's next job, or after an hour. The cost report needs its record if the cloud does not list ended
machines, as Lambda, or does not answer.
"""

import contextlib
import os
import socket
import time

from core.console import run_entry
from core.errors import ConfigError, LauncherError
from core.exit_codes import OK
from core.run import paid
from core.run.folder import RunFolder
from core.run.machine import segment_started_at


def main(arguments: list[str]) -> int:
    if arguments:
        raise ConfigError("usage: python -m launch.node.alive")
    url, started_at = os.environ.get("RUN_URL"), segment_started_at()
    if not url or started_at is None:
        raise ConfigError("RUN_URL or SEGMENT_STARTED_AT is not set; launch/node/container.sh sets both")
    folder = RunFolder(url)
    deadline, attempt = time.monotonic() + paid.ALIVE_FOR_SECONDS, None
    while time.monotonic() < deadline:
        with contextlib.suppress(LauncherError):  # the store may answer the next time
            attempt = attempt or paid.attempt_at(folder, (socket.gethostname(), started_at))
            if attempt is None:
                break  # only the first node of a training has a record, which counts for all its nodes
            paid.alive(folder, attempt)
        time.sleep(paid.ALIVE_SECONDS)
    return OK


if __name__ == "__main__":
    run_entry(main)
