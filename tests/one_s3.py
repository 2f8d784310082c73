"""One S3 server for all workers of pytest-xdist, run by the process that has started them once a worker asks for it."""

import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path

from demo.s3_server import S3Server
from tests.patience import PATIENCE_SECONDS

KEPT = ("port", "access_key", "secret_key", "reader_secret_key")


class Host:
    """Runs the server in a thread, because the server ends with the thread that has started it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tests-s3-"))
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="S3 server", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not (self.folder / "wanted").exists():
            if self._is_over.wait(0.1):
                return
        try:
            with S3Server(self.folder) as server:
                server.make_bucket("tests")
                self._tell({name: getattr(server, name) for name in KEPT})
                self._is_over.wait()
        except Exception as error:  # the workers raise it
            self._tell({"problem": f"{type(error).__name__}: {error}"})

    def _tell(self, answer: dict) -> None:
        (self.folder / "answer.new").write_text(json.dumps(answer))
        os.replace(self.folder / "answer.new", self.folder / "answer.json")

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)


def join(folder: Path) -> S3Server:
    """The server of the host with this folder, in a worker."""
    (folder / "wanted").touch()
    answer = folder / "answer.json"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not answer.exists():
        if time.monotonic() > deadline:
            raise RuntimeError("the S3 server of all workers does not come")
        time.sleep(0.05)
    found = json.loads(answer.read_text())
    if "problem" in found:
        raise RuntimeError(f"the S3 server of all workers did not start: {found['problem']}")
    server = S3Server(folder)
    for name in KEPT:
        setattr(server, name, found[name])
    return server
