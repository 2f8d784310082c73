"""Asks AWS's instance metadata service (IMDSv2).

    metadata = Metadata(os.environ)
    metadata.get("instance-type")      "p4d.24xlarge"; None if the service has no such item

The service may fail for a while: it may refuse a request, answer 503, end a body early, or send one byte a second. Each
of these failures raises Unavailable within REQUEST_SECONDS. AWS_EC2_METADATA_SERVICE_ENDPOINT names another endpoint,
and AWS_EC2_METADATA_DISABLED=true turns the service off, as in botocore.
"""

import contextlib
import socket
import threading
from collections.abc import Mapping
from urllib.parse import urlsplit

from clouds.base import Unavailable

ENDPOINT = "http://169.254.169.254"
REQUEST_SECONDS = 2.0
TOKEN_SECONDS = 21600  # the longest that the service allows


class Metadata:
    """A client of the service. It asks for one item at a time, and keeps the session token of IMDSv2."""

    def __init__(self, environment: Mapping[str, str]):
        self.endpoint = (environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or ENDPOINT).rstrip("/")
        self.disabled = environment.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
        self._token: str | None = None

    def get(self, path: str) -> str | None:
        """An item below meta-data/. None if the service answers that it has no such item. Raises Unavailable."""
        if self.disabled:
            raise Unavailable("AWS_EC2_METADATA_DISABLED is set")
        for _ in range(2):
            if self._token is None:
                header = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
                status, self._token = self._ask("PUT", "/latest/api/token", header)
                if status != 200:
                    self._token = None
                    raise Unavailable(f"{self.endpoint} answers {status} to a request for a token")
            status, text = self._ask("GET", f"/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": self._token})
            if status in (200, 404):
                return text if status == 200 else None
            if status != 401:
                break
            self._token = None  # the token has expired: ask again with a new one
        raise Unavailable(f"{self.endpoint} answers {status} to a request for {path}")

    def _ask(self, method: str, path: str, headers: Mapping[str, str]) -> tuple[int, str]:
        """Status and body of the answer.

        A timer limits the whole request, and the socket's timeout limits each read.
        """
        import http.client  # imported here: it takes 30 ms, and a report needs no metadata

        is_over = threading.Event()
        try:
            address = urlsplit(self.endpoint)
            # The connection uses no proxy, because the service is local to the machine.
            connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=REQUEST_SECONDS)
            with contextlib.closing(connection):
                connection.connect()
                end = threading.Timer(REQUEST_SECONDS, _cut, (connection.sock, is_over))
                end.daemon = True
                end.start()
                try:
                    connection.request(method, address.path + path, headers=dict(headers))
                    answer = connection.getresponse()
                    status, text = answer.status, answer.read().decode()
                finally:
                    end.cancel()
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = f"within {REQUEST_SECONDS:g} s" if is_over.is_set() else f"({type(error).__name__}: {error})"
            raise Unavailable(f"{self.endpoint} does not answer {why}") from error
        if is_over.is_set():  # the timer closed the connection, so a body of undeclared length may be incomplete
            raise Unavailable(f"{self.endpoint} does not answer within {REQUEST_SECONDS:g} s")
        return status, text


def _cut(connection: socket.socket, is_over: threading.Event) -> None:
    is_over.set()
    with contextlib.suppress(OSError):  # closed already
        connection.shutdown(socket.SHUT_RDWR)
