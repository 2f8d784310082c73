"""AWS's warnings that a spot machine will be taken away, from its metadata service (core.metadata).

Two minutes before, `spot/instance-action` appears: leave. Often earlier, `events/recommendations/rebalance` says
that the risk has grown: save once more, and go on. Both are polled every five seconds, as AWS advises (EC2 User
Guide, "Spot Instance interruption notices"). On AWS nothing that the service does ends the watch.
"""

import json
import logging
import threading
from collections.abc import Mapping

from core.metadata import Metadata, NoAnswer
from trainer.loop.requests import Requests

log = logging.getLogger("train")

POLL_SECONDS = 5.0
GIVE_UP_AFTER = 3


class SpotWatch:
    """Polls in a thread of its own; one per node. Elsewhere than on AWS it ends after a few attempts."""

    def __init__(self, requests: Requests, environment: Mapping[str, str], poll_seconds: float = POLL_SECONDS):
        self._requests = requests
        self._metadata = Metadata(environment)
        self._on_aws = environment.get("CLOUD", "").lower() == "aws"
        self._poll_seconds = poll_seconds
        self._rebalance_seen: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if not self._metadata.disabled:
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
                    log.warning("spot notices: %s answers again", self._metadata.endpoint)
                failures, self._on_aws = 0, True
            except NoAnswer as error:
                failures += 1
                if failures == GIVE_UP_AFTER:
                    # Elsewhere than on AWS this is normal; in a container on AWS it may be the hop limit.
                    log.log(
                        logging.WARNING if self._on_aws else logging.DEBUG,
                        "no spot notices: %s; if that does not pass, give the container the host's network, "
                        "or the instance a metadata hop limit of 2",
                        error,
                    )
                    if not self._on_aws:
                        return
            self._stop.wait(self._poll_seconds)

    def _look(self) -> None:
        """Raises NoAnswer, also for an answer that is no notice."""
        action = self._get("spot/instance-action", "action")
        if action is not None:
            self._requests.ask_to_leave("spot", f"{action['action']} at {action.get('time')}")
            return
        rebalance = self._get("events/recommendations/rebalance", "noticeTime")
        if rebalance is not None and rebalance["noticeTime"] != self._rebalance_seen:
            self._rebalance_seen = rebalance["noticeTime"]
            self._requests.ask_to_save(f"rebalance recommendation of {self._rebalance_seen}")

    def _get(self, path: str, key: str) -> dict | None:
        """The notice at `path`, which has `key`; None if there is none."""
        text = self._metadata.get(path)
        if text is None:
            return None
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or key not in found:
            raise NoAnswer(f"{self._metadata.endpoint} has something at {path} that is no notice: {text[:80]!r}")
        return found
