"""Receives requests to stop this process, from the start of the program on.

    from core import stop

    if __name__ == "__main__":
        stop.listen()  # before the imports that take seconds

A separate thread answers requests, because the main thread may be waiting for an import, a GPU or a store. If the
program has called `allow`, the thread gives it time to save. Otherwise the thread immediately ends the process with
exit code 33.

SIGTERM is not always a request to stop: torchrun also sends it to the remaining workers when one of them has failed.
launch.node therefore creates STOP_FILE before it sends a signal. A request is `certain` if torchrun cannot have sent it
after a failure. A failure exits with code 33 only after a certain request (core.console.run_entry). This module does
not import torch, and imports little else before `listen`, so that signals are received early.
"""

import atexit
import contextlib
import functools
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

# launch.node kills the program this many seconds after a notice. AWS takes a spot machine away two minutes after its
# notice, and launch/node/container.sh kills the container after 100 s.
SECONDS = 90.0
# A program ends itself this many seconds before launch.node would kill it. In this time it can still log its progress.
SOONER_SECONDS = 10.0
# After a request that is not certain, the process ends within this many seconds. torchrun kills its workers 30 s after
# its signal, so the limit is lower.
UNCERTAIN_SECONDS = 20.0
# Time limit in seconds for each of the last actions: log a sentence, close logs and ledger, flush the output.
CLOSE_SECONDS = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
WAKE = 0  # this byte in the pipe wakes the thread; no signal has the number 0


class _State:
    """State of this process. Times are of the monotonic clock."""

    def __init__(self) -> None:
        self.parent = 0
        self.pipe = (-1, -1)
        self.before: dict[int, object] = {}  # signal → its earlier handler
        self.reason = ""
        self.certain = False
        self.since = self.hurried_since = math.inf
        self.allowed_seconds: float | None = None
        self.last_words: Callable[[], str] | None = None
        self.verdict: int | None = None
        self.informed: list[Callable[[str], None]] = []
        self.cleanups: list[Callable[[], object]] = []
        self.leaving = self.closed = False


_lock = threading.Lock()
_state = _State()


def listen(*more: signal.Signals) -> None:
    """Handle SIGTERM, SIGHUP, SIGUSR1 and `more` from now on. Call it in the main thread; a second call has no effect.

    A signal that is ignored already (SIGHUP under nohup, SIGINT in the background) stays ignored, except SIGTERM.
    """
    if _state.before:
        return
    _state.parent = os.getppid()
    _state.pipe = os.pipe()
    for end in _state.pipe:
        os.set_blocking(end, False)
    # Python's C handler writes the signal's number to the pipe even while the main thread cannot run Python code.
    signal.set_wakeup_fd(_state.pipe[1], warn_on_full_buffer=False)
    for number in (*SIGNALS, *more):
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            _state.before[number] = signal.signal(number, _handle)
    atexit.register(_ignore)
    threading.Thread(target=_watch, args=(_state,), name="stop", daemon=True).start()
    if _stop_file_exists():
        ask("before it began")
    follow_parent()


def _ignore() -> None:
    """Ignore further signals, to keep the exit code.

    Python removes its handlers while it ends, and a signal would then kill the process.
    """
    for number in _state.before:
        signal.signal(number, signal.SIG_IGN)


def follow_parent() -> None:
    """On Linux: receive SIGTERM when the parent process dies, so that no orphaned process keeps a GPU."""
    parent = os.environ.get("PARENT_PID", "")
    if sys.platform != "linux" or not (parent or "TORCHELASTIC_RUN_ID" in os.environ):
        return
    import ctypes  # imported here: the import is slow, and the signal handlers must be set first

    if not parent or parent == str(os.getppid()):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if parent and not os.path.exists(f"/proc/{parent}"):  # the parent died before the call of prctl
        os.kill(os.getpid(), signal.SIGTERM)


def asked() -> bool:
    """Whether this process was asked to stop, possibly by torchrun because another rank failed."""
    return bool(_state.reason)


def is_certain() -> bool:
    """Whether this process got a request to stop that certainly came from outside the job.

    After a worker has failed, torchrun also sends requests to stop. Such requests do not count here.
    """
    return _state.certain


def is_hurried() -> bool:
    """Whether the machine is being taken away, so that the time to end is limited."""
    return _state.hurried_since < math.inf


def ask(reason: str) -> None:
    """Ask this process to stop because its machine is being taken away. Has the effect of a certain signal."""
    _note(reason, certain=True, hurry=True)


def inform(call: Callable[[str], None]) -> None:
    """Call `call(reason)` once when this process is asked to stop. If a request came earlier, call it immediately."""
    with _lock:
        _state.informed.append(call)
        reason = _state.reason
    if reason:
        call(reason)


def allow(seconds: float, last_words: Callable[[], str] | None = None) -> None:
    """Announce that there is something to save. The program then has `seconds` to save it after a request to stop.

    When these seconds are over, the process logs the sentence that `last_words` returns, and ends. The exit code is the
    argument of `settle`, or 33 if `settle` was not called.
    """
    with _lock:
        if not _state.leaving:
            _state.allowed_seconds, _state.last_words = seconds, last_words
            _wake()
            return
    _wait_for_the_end()


