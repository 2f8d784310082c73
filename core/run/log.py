"""Stores the output of programs in the run's folder: RUN_URL/logs/ATTEMPT, a journal with an event per line.

On a rented machine launch.node stores all output of the program. A program that a person starts stores its own log
lines by `StoredLog.begin`.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Self

from core import secrets, storage
from core.run.folder import RunFolder
from core.run.journal import Journal

FLUSH_SECONDS = 10.0
WAITING_BYTES = 32 << 20


class Output:
    """Stores lines in a journal; thread-safe.

    If lines arrive faster than they can be stored, or the store does not answer, at most WAITING_BYTES wait in memory.
    Further lines are left out; a line in the log then says how many.
    """

    def __init__(self, folder: str):
        self._journal = Journal(folder, FLUSH_SECONDS)
        self._lock = threading.Lock()
        self._scrub = secrets.scrubber()
        self._left_out = 0

    def add(self, line: str, at: float | None = None) -> None:
        now = time.time() if at is None else at
        with self._lock:
            if self._journal.waiting_bytes > WAITING_BYTES:
                self._left_out += 1
                return
            self._say_left_out(now)
        self._journal.add({"time": now, "line": self._scrub(line)})

    def close(self) -> None:
        with self._lock:
            self._say_left_out(time.time())
        self._journal.close()

    def _say_left_out(self, now: float) -> None:
        if self._left_out:
            count, self._left_out = self._left_out, 0
            said = f"({count:,} lines are left out here, because the store was too slow)"
            self._journal.add({"time": now, "line": said})


class StoredLog(logging.Handler):
    """A logging handler that stores the log lines of this process among the output of the program."""

    def __init__(self, output: Output):
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        self._output.add(self.format(record), record.created)

    @classmethod
    def begin(cls, folder: RunFolder, name: str, environment: Mapping[str, str] = os.environ) -> Self | None:
        """Store the log lines of this process from now on, as an attempt with this name.

        If launch.node started this process, it already stores the lines. Then this function returns None.
        """
        if environment.get("PULSE_FILE"):
            return None
        attempt = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{name}"
        handler = cls(Output(storage.join(folder.logs, attempt)))
        logging.getLogger().addHandler(handler)
        return handler

    def end(self) -> None:
        """Store the remaining lines. A second call does nothing."""
        if self in logging.getLogger().handlers:
            logging.getLogger().removeHandler(self)
            self._output.close()
