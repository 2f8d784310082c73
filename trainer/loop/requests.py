"""Requests to stop or to save, from wherever they come; the training loop looks at them between steps."""

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """Why a segment is to leave. `kind`: signal, spot or cap; `detail` says more."""

    kind: str
    detail: str


class Requests:
    """Thread-safe. The first reason to leave counts; a wish to save is granted once.

    `hurry` is called with the reason when the machine goes away (core.stop.ask): then there is little time.
    """

    def __init__(self, hurry: Callable[[str], None] = lambda reason: None) -> None:
        self._lock = threading.Lock()
        self._hurry = hurry
        self.leave: Notice | None = None
        self._save: str | None = None

    def ask_to_leave(self, kind: str, detail: str) -> None:
        with self._lock:
            self.leave = self.leave or Notice(kind, detail)
        if kind == "spot":
            self._hurry(f"spot notice: {detail}")

    def heard(self, signal: str) -> None:
        """What core.stop has heard, perhaps long ago: SIGTERM (a machine going away, `docker stop`), SIGUSR1, ..."""
        self.ask_to_leave("signal", signal)

    def ask_to_save(self, why: str) -> None:
        with self._lock:
            self._save = self._save or why

    def take_save(self) -> str | None:
        """Why to save now, if anybody asked since the last call."""
        with self._lock:
            why, self._save = self._save, None
            return why
