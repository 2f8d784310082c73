"""An OpenAI-compatible endpoint on loopback that misbehaves: the answers are real HTTP, the model is not there."""

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG_SECONDS = 30.0
KEY = "sk-test-7291"


class FakeEndpoint:
    """Fails one call in five (in turn 500, 429 with Retry-After, garbage, a broken connection); hangs once.

    `faults` False: never. `calls` counts by outcome, `prompts` successful answers by prompt. `says` may answer in its
    place: it gets the body of a call and returns a status and a document, or None.
    """

    def __init__(
        self,
        faults: bool = True,
        seconds_per_call: float = 0.0,
        usage: tuple[int, int] = (20, 10),
        says: Callable[[dict[str, Any]], tuple[int, Any] | None] = lambda body: None,
    ):
        self.bodies: list[dict[str, Any]] = []
        self._says = says
        self.calls: Counter[str] = Counter()
        self.prompts: Counter[str] = Counter()
        self.most_at_once = 0
        self._usage = usage
        self._faults = faults
        self._seconds = seconds_per_call
        self._at_once = 0
        self._numbers = itertools.count(1)
        self._kinds = itertools.cycle(["500", "429", "garbage", "broken"])
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                endpoint._serve(self)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "FakeEndpoint":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = next(self._numbers)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            kind = "answer"
            if handler.headers.get("Authorization") != f"Bearer {KEY}":
                kind = "401"
            elif self._faults and number == 3:
                kind = "hang"
            elif self._faults and number % 5 == 0:
                kind = next(self._kinds)
            self.bodies.append(body)
            told = self._says(body) if kind == "answer" else None
            self.calls["told" if told else kind] += 1
        try:
            if told:
                return self._send(handler, told[0], json.dumps(told[1]).encode())
            getattr(self, f"_do_{kind}", self._do_status)(handler, kind, body)
        except BrokenPipeError:
            pass  # the caller did not wait
        finally:
            with self._lock:
                self._at_once -= 1

    def _do_answer(self, handler, _, body) -> None:
        time.sleep(self._seconds)
        prompt = body["messages"][-1]["content"]
        with self._lock:
            self.prompts[prompt] += 1
        text = f"An answer to: {prompt}"
        finish = "length" if "at length" in prompt else "stop"
        if "in one word" in prompt:
            text = ""
        document = {
            "id": "x",
            "model": f"{body['model']}-2026-11-20",
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
            "usage": {"prompt_tokens": self._usage[0], "completion_tokens": self._usage[1]},
        }
        self._send(handler, 200, json.dumps(document).encode())

    def _do_garbage(self, handler, *_) -> None:
        self._send(handler, 200, b"<html>busy</html>")

    def _do_broken(self, handler, *_) -> None:
        handler.connection.close()

    def _do_hang(self, handler, *_) -> None:
        time.sleep(HANG_SECONDS)

    def _do_status(self, handler, kind, _) -> None:
        self._send(handler, int(kind), b'{"error": "no"}', {"Retry-After": "1"} if kind == "429" else {})

    def _send(self, handler, status: int, data: bytes, headers=None) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)
