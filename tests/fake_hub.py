"""A small server with the Hub's answers about one data set; every third range answer is a refusal first."""

import http.server
import json
import re
from urllib.parse import unquote

COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
REPOSITORY = "owner/name"
REVISIONS = ("main", "v1")


class Hub(http.server.ThreadingHTTPServer):
    """Serves `files` as one data set at one commit. A gated one shows only its card without a token."""

    def __init__(self, repository: str = REPOSITORY, commit: str = COMMIT):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repository, self.commit = repository, commit
        self.files: dict[str, bytes] = {}
        self.newest = commit
        self.gated = False
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.ranges = 0


class _Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.server.requests.append(path)
        self.server.tokens.add(self.headers.get("Authorization"))
        repository, commit = self.server.repository, self.server.commit
        about = re.fullmatch(rf"/api/datasets/{repository}(?:/revision/([^/]+))?", path)
        if about and about[1] in (None, commit, *REVISIONS):
            sha = self.server.newest if about[1] in (None, "main") else commit
            self._json({"id": repository, "sha": sha, "siblings": [], "gated": "auto" if self.server.gated else False})
        elif about:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif path == "/api/datasets":
            self._json([{"id": repository}, {"id": "owner/other"}])
        elif tree := re.fullmatch(rf"/api/datasets/{repository}/tree/({commit})(?:/(.*))?", path):
            self._json([self._entry(name) for name in sorted(self.server.files) if name.startswith(tree[2] or "")])
        elif file := re.fullmatch(rf"/datasets/{repository}/resolve/{commit}/(.+)", path):
            if self.server.gated and file[1] != "README.md" and not self.headers.get("Authorization"):
                self._refuse(401, "GatedRepo", "Access to dataset owner/name is restricted.")
            else:
                self._range(self.server.files[file[1]])
        else:
            self._refuse(401, "RepoNotFound", "Invalid username or password.")

    do_HEAD = do_GET

    def do_POST(self) -> None:  # paths-info
        self.server.requests.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._json([self._entry(name) for name in self.server.files if name in unquote(body)])

    def _entry(self, name: str) -> dict:
        return {"type": "file", "path": name, "size": len(self.server.files[name]), "oid": "0" * 40}

    def _range(self, data: bytes) -> None:
        self.server.ranges += 1
        if self.server.ranges % 3 == 1:
            status, headers = ((429, {"Retry-After": "0"}), (503, {}))[self.server.ranges % 2]
            self._json({"error": "slow down"}, status, headers)
            return
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        self._send(data[start : end + 1], 206, {})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    def _json(self, document: object, status: int = 200, headers: dict | None = None) -> None:
        self._send(json.dumps(document).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
