"""Sets up an emulated cloud and a prepared home folder for emulated computers, for bench.interruptions."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import harness
from launch import role

SWITCH_MINUTES = 5.0
POLL_SECONDS = 0.5
IN_FLIGHT = 5
LAUNCHES = 1  # number of cells at a time; several cells would compete for the processors
BUCKET = "my-bucket"
LAB = Path(os.environ.get("LAB_DIR") or "/nonexistent")
LAB_ROOT = Path(os.environ.get("LAB_ROOT") or "/tmp/lab")
PORT = 47100  # port of the first cell's API server


class Bench:
    """Parts that all cells share: the project's folder with `.sky.yaml`, the emulated cloud, and a prepared home."""

    def __init__(self, scratch: Path):
        self.scratch, self.project = scratch, scratch / "project"
        self.slots, self.launching = threading.Semaphore(IN_FLIGHT), threading.Semaphore(LAUNCHES)
        self._asking, self._listed = threading.Lock(), (0.0, [])
        if self.project.exists():
            shutil.rmtree(self.project)
        self.project.mkdir()
        files = subprocess.run(["git", "ls-files", "-z"], cwd=harness.REPOSITORY, capture_output=True, check=True)
        for name in filter(None, files.stdout.decode().split("\0")):
            target = self.project / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(harness.REPOSITORY / name, target)
        self.endpoint = self.inside(LAB_ROOT / "home", "sh", "-c", "echo $AWS_ENDPOINT_URL").stdout.strip()
        self.python = harness.REPOSITORY / ".venv-launch/bin/python"
        code = "import boto3, sys; boto3.client('s3').create_bucket(Bucket=sys.argv[1])"
        self.inside(LAB_ROOT / "home", self.python, "-c", code, BUCKET)
        self._store_source()
        # `make role` accepts only a bucket at AWS. Without the address of the emulated cloud, this bucket looks like a
        # bucket at AWS.
        alone = ("env", "-u", "AWS_ENDPOINT_URL", "AWS_CONFIG_FILE=/dev/null", f"AWS_ENDPOINT_URL_IAM={self.endpoint}")
        settings = {"SWITCH_MINUTES": f"{SWITCH_MINUTES:g}"}
        made = self.inside(LAB_ROOT / "home", *alone, self.python, "-m", "launch.role", **settings)
        assert role.switch_minutes(self.project / role.SKY_CONFIG) == SWITCH_MINUTES, made.stdout + made.stderr
        self.home = scratch / "home"
        if not self.home.exists():
            self._prepare_home()

    def _store_source(self) -> None:
        from tests import corpus

        folder = self.scratch / "source"
        paragraphs = [part for text in corpus.speeches(20) for part in text.split("\n\n") if len(part) > 200]
        corpus.write_parquet(folder, [paragraphs], rows=200)
        (folder / "vocab.bpe").write_bytes(corpus.vocab_bpe().read_bytes())
        code = "import boto3, pathlib, sys\nfor path in pathlib.Path(sys.argv[2]).iterdir():\n"
        code += " boto3.client('s3').upload_file(str(path), sys.argv[1], 'source/' + path.name)"
        self.inside(LAB_ROOT / "home", self.python, "-c", code, BUCKET, folder)

    def _prepare_home(self) -> None:
        """Prepare a home folder in which SkyPilot has found the clouds, and stop the server of that SkyPilot."""
        lab = LAB_ROOT / "home"
        self.home.mkdir()
        for name in (".aws", ".lambda_cloud"):
            shutil.copytree(lab / name, self.home / name)
        for name in ("catalogs", "wheels"):
            shutil.copytree(lab / ".sky" / name, self.home / ".sky" / name, symlinks=True)
        shutil.copy2(lab / ".sky/config.yaml", self.home / ".sky/config.yaml")
        found = self.inside(self.home, "sky", "check", "aws", "lambda", SKYPILOT_API_SERVER_LOCAL_PORT=str(PORT - 1))
        (self.scratch / "check.log").write_text(found.stdout + found.stderr)
        kill(self.home)
        with contextlib.closing(sqlite3.connect(self.home / ".sky/state.db")) as database:
            # `~/.sky/user_hash` gives each cell its own user. A server prefers the hash in its database, so the hash in
            # the database is deleted.
            database.execute("DELETE FROM system_config WHERE config_key = 'server_user_hash'")
            database.commit()

    def command(self, home: Path, *command: object, **environment: str) -> list[str]:
        given = {"HOME": str(home), "BUCKET": BUCKET, "AWS_DEFAULT_REGION": "us-east-1", "YES": "1"}
        given |= {"BUCKET_ACCESS_KEY_ID": "test", "BUCKET_SECRET_ACCESS_KEY": "test", **environment}
        # If this variable is set, a process of SkyPilot that changes its title keeps its environment. `processes` finds
        # a process by its environment.
        given["SPT_NOENV"] = "1"
        # With more memory, SkyPilot's server would start thirty controllers of managed jobs.
        given["SKYPILOT_POD_MEMORY_GB_LIMIT"] = "4"
        settings = [f"{name}={value}" for name, value in given.items()]
        return [str(LAB / "labexec"), "env", *settings, *map(str, command)]

    def inside(self, home: Path, *command: object, **environment: str) -> subprocess.CompletedProcess:
        """Run a command on an emulated computer, in the project's folder."""
        words = self.command(home, *command, **environment)
        return subprocess.run(words, cwd=self.project, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    def instances(self) -> list[dict[str, Any]]:
        """All machines of the emulated clouds. Cells that call this at about the same time share one answer."""
        with self._asking:
            if time.monotonic() - self._listed[0] > POLL_SECONDS:
                done = subprocess.run([LAB / "labctl", "json"], capture_output=True, text=True, check=True)
                self._listed = (time.monotonic(), json.loads(done.stdout))
            return self._listed[1]


def processes(home: Path) -> Iterator[int]:
    """The ids of the processes of an emulated computer.

    They are found by the computer's home folder, which is in their environment.
    """
    mark = f"HOME={home}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)
        except OSError:
            continue


def send(home: Path, number: int) -> None:
    """Send a signal to all processes of an emulated computer."""
    for process in processes(home):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def kill(home: Path) -> None:
    """Kill all processes of an emulated computer, including processes that are started meanwhile."""
    while any(True for _ in processes(home)):
        send(home, signal.SIGKILL)
        time.sleep(0.1)
