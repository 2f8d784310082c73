"""Waits for a request in a way that Ctrl-C ends.

Python runs the handler of a signal between two steps of the main thread, and a request of obstore is one step, which
may take a minute where the server hangs. The main thread therefore lets another thread ask, and waits for that.
"""

import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class _Asker:
    """A thread that runs one call after another. It does not keep the process from ending."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="storage", daemon=True).start()

    def ask(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._calls.put((call, future))
        return future

    def _run(self) -> None:
        while True:
            call, future = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            del call, future  # or the last object would stay in memory until the next


# Those that have nothing to do. One whose caller was interrupted does not come back.
_idle: list[_Asker] = []
os.register_at_fork(after_in_child=_idle.clear)


def interruptible(call: Callable[[], T]) -> T:
    """`call()`, run by another thread if this is the main one."""
    if threading.current_thread() is not threading.main_thread():
        return call()
    asker = _idle.pop() if _idle else _Asker()
    future = asker.ask(call)
    try:
        return future.result()
    finally:
        if future.done():
            _idle.append(asker)
