"""Watches for the provider's notices that a spot machine will be taken away (clouds/base.py, Cloud.interruptions).

A notice to leave asks the run to save and exit; AWS sends it two minutes ahead. A warning that the risk has grown asks
for one more save. AWS advises to ask every five seconds (EC2 User Guide, "Spot Instance interruption notices"). On a
known provider no failure of its service ends the watch.
"""

import logging
import threading
from collections.abc import Mapping

from clouds.base import Unavailable
from clouds.providers import CLOUDS, cloud_named
from trainer.loop.requests import Requests

log = logging.getLogger("train")

POLL_SECONDS = 5.0
GIVE_UP_AFTER = 3


class SpotWatch:
    """Polls in a thread, one per node. If the provider is unknown, asks all of them and ends after a few failures."""

    def __init__(self, requests: Requests, environment: Mapping[str, str], poll_seconds: float = POLL_SECONDS):
        self._requests = requests
        cloud = cloud_named(environment.get("CLOUD"))
        self._is_known = cloud is not None
        sources = [each.interruptions(environment) for each in ([cloud] if cloud else CLOUDS.values())]
        self._sources = [ask for ask in sources if ask is not None]
        self._poll_seconds = poll_seconds
        self._warning_seen: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if self._sources:
            self._thread = threading.Thread(target=self._run, name="spot watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        failures = 0
        while not self._stop.is_set() and self._requests.leave is None:
            try:
                self._look()
                if failures >= GIVE_UP_AFTER:
                    log.warning("spot notices: the provider answers again")
                failures, self._is_known = 0, True
            except Unavailable as error:
                failures += 1
                if failures == GIVE_UP_AFTER:
                    # Normal on an unknown provider; in a container on AWS the hop limit may be the reason.
                    log.log(
                        logging.WARNING if self._is_known else logging.DEBUG,
                        "no spot notices: %s; if that does not pass, give the container the host's network, "
                        "or the instance a metadata hop limit of 2",
                        error,
                    )
                    if not self._is_known:
                        return
            self._stop.wait(self._poll_seconds)

    def _look(self) -> None:
        """Passes a new notice on. Raises Unavailable if no source answers."""
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
        if notice is None:
            return
        if notice.leave:
            self._requests.ask_to_leave("spot", notice.detail)
        elif notice.detail != self._warning_seen:
            self._warning_seen = notice.detail
            self._requests.ask_to_save(notice.detail)
