"""Requests to stop or to save, from wherever they come; the training loop looks at them between steps."""

import ctypes
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """Why a segment is to leave. `kind`: signal, spot or cap; `detail` says more."""

    kind: str
    detail: str


class Requests:
    """Thread-safe. The first reason to leave counts; a wish to save is granted once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.leave: Notice | None = None
        self._save: str | None = None

    def ask_to_leave(self, kind: str, detail: str) -> None:
        with self._lock:
            self.leave = self.leave or Notice(kind, detail)

    def ask_to_save(self, why: str) -> None:
        with self._lock:
            self._save = self._save or why

    def take_save(self) -> str | None:
        """Why to save now, if anybody asked since the last call."""
        with self._lock:
            why, self._save = self._save, None
            return why

    def listen_to_parent(self) -> None:
        """Linux: have the kernel send SIGTERM when torchrun dies, so that no rank outlives it and holds a GPU."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    def listen_to_signals(self) -> Callable[[], None]:
        """SIGTERM (a machine going away, `docker stop`) and SIGUSR1 (asked by hand). Call the result to undo it."""

        def handle(number: int, _: object) -> None:
            # No lock: a handler may interrupt the very code that holds it.
            self.leave = self.leave or Notice("signal", signal.Signals(number).name)

        before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGUSR1)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        return restore
