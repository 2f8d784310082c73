"""Runs an S3 server on loopback (SeaweedFS, from its PyPI package) for the demo, the tests and the benchmarks.

    with S3Server(Path("/tmp/s3")) as server:
        subprocess.run([...], env=os.environ | server.environment())

The server listens on free ports of 127.0.0.1, sends no telemetry, stores its data in the given folder, and dies with
its parent.
"""

import contextlib
import functools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from demo.processes import die_with_parent

START_SECONDS = 60.0
STARTS = 4
_PORTS = (
    "master.port master.port.grpc volume.port volume.port.grpc filer.port filer.port.grpc s3.port s3.port.grpc "
    "s3.port.iceberg s3.port.lance"
).split()


class PortTaken(RuntimeError):
    """Another program took one of the free ports before the server did."""


class S3Server:
    """A server as a context manager. `environment()` returns variables that direct S3 clients to it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.access_key = "local"
        self.secret_key = secrets.token_hex(16)
        self.reader_secret_key = secrets.token_hex(16)
        self.port = 0
        self._process: subprocess.Popen | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def reader_environment(self) -> dict[str, str]:
        """The variables of `environment`, but with keys that may only read and list."""
        keys = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": self.reader_secret_key}
        return self.environment() | keys

    def __enter__(self) -> "S3Server":
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        identities = self.folder / "identities.json"
        found = [
            _identity(self.access_key, self.secret_key, "Admin", "Read", "Write", "List", "Tagging"),
            _identity("reader", self.reader_secret_key, "Read", "List"),
        ]
        identities.write_text(json.dumps({"identities": found}))
        identities.chmod(0o600)
        for _ in range(STARTS - 1):
            with contextlib.suppress(PortTaken):
                return self._started(data, identities)
        return self._started(data, identities)

    def _started(self, data: Path, identities: Path) -> "S3Server":
        ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self.port = ports["s3.port"]
        command = [_weed(), "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
        command += [
            "-filer",
            "-s3",
            "-s3.autoCreateBucket=false",
            f"-s3.config={identities}",
            "-master.volumeSizeLimitMB=256",
            "-volume.max=2000",
        ]
        command += [f"-{name}={port}" for name, port in ports.items()]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,
                # The server would take keys of these variables, such as those of an earlier server, for its own.
                env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")},
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.kill()  # killed, because a regular end takes ten seconds and the data is temporary
            self._process.wait()

    def make_bucket(self, name: str) -> None:
        self._client().create_bucket(Bucket=name)

    def has_bucket(self, name: str) -> bool:
        return name in [bucket["Name"] for bucket in self._client().list_buckets()["Buckets"]]

    def _client(self):
        return self._client_of(self.port)

    @functools.cache  # noqa: B019 (a process has one server, and reading S3's model takes half a second)
    def _client_of(self, port: int):
        import botocore.session

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
        )

    def _wait(self) -> None:
        """Wait until the server lists and stores objects. The server answers requests before it can store objects."""
        probe = f"probe-{secrets.token_hex(4)}"
        deadline = time.monotonic() + START_SECONDS
        client = None
        while True:
            if self._process.poll() is not None:
                raise PortTaken(f"the S3 server stopped; see {self.folder / 'server.log'}")
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                    pass
                client = client or self._client()
                if not self.has_bucket(probe):
                    client.create_bucket(Bucket=probe)
                client.put_object(Bucket=probe, Key="ready", Body=b"yes")
                client.delete_object(Bucket=probe, Key="ready")
                client.delete_bucket(Bucket=probe)
                return
            except Exception as error:  # parts of the server are not ready yet: try again until the deadline
                if "SignatureDoesNotMatch" in str(error):  # our keys are right, so this is another server
                    raise PortTaken(f"another S3 server listens on port {self.port}") from error
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"no S3 server after {START_SECONDS:.0f} s ({error}); see {self.folder / 'server.log'}"
                    ) from error
                time.sleep(0.2)


def _identity(access_key: str, secret_key: str, *actions: str) -> dict:
    keys = {"accessKey": access_key, "secretKey": secret_key}
    return {"name": access_key, "credentials": [keys], "actions": actions}


def _weed() -> str:
    found = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not found:
        raise RuntimeError("the S3 server is not installed; run `make setup`")
    return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
