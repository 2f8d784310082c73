"""Runs the engine on one thread, which batches the requests of all clients."""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from core.errors import LauncherError
from trainer.inference.engine import Engine, GenerationRequest, Piece

log = logging.getLogger("serve")


class Busy(Exception):
    """The queue is full."""


class Failed(Exception):
    """The model failed. The error is in the log."""


class Worker:
    """Passes requests to the engine's thread and yields pieces of text. Create and use it within one event loop."""

    def __init__(self, engine: Engine, most_waiting: int):
        self._engine = engine
        self._most_waiting = most_waiting
        self._loop = asyncio.get_running_loop()
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._tickets = itertools.count()
        self._numbers: dict[int, list[int]] = {}  # for each ticket, the numbers of its requests in the engine
        # For the number of each request in the engine: its ticket, its position in the ticket, and the ticket's queue.
        self._sinks: dict[int, tuple[int, int, asyncio.Queue]] = {}
        self._open = 0  # requests in progress or waiting
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    async def stream(self, requests: Sequence[GenerationRequest]) -> AsyncIterator[Piece]:
        """Yields the pieces of these requests, numbered by position. Closing the iterator cancels the requests.

        Raises Busy for a full queue, ConfigError for an invalid prompt, Failed if the model fails.
        """
        if self._open + len(requests) > self._most_waiting:
            raise Busy(
                f"{self._open} texts are in progress or waiting, the limit is {self._most_waiting}; try again later"
            )
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

    # --- on the worker's thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            with contextlib.suppress(queue.Empty):
                # Wait for a call if idle. Otherwise handle the calls that arrived during the last step.
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
            self._deliver([(self._sinks[piece.number], piece) for piece in pieces])

    def _add(self, ticket: int, requests: Sequence[GenerationRequest], pieces: asyncio.Queue) -> None:
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

    def _deliver(self, found: list[tuple[tuple[int, int, asyncio.Queue], Piece]]) -> None:
        def deliver() -> None:
            for (_, place, pieces), piece in found:
                pieces.put_nowait(piece._replace(number=place))

        if found:
            self._loop.call_soon_threadsafe(deliver)
