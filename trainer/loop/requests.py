"""Collects requests to stop or to save: from signals, the cap, a failing store, and a spot machine's provider.

The training loop reads them between steps. If the provider announces the end of a spot machine (clouds/base.py,
Cloud.interruptions), the run stops. If it warns that the risk has grown, the run saves one more checkpoint.
SpotWatch polls every five seconds, as AWS advises (EC2 User Guide, "Spot Instance interruption notices").
"""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from clouds.base import Unavailable
from clouds.providers import CLOUDS, cloud_named

log = logging.getLogger("train")

POLL_SECONDS = 5.0
GIVE_UP_AFTER = 3
KINDS = ("signal", "spot", "cap", "storage")  # kinds of requests to stop; the ranks exchange indices of this tuple


@dataclass(frozen=True)
class StopRequest:
    """The reason why a segment must stop. `kind` is one of KINDS; `detail` is for people."""

    kind: str
    detail: str


class StopRequests:
    """The requests that have arrived. Thread-safe. Only the first request to stop counts.

    If the machine will be taken away, little time is left. Then `hurry` (core.stop.ask) is called with the reason.
    """

    def __init__(self, hurry: Callable[[str], None] = lambda reason: None) -> None:
        self._lock = threading.Lock()
        self._hurry = hurry
        self.stop: StopRequest | None = None
        self._save: str | None = None

    def request_stop(self, kind: str, detail: str) -> None:
        with self._lock:
            self.stop = self.stop or StopRequest(kind, detail)
        if kind == "spot":
            self._hurry(f"spot notice: {detail}")

    def on_signal(self, signal: str) -> None:
        """Take a signal that core.stop has caught: SIGTERM (`docker stop`, a machine that is taken away), SIGUSR1."""
        self.request_stop("signal", signal)

    def request_save(self, why: str) -> None:
        with self._lock:
            self._save = self._save or why

    def take_save(self) -> str | None:
        """The reason to save now, if a request to save has arrived since the last call."""
        with self._lock:
            why, self._save = self._save, None
            return why


class SpotWatch:
    """Polls the interruption notices of the provider in a thread. One instance per node.

    If CLOUD names no known provider, all of CLOUDS are asked. If none of them answers a few times in a row, the watch
    ends. Once a provider is known, no failure ends the watch.
    """

    def __init__(self, requests: StopRequests, environment: Mapping[str, str], poll_seconds: float = POLL_SECONDS):
        self._requests = requests
        cloud = cloud_named(environment.get("CLOUD"))
        self._is_known = cloud is not None
        sources = [each.interruptions(environment) for each in ([cloud] if cloud else CLOUDS.values())]
        self._sources = [ask for ask in sources if ask is not None]
        self._poll_seconds = poll_seconds
        self._warning_seen: str | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if self._sources:
            self._thread = threading.Thread(target=self._run, name="spot watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        failures = 0
        while not self._closed.is_set() and self._requests.stop is None:
            try:
                self._poll()
                if failures >= GIVE_UP_AFTER:
                    log.warning("spot notices: the provider answers again")
                failures, self._is_known = 0, True
            except Unavailable as error:
                failures += 1
                if failures == GIVE_UP_AFTER:
                    # If the provider is unknown, a missing answer is normal, so only the debug log has this message. In
                    # a container on AWS, the hop limit may be the cause.
                    log.log(
                        logging.WARNING if self._is_known else logging.DEBUG,
                        "cannot read spot notices: %s; if this lasts, give the container the host's network, "
                        "or the instance a metadata hop limit of 2",
                        error,
                    )
                    if not self._is_known:
                        return
            self._closed.wait(self._poll_seconds)

    def _poll(self) -> None:
        """Ask the provider once. A new notice becomes a request. Raises Unavailable if no source answers."""
        for ask in self._sources:
            try:
                notice = ask()
            except Unavailable as error:
                problem = error
                continue
            self._sources = [ask]
            break
        else:
            raise problem
        if notice is not None and notice.leave:
            self._requests.request_stop("spot", notice.detail)
        elif notice is not None and notice.detail != self._warning_seen:
            self._warning_seen = notice.detail
            self._requests.request_save(notice.detail)
