"""Calls a store: retries transient errors, translates other errors, and lets signals interrupt a waiting main thread.

retries.call("s3://bucket/a.json", "read", lambda store, key: store.size(key))
"""

import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from core.errors import LauncherError, StorageError
from core.stores import faults
from core.stores.base import Store
from core.stores.opener import open_store

log = logging.getLogger("core.storage")
T = TypeVar("T")

# The eight pauses (0.25 to 15 s) add up to about 45 s, without the time of the attempts. The sum is longer than S3's
# SlowDown episodes, and shorter than the time between a preemption notice and the end of the machine.
ATTEMPTS = 9
BACKOFF_SECONDS = 0.25
BACKOFF_CAP_SECONDS = 15.0


def call(uri: str, verb: str, use: Callable[[Store, str], T]) -> T:
    """Calls `use(store, key)` with the store behind a URI and the object's key. `verb` describes the call in messages.

    Raises StorageError with the URI and the remedy, and core.errors.ConfigError for wrong credentials.
    """
    store, key = open_store(uri)
    if store.is_local:
        return retrying(uri, verb, store, lambda: use(store, key))
    return retrying(uri, verb, store, lambda: interruptible(lambda: use(store, key)))


def retrying(uri: str, verb: str, store: Store, request: Callable[[], T]) -> T:
    """The result of `request()`.

    While its errors are transient, the request is repeated with exponential backoff and jitter.
    """
    renewed = False
    attempt = 1
    while True:
        try:
            return request()
        except LauncherError:
            raise
        except Exception as error:
            marks = faults.marks_of(error)
            if not renewed and store.renew(error):
                renewed = True
                continue
            attempts = error.attempts if isinstance(error, faults.GaveUp) else ATTEMPTS
            if isinstance(error, faults.GaveUp) or (faults.is_transient(marks) and attempt == ATTEMPTS):
                raise StorageError(
                    f"{uri}: could not {verb} after {attempts} attempts ({faults.brief(error.__cause__ or error)}); "
                    f"check the network and {store.terms.endpoint}, then run the same command again"
                ) from error
            if not faults.is_transient(marks):
                raise faults.translated(verb, uri, error, marks, store.terms) from error
            _pause(verb, uri, attempt, error, marks)
            attempt += 1


def _pause(verb: str, uri: str, attempt: int, error: Exception, marks: frozenset[str]) -> None:
    pause = min(BACKOFF_CAP_SECONDS, BACKOFF_SECONDS * 2 ** (attempt - 1))
    pause = max(pause, faults.wait_seconds(error, marks)) * random.uniform(0.7, 1.3)
    words = (uri, verb, faults.brief(error), attempt, ATTEMPTS, pause)
    log.warning("%s: %s failed (%s), attempt %d of %d, again in %.1f s", *words)
    time.sleep(pause)


# --- interruptible waiting -------------------------------------------------------------------------------------

# Python runs signal handlers between two bytecodes of the main thread. A request of obstore is one bytecode, and takes
# a minute if the server hangs. Another thread therefore makes the request. The main thread waits for this thread, and a
# signal can interrupt the wait.


class _Answer:
    """The result or the error of a request. A Future would take half as long again."""

    def __init__(self) -> None:
        self._arrival = threading.Lock()
        self._arrival.acquire()
        self.has_arrived = False

    def arrive(self, value: Any = None, error: BaseException | None = None) -> None:
        self._value, self._error, self.has_arrived = value, error, True
        self._arrival.release()

    def result(self) -> Any:
        self._arrival.acquire()
        if self._error is not None:
            raise self._error
        return self._value


class _Asker:
    """A thread that runs one request after another, and does not keep the process from ending."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], _Answer]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="storage", daemon=True).start()

    def ask(self, call: Callable[[], Any]) -> _Answer:
        answer = _Answer()
        self._calls.put((call, answer))
        return answer

    def _run(self) -> None:
        while True:
            call, answer = self._calls.get()
            try:
                answer.arrive(call())
            except BaseException as error:
                answer.arrive(error=error)
            del call, answer  # otherwise, these variables would keep the last object in memory until the next call


# Threads that wait for their next request. If a signal interrupts the caller of a thread, the thread is still busy and
# is not put back into this list.
_idle: list[_Asker] = []
os.register_at_fork(after_in_child=_idle.clear)


def interruptible(request: Callable[[], T]) -> T:
    """The result of `request()`. If this is the main thread, another thread runs the request."""
    if threading.current_thread() is not threading.main_thread():
        return request()
    asker = _idle.pop() if _idle else _Asker()
    answer = asker.ask(request)
    try:
        return answer.result()
    finally:
        if answer.has_arrived:
            _idle.append(asker)
