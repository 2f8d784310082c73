"""Preparation from a Hub that throttles, redirects and fails: a small server with the Hub's answers."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from core import hub, manifest
from core.errors import ConfigError
from tests.corpus import documents, prepare_set, stored, write_parquet

COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
REPOSITORY = "owner/name"


class Hub(http.server.ThreadingHTTPServer):
    """Serves the files of a folder as the data set owner/name; every third range answer is a refusal first."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder = folder
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.ranges = 0


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(path)
        self.server.tokens.add(self.headers.get("Authorization"))
        if re.fullmatch(rf"/api/datasets/{REPOSITORY}(/revision/[^/]+)?", path):
            self._json({"id": REPOSITORY, "sha": COMMIT, "siblings": []})
        elif path.endswith(f"/tree/{COMMIT}"):
            self._json([{"type": "directory", "path": "data", "oid": "0" * 40}])
        elif "/tree/" in path:
            names = sorted(file.name for file in self.server.folder.iterdir())
            self._json([self._entry(name) for name in names])
        elif f"/resolve/{COMMIT}/" in path:
            self._range(self.server.folder / path.rsplit("/", 1)[-1])
        else:
            self._json({"error": "Entry not found"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:  # paths-info
        self.server.requests.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        names = [file.name for file in self.server.folder.iterdir() if file.name in body]
        self._json([self._entry(name) for name in names])

    def _entry(self, name: str) -> dict:
        size = (self.server.folder / name).stat().st_size
        return {"type": "file", "path": f"data/{name}", "size": size, "oid": "0" * 40}

    def _range(self, file: Path) -> None:
        self.server.ranges += 1
        if self.server.ranges % 3 == 1:
            status, headers = ((429, {"Retry-After": "0"}), (503, {}))[self.server.ranges % 2]
            self._json({"error": "slow down"}, status, headers)
            return
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        self._send(file.read_bytes()[start : end + 1], 206, {})

    def _json(self, document: object, status: int = 200, headers: dict | None = None) -> None:
        self._send(json.dumps(document).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def fake_hub(tmp_path: Path):
    write_parquet(tmp_path / "hub", [documents(60), documents(120)[60:]])
    with Hub(tmp_path / "hub") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_throttling_hub_gives_the_same_set(fake_hub: Hub, tmp_path: Path, vocab_bpe: Path):
    # A process of its own: huggingface_hub reads HF_ENDPOINT when it is imported.
    url = f"hf://datasets/{REPOSITORY}/data/*.parquet"
    small = ("--data.part_bytes=20000", "--data.shard_tokens=5000", "--data.val_fraction=0.1", "--workers=1")
    flags = (f"--source.url={url}", f"--data.url={tmp_path}/set", f"--tokenizer.vocab_url={vocab_bpe}", *small)
    address = f"http://127.0.0.1:{fake_hub.server_port}"
    environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "data_prep.prepare", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "read failed" in done.stderr  # it was refused, and said so
    assert "hf_secret" not in done.stderr + done.stdout
    assert "Bearer hf_secret" in fake_hub.tokens
    # The newest revision is pinned: every file was read at the commit.
    assert manifest.read(f"{tmp_path}/set").source["revision"] == COMMIT
    assert all(COMMIT in path for path in fake_hub.requests if "/resolve/" in path)
    prepare_set(str(tmp_path / "hub/*.parquet"), f"{tmp_path}/local", vocab_bpe)
    throttled, local = (
        {name: sha for name, sha in stored(f"{tmp_path}/{url}").items() if name.endswith(".bin")}
        for url in ("set", "local")
    )
    assert throttled == local


def test_hub_addresses():
    where = hub.parse("hf://datasets/a/b@v1.2/sample/10BT/*.parquet")
    assert where == hub.HubPath("datasets", "a/b", "v1.2", "sample/10BT/*.parquet")
    assert where.at("c0ffee") == "hf://datasets/a/b@c0ffee/sample/10BT/*.parquet"
    assert hub.parse("hf://datasets/a/b/c").revision == ""
    with pytest.raises(ConfigError, match="not of the form hf://datasets/OWNER/NAME"):
        hub.parse("hf://a/b/c.parquet")