def settle(code: int) -> None:
    """Fix the exit code. If the process does not end in time, it is ended with this code instead of 33."""
    _state.verdict = code


def on_leaving(call: Callable[[], object]) -> None:
    """Register a function that `leave` calls. The function has CLOSE_SECONDS to return.

    The main thread continues meanwhile.
    """
    with _lock:
        _state.cleanups.append(call)


def leave(code: int, words: str = "") -> NoReturn:
    """End this process now. sys.exit would wait for threads, which may be waiting for a store."""
    from core.exit_codes import tell_launcher

    with _lock:
        is_second, _state.leaving = _state.leaving, True
    if is_second:
        _wait_for_the_end()
    if os.environ.get("LOCAL_RANK", "0") == "0" and _state.certain and os.getppid() == _state.parent:
        tell_launcher(code)
    # Every call runs in a thread with a time limit, because it may hang. `words` are logged before the cleanups,
    # because a cleanup may store the log.
    _within(CLOSE_SECONDS, [functools.partial(_say, words)] if words else [])
    _within(CLOSE_SECONDS, _state.cleanups)
    _within(CLOSE_SECONDS, [sys.stdout.flush, sys.stderr.flush])
    os._exit(code)


def hold_if_leaving() -> None:
    """Block if another thread is ending this process.

    Callers use it after a failure, because the end of the process may have caused the failure.
    """
    if _state.leaving:
        _wait_for_the_end()


def seconds() -> float:
    """Seconds between launch.node's request to stop and its SIGKILL. Raises ConfigError."""
    from core.environment import positive  # imported here, so that `listen` can run before this import

    return positive(os.environ, "LEAVE_SECONDS") or SECONDS


def own_seconds() -> float:
    """Seconds after a request to stop at which a program under launch.node ends itself, before the SIGKILL."""
    return seconds() - min(SOONER_SECONDS, seconds() / 4)


def forget() -> None:
    """Undo `listen` and its later effects, for tests."""
    global _state
    with _lock:
        _state.closed = True
        _wake()
        for number, handler in _state.before.items():
            signal.signal(number, handler)
        if _state.before:
            signal.set_wakeup_fd(-1)
        _state = _State()


def _handle(number: int, _: object) -> None:
    """Signal handler. It also writes the signal to the pipe: an event loop may have replaced the wake-up descriptor.

    The handler does not take the lock, because it may interrupt the code that holds the lock.
    """
    with contextlib.suppress(BlockingIOError):  # the pipe is full of signals
        os.write(_state.pipe[1], bytes([number]))


def _watch(state: _State) -> None:
    """Body of the thread that answers requests."""
    while not state.closed:
        with _lock:
            at = _leave_at()
        wait = None if at == math.inf else max(0.0, at - time.monotonic())
        if select.select([state.pipe[0]], [], [], wait)[0]:
            for number in os.read(state.pipe[0], 512):
                if number in state.before and not state.closed:
                    _note(signal.Signals(number).name, _certain(number), hurry=number != signal.SIGUSR1)
        elif wait is not None:
            leave(_verdict(state), _words(state))
    for end in state.pipe:
        os.close(end)


def _say(words: str) -> None:
    import logging

    logging.getLogger("stop").info("%s", words)


def _certain(number: int) -> bool:
    """Whether a signal is a certain request to stop: torchrun also sends SIGTERM when another worker has failed."""
    return number != signal.SIGTERM or "TORCHELASTIC_RUN_ID" not in os.environ or _stop_file_exists()


def _verdict(state: _State) -> int:
    from core.exit_codes import PREEMPTED

    return PREEMPTED if state.verdict is None else state.verdict


def _words(state: _State) -> str:
    if state.allowed_seconds is not None:
        return state.last_words() if state.last_words else ""
    return f"asked to stop ({state.reason}) with nothing to save: ending now"


def _leave_at() -> float:
    """Monotonic time at which this process must end. It is infinity if there was no request to stop.

    The caller must hold the lock.
    """
    if not _state.reason:
        return math.inf
    if _state.allowed_seconds is not None:
        return _state.hurried_since + _state.allowed_seconds
    return _state.since + (0.0 if _state.certain else UNCERTAIN_SECONDS)


def _note(reason: str, certain: bool, hurry: bool) -> None:
    now = time.monotonic()
    with _lock:
        is_first = not _state.reason
        if is_first:
            _state.reason, _state.since = reason, now
        _state.certain |= certain
        if hurry:
            _state.hurried_since = min(_state.hurried_since, now)
        informed = list(_state.informed) if is_first else []
        _wake()
    for call in informed:
        call(reason)


def _wake() -> None:
    if _state.pipe[1] >= 0:
        with contextlib.suppress(BlockingIOError):
            os.write(_state.pipe[1], bytes([WAKE]))


def _stop_file_exists() -> bool:
    path = os.environ.get("STOP_FILE")
    return bool(path) and os.path.exists(path)


def _within(limit: float, calls: list[Callable[[], object]]) -> None:
    """Run all calls in parallel threads, and wait `limit` seconds at most."""
    deadline = time.monotonic() + limit
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _wait_for_the_end() -> NoReturn:
    """Wait until another thread ends the process."""
    while True:
        time.sleep(1.0)
