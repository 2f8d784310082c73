"""AWS's warnings that a spot machine will be taken away, from its metadata service (IMDSv2).

Two minutes before, `spot/instance-action` appears: leave. Often earlier, `events/recommendations/rebalance` says
that the risk has grown: save once more, and go on. Both are polled every five seconds, as AWS advises (EC2 User
Guide, "Spot Instance interruption notices"). AWS_EC2_METADATA_SERVICE_ENDPOINT names another endpoint,
AWS_EC2_METADATA_DISABLED=true turns this off; botocore knows the same variables.
"""

import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping

from trainer.watch.notice import Requests

log = logging.getLogger("train")

ENDPOINT = "http://169.254.169.254"
POLL_SECONDS = 5.0
TIMEOUT_SECONDS = 2.0
TOKEN_SECONDS = 21600
GIVE_UP_AFTER = 3


class SpotWatch:
    """Polls in a thread of its own; one per node. Where there is no such service it ends after a few attempts."""

    def __init__(self, requests: Requests, environment: Mapping[str, str], poll_seconds: float = POLL_SECONDS):
        self._requests = requests
        self._endpoint = (environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or ENDPOINT).rstrip("/")
        self._on_aws = environment.get("CLOUD", "").lower() == "aws"
        self._poll_seconds = poll_seconds
        self._token: str | None = None
        self._rebalance_seen: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if environment.get("AWS_EC2_METADATA_DISABLED", "").lower() != "true":
            self._thread = threading.Thread(target=self._run, name="spot watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        failures = 0
        answered = False
        while not self._stop.is_set() and self._requests.leave is None:
            try:
                self._look()
                failures, answered = 0, True
            except (OSError, ValueError) as error:
                failures += 1
                if not answered and failures >= GIVE_UP_AFTER:
                    # Elsewhere than on AWS this is normal; in a container on AWS it is the hop limit.
                    log.log(
                        logging.WARNING if self._on_aws else logging.DEBUG,
                        "no spot notices: %s does not answer (%s); give the container the host's network, "
                        "or the instance a metadata hop limit of 2",
                        self._endpoint,
                        error,
                    )
                    return
            self._stop.wait(self._poll_seconds)

    def _look(self) -> None:
        action = self._get("spot/instance-action")
        if action is not None:
            found = json.loads(action)
            self._requests.ask_to_leave("spot", f"{found.get('action')} at {found.get('time')}")
            return
        rebalance = self._get("events/recommendations/rebalance")
        if rebalance is not None and rebalance != self._rebalance_seen:
            self._rebalance_seen = rebalance
            self._requests.ask_to_save(f"rebalance recommendation of {json.loads(rebalance).get('noticeTime')}")

    def _get(self, path: str) -> str | None:
        """A metadata item, or None if there is none. Raises OSError."""
        for _ in range(2):
            if self._token is None:
                header = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
                self._token = self._ask("PUT", "/latest/api/token", header)
            try:
                return self._ask("GET", f"/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": self._token})
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401:
                    raise
                self._token = None  # expired: once more with a new one
        return None

    def _ask(self, method: str, path: str, headers: Mapping[str, str]) -> str:
        request = urllib.request.Request(self._endpoint + path, method=method, headers=dict(headers))
        # Never through a proxy: the service is the machine's own.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
            return answer.read().decode()
