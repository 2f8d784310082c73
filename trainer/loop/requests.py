"""Collects requests to stop or to save: from signals, from the spending cap, and from AWS about a spot machine.

The training loop reads them between steps. AWS announces the end of a spot machine in its metadata service
(core.metadata): two minutes before it, `spot/instance-action` appears, which asks the run to stop. Often earlier,
`events/recommendations/rebalance` says that the risk has grown, which asks for one more checkpoint. SpotWatch polls
both every five seconds, as AWS advises (EC2 User Guide, "Spot Instance interruption notices").
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from core.metadata import Metadata, NoAnswer

log = logging.getLogger("train")

POLL_SECONDS = 5.0
GIVE_UP_AFTER = 3
KINDS = ("signal", "spot", "cap")  # of a request to stop; the ranks exchange the index


@dataclass(frozen=True)
class StopRequest:
    """The reason why a segment must stop. `kind` is one of KINDS; `detail` is for people."""

    kind: str
    detail: str


class StopRequests:
    """The requests that have arrived. Thread-safe. The first request to stop counts; a request to save is taken once.

    `hurry` is called with the reason if the machine will be taken away (core.stop.ask), which leaves little time.
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
        """The reason to save now, if one has arrived since the last call."""
        with self._lock:
            why, self._save = self._save, None
            return why


class SpotWatch:
    """Polls the metadata service in a thread. One per node.

    On AWS no failure of the service ends the watch. Elsewhere it ends after a few attempts.
    """

    def __init__(self, requests: StopRequests, environment: Mapping[str, str], poll_seconds: float = POLL_SECONDS):
        self._requests = requests
        self._metadata = Metadata(environment)
        self._on_aws = environment.get("CLOUD", "").lower() == "aws"
        self._poll_seconds = poll_seconds
        self._rebalance_seen: str | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if not self._metadata.disabled:
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
                    log.warning("spot notices: %s answers again", self._metadata.endpoint)
                failures, self._on_aws = 0, True
            except NoAnswer as error:
                failures += 1
                if failures == GIVE_UP_AFTER:
                    # Normal outside of AWS. In a container on AWS the hop limit may be the cause.
                    log.log(
                        logging.WARNING if self._on_aws else logging.DEBUG,
                        "no spot notices: %s; if that does not pass, give the container the host's network, "
                        "or the instance a metadata hop limit of 2",
                        error,
                    )
                    if not self._on_aws:
                        return
            self._closed.wait(self._poll_seconds)

    def _poll(self) -> None:
        """Raises NoAnswer, also for an answer that is not a notice."""
        action = self._get("spot/instance-action", "action")
        if action is not None:
            self._requests.request_stop("spot", f"{action['action']} at {action.get('time')}")
            return
        rebalance = self._get("events/recommendations/rebalance", "noticeTime")
        if rebalance is not None and rebalance["noticeTime"] != self._rebalance_seen:
            self._rebalance_seen = rebalance["noticeTime"]
            self._requests.request_save(f"rebalance recommendation of {self._rebalance_seen}")

    def _get(self, path: str, key: str) -> dict | None:
        """The notice at `path`, which must have `key`; None if there is none."""
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
