"""Runs the project's programs: sets up logging, shows progress, and prints an error as one sentence.

An entry is the module of a program. It defines `main(arguments) -> exit code` and calls `run_entry(main)`.
"""

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType

from core import environment, output, secrets, stop
from core.errors import LauncherError
from core.exit_codes import BAD_NODE, CAPPED, FAILED, OK, PREEMPTED
from core.figures import quantity


def set_up_logging(speaks: bool = True) -> None:
    """Log plain lines to standard error. If `speaks` is false (ranks above 0), log warnings only."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainLines("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if speaks else logging.WARNING, handlers=[handler], force=True)
    for noisy in ("botocore", "aiobotocore", "s3fs", "fsspec", "urllib3", "httpx", "httpx2", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _PlainLines(logging.Formatter):
    """Hides keys and escapes terminal control characters, because a log line may quote text that a stranger wrote."""

    def format(self, record: logging.LogRecord) -> str:
        return output.visible(secrets.scrub(super().format(record)))


def run_entry(main: Callable[[list[str]], int | None], shows: bool = False) -> None:
    """Run `main` and exit the process. A LauncherError is printed as one line, any other error with its traceback.

    Printed errors show `***` instead of secrets. `shows` marks a program whose only purpose is its output. Such a
    program ends without an error when the reader of its output closes the pipe (`| head`); any other program continues
    without output. After a request to stop, every failure exits with PREEMPTED, because the stop may have caused the
    failure: for example, another rank may have ended first.
    """
    environment.tidy(os.environ)
    environment.name_user(os.environ)
    output.prepare(is_product=shows)
    sys.excepthook = _print_traceback
    try:
        code = main(sys.argv[1:]) or OK
    except LauncherError as error:
        print(f"error: {output.visible(secrets.scrub(str(error)))}", file=sys.stderr)
        code = FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except output.OutputEnds:
        code = OK
    except Exception as error:
        if not stop.is_certain():
            raise
        said = output.visible(secrets.scrub(" ".join(str(error).split())))[:500]
        print(f"error: {type(error).__name__}: {said}", file=sys.stderr)
        code = FAILED
    failure = output.failure()
    if failure and not isinstance(failure, BrokenPipeError):
        kind = "error" if shows else "warning"
        print(f"{kind}: standard output: {failure.strerror}; the rest of the output is lost", file=sys.stderr)
        code = code or (FAILED if shows else OK)
    if stop.is_certain():
        stop.leave(code if code in (OK, CAPPED, BAD_NODE) else PREEMPTED)
    sys.exit(code)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    said = "".join(traceback.format_exception(kind, error, trace))
    print(output.visible(secrets.scrub(said)), end="", file=sys.stderr)


class Progress:
    """Shows progress up to `total`: a bar on a terminal, or else a line every `interval_seconds`."""

    def __init__(self, title: str, total: float | None, unit: str, interval_seconds: float = 10.0):
        self.title = title
        self.total = total
        self.unit = unit
        self.done = 0.0
        self._interval = interval_seconds
        self._start = self._last = time.monotonic()
        self._bar = self._task = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total, text="")
            self._bar.start()

    def advance(self, amount: float) -> None:
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, text=self._text())
        elif time.monotonic() - self._last >= self._interval:
            self._last = time.monotonic()
            logging.getLogger(__name__).info("%s: %s", self.title, self._text())

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _text(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        share = f" of {quantity(self.total)} ({100 * self.done / self.total:.0f} %)" if self.total else ""
        return f"{quantity(self.done)}{share} {self.unit}, {quantity(self.done / seconds)}/s"


@contextlib.contextmanager
def progress(title: str, total: float | None, unit: str) -> Iterator[Progress]:
    bar = Progress(title, total, unit)
    try:
        yield bar
    finally:
        bar.close()
