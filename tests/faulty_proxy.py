"""A reverse proxy that breaks some of what passes through it, as object stores and networks do.

    with FaultyProxy("http://127.0.0.1:8333", share=0.1, seed=1) as proxy:
        run(environment={"AWS_ENDPOINT_URL": proxy.url})

Faults before the request reaches the store: 500, 503 SlowDown, a reset. After it: a truncated body, an answer that
is lost although the store has acted, a hang.

`stall` holds every request back for a while; while `away` is "hang" or "refuse" none is answered. With
`listing_lag_seconds` listings are as old as that: they omit what was stored since, and show what was deleted since.
"""

import contextlib
import http.client
import http.server
import random
import socket
import struct
import threading
import time
from collections import Counter
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
INTERNAL = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We encountered an error.</Message></Error>"
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
HANG_SECONDS = 2.0
FAULTS = ("500", "503", "reset", "truncated", "answer lost", "hang")


class FaultyProxy:
    """`share` of the requests get a fault; `injected` counts them by kind."""

    def __init__(self, upstream: str, share: float = 0.0, seed: int = 0, listing_lag_seconds: float = 0.0):
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname, parts.port)
        self.share = share
        self.injected: Counter[str] = Counter()
        self.listing_lag_seconds = listing_lag_seconds
        self.stalled_until = 0.0
        self.away = ""
        self.hung = threading.Event()  # set once a request waits because of `away`
        self._stored: dict[str, float] = {}  # "bucket/key" → when
        self._deleted: dict[str, float] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.away = ""
        self._server.shutdown()
        self._server.server_close()

    def stall(self, seconds: float) -> None:
        """From now on nothing is answered for so long."""
        self.stalled_until = time.monotonic() + seconds

    def saw(self, method: str, path: str) -> None:
        """Remember when an object came and went."""
        key = unquote(urlsplit(path).path.lstrip("/"))
        with self._lock:
            if method == "PUT":
                self._stored.setdefault(key, time.monotonic())
                self._deleted.pop(key, None)
            elif method == "DELETE" and key in self._stored:
                self._deleted[key] = time.monotonic()

    def sent(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[str, dict[str, str]]:
        """The path and the headers with which a request goes on to the store."""
        return path, headers

    def aged(self, path: str, listing: bytes) -> bytes:
        """A listing (ListObjectsV2) as it was `listing_lag_seconds` ago, as far as we saw."""
        bucket = urlsplit(path).path.strip("/")
        query = parse_qs(urlsplit(path).query)
        if "list-type" not in query:
            return listing
        prefix, since = query.get("prefix", [""])[0], time.monotonic() - self.listing_lag_seconds
        ElementTree.register_namespace("", NAMESPACE)
        root = ElementTree.fromstring(listing)
        with self._lock:
            for entry in root.findall(f"{{{NAMESPACE}}}Contents"):
                if self._stored.get(f"{bucket}/{entry.findtext(f'{{{NAMESPACE}}}Key')}", 0.0) > since:
                    root.remove(entry)
                    self.injected["omitted"] += 1
            for folder in root.findall(f"{{{NAMESPACE}}}CommonPrefixes"):
                name = f"{bucket}/{folder.findtext(f'{{{NAMESPACE}}}Prefix')}"
                if min((at for key, at in self._stored.items() if key.startswith(name)), default=0.0) > since:
                    root.remove(folder)
                    self.injected["omitted"] += 1
            for key, at in self._deleted.items():
                if query.get("delimiter", [""]) == [""] and at > since and key.startswith(f"{bucket}/{prefix}"):
                    entry = ElementTree.SubElement(root, f"{{{NAMESPACE}}}Contents")
                    facts = {"Key": key.removeprefix(f"{bucket}/"), "LastModified": "2026-01-01T00:00:00Z", "Size": "1"}
                    for name, text in facts.items():
                        ElementTree.SubElement(entry, f"{{{NAMESPACE}}}{name}").text = text
                    self.injected["shown though deleted"] += 1
        return ElementTree.tostring(root, xml_declaration=True, encoding="utf-8")

    def draw(self, method: str, path: str) -> str | None:
        """The fault that a request gets."""
        with self._lock:
            if self._random.random() >= self.share:
                return None
            fault = self._random.choice(FAULTS)
            self.injected[fault] += 1
            return fault


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(max(0.0, self.proxy.stalled_until - time.monotonic()))
        while self.proxy.away == "hang":
            self.proxy.hung.set()
            time.sleep(0.05)
        if self.proxy.away == "refuse":
            self._reset()
            return
        fault = self.proxy.draw(self.command, self.path)
        if fault in ("500", "503"):
            self._answer(int(fault), {}, INTERNAL if fault == "500" else SLOW_DOWN)
            return
        if fault == "reset":
            self._reset()
            return
        connection = http.client.HTTPConnection(*self.proxy.upstream, timeout=60)
        try:
            # The Host header is signed, so it goes on as it came.
            given = {name: v for name, v in self.headers.items() if name.lower() not in ("connection", "expect")}
            path, headers = self.proxy.sent(self.command, self.path, given, body)
            connection.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        if self.proxy.listing_lag_seconds:
            self.proxy.saw(self.command, self.path)
            content = self.proxy.aged(self.path, content) if self.command == "GET" else content
        if fault == "hang":
            time.sleep(HANG_SECONDS)
        if fault == "answer lost":
            self._reset()
            return
        headers = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "connection")
        }
        if fault == "hang in the body":
            self._answer(answer.status, headers, content, hangs=True)
            return
        self._answer(answer.status, headers, content, cut=fault == "truncated" and len(content) > 1)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, cut: bool = False, hangs: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if cut or hangs else content)
        if hangs:
            self.wfile.flush()
            self.rfile.read()  # until the client gives up
        if cut:
            self.wfile.flush()
            self._reset()

    def _reset(self) -> None:
        """Close with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (OSError, ValueError):  # the client, or we ourselves, closed the connection
            self.close_connection = True

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass
