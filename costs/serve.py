"""Serves live pages of runs on this computer: all runs of a bucket, one run, several side by side.

    python cost_report.py --serve [RUN_URL]        http://127.0.0.1:8321

A page updates itself every few seconds. The server listens on loopback only, and answers only requests that name this
computer as host. So a web site whose domain name resolves to this computer cannot read the pages. `ssh -L` makes the
pages available on another computer.
"""

import argparse
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from shlex import quote
from urllib.parse import parse_qs, urlsplit

from core import output, secrets
from core.errors import ConfigError, LauncherError, RunError, one_line
from costs import discover, live, notify
from costs.notify import Watched
from costs.report import CostReport

log = logging.getLogger("costs")
HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost", "::1")
MOST_COMPARED = 6


class Reports:
    """Makes and keeps reports. A requested report is made again if the kept report is older than `every` seconds.

    `one` makes the report on the run at a URL, and `all_of_them` makes the reports on all runs of the bucket. Both may
    raise LauncherError.
    """

    def __init__(self, one: Callable[[str], CostReport], all_of_them: Callable[[], list[CostReport]], every: float):
        self._one, self._all, self._every = one, all_of_them, every
        self._made: dict[str, tuple[float, object]] = {}
        self._known: set[str] = set()
        self._lock = threading.Lock()

    def all(self) -> list[CostReport]:
        found = self._fresh("", self._all)
        self._known |= {report.run for report in found}
        return found

    def of(self, url: str) -> CostReport:
        return self._fresh(url, lambda: self._one(url))

    def knows(self, url: str) -> bool:
        """Whether a run is in the bucket. A request may name any URL, but only URLs of the bucket's runs are read."""
        if url not in self._known:
            self.all()
        return url in self._known

    def _fresh(self, key: str, make: Callable[[], object]):
        with self._lock:
            made_at, made = self._made.get(key, (0.0, None))
            if made is None or time.monotonic() - made_at >= self._every:
                discover.forget_listings()
                made = make()
                self._made[key] = (time.monotonic(), made)
            return made


def serve(options: argparse.Namespace, reports: Reports) -> None:
    """Answer until SIGINT. Raises ConfigError if the port is taken, LauncherError if the store cannot be read."""
    if options.run_url:
        try:
            reports.of(options.run_url)
        except RunError as error:  # the run may begin later
            log.info("waiting: %s", error)
    else:
        discover.runs_url(os.environ)
    server = bound(options.port, handler(reports, options.run_url, options.every))
    ended = threading.Event()
    notify.keep_looking(Watched.by_environment(), partial(_watched, reports, options.run_url), options.every, ended)
    port = server.server_address[1]
    print(
        f"http://{HOST}:{port} shows {options.run_url or 'all runs'}; from another computer: "
        f"ssh -L {port}:{HOST}:{port} {quote(socket.gethostname())}; Ctrl-C ends it",
        flush=True,
    )
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
        finally:
            ended.set()


def _watched(reports: Reports, run_url: str | None) -> list[CostReport]:
    """The reports on the runs whose changes are sent to NOTIFY_URLS."""
    return [reports.of(run_url)] if run_url else reports.all()


class Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing for a browser that closed its connection before the answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def bound(port: int, answers: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    try:
        server = Server((HOST, port), answers)
    except (OSError, OverflowError) as error:
        why = one_line(error)
        raise ConfigError(f"--port {port}: cannot be listened on ({why}); name another, or 0 for a free port") from None
    server.daemon_threads = True
    return server


def handler(reports: Reports, run_url: str | None, every: float) -> type[BaseHTTPRequestHandler]:
    """The class that answers requests. `/` is the page of `run_url` or, if `run_url` is None, the overview."""

    def page_for(path: str, names: dict[str, list[str]]) -> live.Page | None:
        chosen = names.get("run", [])
        if path == "/" and run_url:
            return live.of_run(reports.of(run_url))
        if path == "/":
            return live.of_all(reports.all())
        if path == "/run" and len(chosen) == 1 and not run_url and reports.knows(chosen[0]):
            return live.of_run(reports.of(chosen[0]), is_one_of_many=True)
        if path == "/compare" and not run_url and all(map(reports.knows, chosen[:MOST_COMPARED])):
            if len(chosen) < 2:
                return live.of_problem("choose two runs or more to compare", is_one_of_many=True)
            return live.of_comparison([reports.of(url) for url in chosen[:MOST_COMPARED]])
        return None

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if urlsplit(f"//{self.headers.get('Host', '')}").hostname not in NAMES:
                return self._send(403, f"open this page as http://{HOST}:{self.server.server_address[1]}\n".encode())
            asked = urlsplit(self.path)
            try:
                found = page_for(asked.path, parse_qs(asked.query))
            except LauncherError as error:
                found = live.of_problem(output.visible(secrets.scrub(str(error))), is_one_of_many=asked.path != "/")
            except Exception as error:  # a run that strangers have changed must not end the server
                log.warning("%s: cannot be shown (%s)", asked.path, one_line(error))
                found = live.of_problem("this run cannot be understood; the server's terminal shows the reason")
            if found is None:
                return self._send(404, b"no such page, or no run of this bucket\n")
            text = live.as_html(found, every, time.time()).encode()
            tag = live.tag_of(found)
            if self.headers.get("If-None-Match") == tag:
                return self._send(304, b"", tag)
            self._send(200, text, tag, "text/html; charset=utf-8")

        def _send(self, status: int, body: bytes, tag: str = "", kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Security-Policy", live.POLICY + "; frame-ancestors 'none'")
            if tag:
                self.send_header("ETag", tag)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Logs nothing, because each open page sends a request every few seconds."""

    return Answers
