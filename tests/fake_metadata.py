"""AWS's metadata service (IMDSv2) on loopback, well or in trouble.

with metadata_service() as (service, environment):
    service.items["spot/instance-action"] = '{"action": "terminate", "time": "2026-11-20T08:02:00Z"}'
"""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Metadata(http.server.BaseHTTPRequestHandler):
    """IMDSv2 as AWS documents it: a token by PUT, then items by GET; no token, no answer."""

    items: dict[str, str]
    tokens: list[str]
    trouble: list[str]  # of the next requests, one each; see `_troubled`
    dripping: threading.Event  # set: no more of it

    def do_PUT(self) -> None:
        if self._troubled():
            return
        assert self.path == "/latest/api/token"
        assert 0 < int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
        self.tokens.append(f"token-{len(self.tokens)}")
        self.answer(200, self.tokens[-1])

    def do_GET(self) -> None:
        if self._troubled():
            return
        if not self.tokens or self.headers["X-aws-ec2-metadata-token"] != self.tokens[-1]:
            self.answer(401, "")
            return
        item = self.items.get(self.path.removeprefix("/latest/meta-data/"))
        self.answer(200 if item else 404, item or "")

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def _troubled(self) -> bool:
        """Answer wrongly if that is this request's lot."""
        kind = self.trouble.pop(0) if self.trouble else ""
        if kind.isdigit():
            self.answer(int(kind), "busy")
        elif kind == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "60")
            self.end_headers()
            self.wfile.write(b'{"act')
        elif kind == "no HTTP":
            self.wfile.write(b"\x00\x01 what?\r\n")
        elif kind == "no text":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"\xff\xfe{}")
        elif kind == "drip of headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            self._drip(b"X-Slow: yes\r\n")
        elif kind in ("drip with a length", "drip without"):
            self.send_response(200)
            if kind == "drip with a length":
                self.send_header("Content-Length", "100000")
            self.end_headers()
            self._drip(b"x")
        elif kind.startswith("says "):
            self.answer(200, kind.removeprefix("says "))
        return bool(kind)

    def _drip(self, piece: bytes) -> None:
        """So often that no time limit between two bytes is reached, until the client has gone."""
        with contextlib.suppress(OSError):
            while not self.dripping.wait(0.05):
                self.wfile.write(piece)
                self.wfile.flush()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def metadata_service() -> Iterator[tuple[type[Metadata], dict[str, str]]]:
    handler = type("Service", (Metadata,), {"items": {}, "tokens": [], "trouble": [], "dripping": threading.Event()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield handler, {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    finally:
        handler.dripping.set()
        server.shutdown()
        server.server_close()
