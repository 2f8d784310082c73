"""Requests to stop: SIGTERM (a machine going away, `docker stop`) and SIGUSR1 (asked by hand)."""

import signal
from collections.abc import Callable


class StopRequest:
    """Remembers the first request to stop; training looks at it between steps."""

    def __init__(self) -> None:
        self.kind: str | None = None

    def listen(self) -> Callable[[], None]:
        """Install the handlers; call the result to restore the ones before."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGUSR1)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        return restore

    def _handle(self, number: int, _: object) -> None:
        self.kind = self.kind or signal.Signals(number).name
