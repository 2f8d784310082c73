"""Measurements as processes: each says what it measures as it goes, and is ended with its time or with its parent.

In the process that measures:  children.say("12.3 ms per step", step_ms=12.3)
In the one that started it:    children.run(command, log, deadline, take)
"""

import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from demo.processes import die_with_parent, kill_tree

REPOSITORY = Path(__file__).parent.parent.parent
_MARK = "measured: "
_LONGEST = 400
LOOK_SECONDS = 1.0

end_with_parent = functools.partial(die_with_parent, signal.SIGKILL)


def say(text: str, **values: Any) -> None:
    """A result, on a line of its own: `text` for people, `values` for the record."""
    print(_MARK + json.dumps({"text": text, **values}), flush=True)


def heard(line: str) -> dict[str, Any] | None:
    """The result on a line of output, if it is one."""
    return json.loads(line.removeprefix(_MARK)) if line.startswith(_MARK) else None


def run(command: Sequence[str], log: TextIO, deadline: float, take: Callable[[dict[str, Any]], None]) -> str:
    """Run until it ends or until `deadline` (of time.monotonic). Returns what went wrong; empty if nothing did."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=end_with_parent,
    )
    try:
        return _follow(process, log, deadline, take)
    finally:
        kill_tree(process)


def _follow(process: subprocess.Popen, log: TextIO, deadline: float, take: Callable[[dict[str, Any]], None]) -> str:
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    last = ""
    while True:
        try:
            line = lines.get(timeout=max(0.0, min(LOOK_SECONDS, deadline - time.monotonic())))
        except queue.Empty:
            if process.poll() is not None:
                break  # something else holds its output open
            if time.monotonic() < deadline:
                continue
            return "the minutes were over while it ran; give it more, --minutes"
        if line is None:
            break
        result = heard(line)
        if result:
            take(result)
            continue
        log.write(line)
        log.flush()
        last = line.strip() or last
    code = process.wait()
    return f"exit status {code}: {last[-_LONGEST:]}" if code else ""


def _read(stream: TextIO, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def end_on_signals() -> None:
    """SIGTERM and SIGHUP end this program as an exception does, so that what it started ends first."""

    def leave(number: int, _: object) -> None:
        for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(each, leave)
