"""One thread that owns the model: requests of all clients are computed together, as they come and go."""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from core.errors import LauncherError
from trainer.inference.engine import Engine, Piece, Request

log = logging.getLogger("serve")


class Busy(Exception):
    """More requests wait than may."""


class Failed(Exception):
    """The model could not go on; its error is in the log."""


class Worker:
    """Started and used within an event loop."""

    def __init__(self, engine: Engine, most_waiting: int):
        self._engine = engine
        self._most_waiting = most_waiting
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets = itertools.count()
        self._numbers: dict[int, list[int]] = {}  # of a ticket's requests in the engine
        self._sinks: dict[int, tuple[int, int, asyncio.Queue]] = {}  # engine's number → ticket, place, its queue
        self._open = 0  # requests in work or waiting, as the event loop sees them
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    async def stream(self, requests: Sequence[Request]) -> AsyncIterator[Piece]:
        """All pieces of these requests, numbered in their order. Given up, it cancels them.

        Raises Busy, ConfigError for a prompt that cannot be continued, and Failed.
        """
        if self._open + len(requests) > self._most_waiting:
            raise Busy(f"{self._open} texts are in work or waiting, at most {self._most_waiting} may; try again later")
        ticket, pieces = next(self._tickets), asyncio.Queue()
        self._open += len(requests)
        left = len(requests)
        self._calls.put(lambda: self._add(ticket, requests, pieces))
        try:
            while left:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece.finish is not None
                yield piece
        finally:
            self._open -= len(requests)
            self._calls.put(lambda: self._cancel(ticket))

    async def stop(self) -> None:
        def stop() -> None:
            self._stopping = True

        self._calls.put(stop)
        await asyncio.to_thread(self._thread.join)

    # --- on the model's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            with contextlib.suppress(queue.Empty):
                # Without work, wait for a call; else only look for the ones that came during the step.
                call = self._calls.get(block=not self._engine.busy)
                while True:
                    call()
                    call = self._calls.get_nowait()
            try:
                pieces = self._engine.step()
            except Exception as error:
                log.exception("the model failed; all open requests end")
                self._fail(error)
                continue
            self._tell([(self._sinks[piece.number], piece) for piece in pieces])

    def _add(self, ticket: int, requests: Sequence[Request], pieces: asyncio.Queue) -> None:
        numbers = self._numbers[ticket] = []
        try:
            for place, request in enumerate(requests):
                number = self._engine.add(request)
                numbers.append(number)
                self._sinks[number] = (ticket, place, pieces)
        except LauncherError as error:
            self._cancel(ticket)
            self._loop.call_soon_threadsafe(pieces.put_nowait, error)

    def _cancel(self, ticket: int) -> None:
        for number in self._numbers.pop(ticket, []):
            self._engine.cancel(number)
            self._sinks.pop(number, None)

    def _fail(self, error: Exception) -> None:
        queues = {ticket: pieces for ticket, _, pieces in self._sinks.values()}
        for ticket in list(self._numbers):
            self._cancel(ticket)
        for pieces in queues.values():
            self._loop.call_soon_threadsafe(pieces.put_nowait, Failed(f"{type(error).__name__} in the model"))

    def _tell(self, found: list[tuple[tuple[int, int, asyncio.Queue], Piece]]) -> None:
        def tell() -> None:
            for (_, place, pieces), piece in found:
                pieces.put_nowait(piece._replace(number=place))

        if found:
            self._loop.call_soon_threadsafe(tell)
