"""Limits the time in which a request must arrive, and the number of open connections.

aiohttp waits without a limit for the head of a connection's first request. Clients that send nothing could take all
file descriptors of the process. If there are too many connections, the connection that has been silent for longest is
closed.
"""

import asyncio
import resource
from collections.abc import Callable

HEAD_SECONDS = 20.0
MOST_CONNECTIONS = 1000


def most_connections() -> int:
    """The limit of open connections.

    It is half of the number of files that this process may open, at most MOST_CONNECTIONS.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if descriptors < 0 else max(8, min(MOST_CONNECTIONS, descriptors // 2))


class Connections:
    """Makes the protocol of each connection for `loop.create_server`: a wrapper of a protocol that `make` returns."""

    def __init__(
        self, make: Callable[[], asyncio.Protocol], head_seconds: float = HEAD_SECONDS, most: int | None = None
    ):
        self._make = make
        self._head_seconds = head_seconds
        self._most = most or most_connections()
        self._count = 0
        self._silent: dict[asyncio.BaseTransport, asyncio.TimerHandle] = {}  # oldest first

    def __call__(self) -> asyncio.Protocol:
        return _Watched(self._make(), self)

    def heard(self, transport: asyncio.BaseTransport | None) -> None:
        """The head of a request has arrived. From now on, aiohttp applies its own time limits to this connection."""
        if timer := self._silent.pop(transport, None):
            timer.cancel()

    def opened(self, transport: asyncio.Transport) -> None:
        self._count += 1
        self._silent[transport] = asyncio.get_running_loop().call_later(self._head_seconds, transport.abort)
        if self._count > self._most:
            next(iter(self._silent)).abort()

    def closed(self, transport: asyncio.BaseTransport) -> None:
        self._count -= 1
        self.heard(transport)


class _Watched(asyncio.Protocol):
    """Passes the events of a connection to `protocol`, and tells `connections` when it opens and closes."""

    def __init__(self, protocol: asyncio.Protocol, connections: Connections):
        self._protocol = protocol
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self.data_received = protocol.data_received
        self.eof_received = protocol.eof_received
        self.pause_writing = protocol.pause_writing
        self.resume_writing = protocol.resume_writing

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._protocol.connection_made(transport)
        self._connections.opened(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.closed(self._transport)
        self._protocol.connection_lost(error)
