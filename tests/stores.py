"""Object stores of other kinds on loopback: Azure's, one that looks like Google's, and one without conditional writes.

with Azurite(folder) as store:
    store.environment()     variables with which core.storage uses it; store.url is a folder in it
"""

import base64
import email.utils
import hashlib
import hmac
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from urllib.parse import quote, unquote

import botocore.auth
import botocore.awsrequest
import botocore.credentials

from demo.processes import die_with_parent
from demo.s3_server import S3Server, _free_ports
from tests.faulty_proxy import FaultyProxy
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parent.parent
HOW_TO_INSTALL = "needs azurite: npm install --prefix .azurite azurite"
# Published by Microsoft, for the emulator alone.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


class SigningProxy(FaultyProxy):
    """Signs each request anew, so that a subclass may change its headers."""

    def __init__(self, server: S3Server):
        super().__init__(server.endpoint)
        self._keys = botocore.credentials.Credentials(server.access_key, server.secret_key)

    def changed(self, headers: dict[str, str]) -> dict[str, str]:
        raise NotImplementedError

    def sent(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[str, dict[str, str]]:
        name, question, query = path.partition("?")
        path = quote(unquote(name), safe="/~") + question + query
        ours = ("authorization", "host", "content-length", "x-amz-date", "x-amz-content-sha256", "accept", "user-agent")
        kept = {name: value for name, value in headers.items() if name.lower() not in ours}
        host, port = self.upstream
        url = f"http://{host}:{port}{path}"
        request = botocore.awsrequest.AWSRequest(method, url, headers=self.changed(kept), data=body)
        botocore.auth.S3SigV4Auth(self._keys, "s3", "us-east-1").add_auth(request)
        signed = dict(request.prepare().headers)
        return path, {**signed, "Host": f"{host}:{port}", "Content-Length": str(len(body))}


class GoogleStandIn(SigningProxy):
    """Google's XML interface as far as it is S3's: requests without a login, and its own condition for a new object.

    What it does not show: Google's logins, errors, checksums and limits.
    """

    def changed(self, headers: dict[str, str]) -> dict[str, str]:
        plain = {name: value for name, value in headers.items() if not name.lower().startswith("x-goog-")}
        if headers.get("x-goog-if-generation-match") == "0":
            plain["If-None-Match"] = "*"
        return plain

    def environment(self) -> dict[str, str]:
        key = {"type": "service_account", "disable_oauth": True, "gcs_base_url": self.url}
        key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        return {"BUCKET_ENDPOINT_URL": self.url, "BUCKET_GOOGLE_KEY": json.dumps(key)}


class WithoutConditions(SigningProxy):
    """A store that takes no notice of If-None-Match, as some do."""

    def changed(self, headers: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in headers.items() if name.lower() != "if-none-match"}


def azurite() -> str | None:
    """Azurite's program, if it is installed."""
    return shutil.which("azurite-blob", path=f"{ROOT}/.azurite/node_modules/.bin{os.pathsep}{os.environ['PATH']}")


class Azurite:
    """Azure's blob storage, emulated by Microsoft's own server, with one container."""

    url = f"az://{ACCOUNT}/tests"

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = 0

    def environment(self) -> dict[str, str]:
        return {"BUCKET_ENDPOINT_URL": f"http://127.0.0.1:{self.port}/{ACCOUNT}", "BUCKET_AZURE_KEY": KEY}

    def __enter__(self) -> "Azurite":
        [self.port] = _free_ports(1)
        command = [azurite(), "--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--inMemoryPersistence"]
        command += ["--skipApiVersionCheck", "--silent", "--disableTelemetry"]
        with (self.folder / "azurite.log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True, preexec_fn=die_with_parent
            )
        self._wait()
        self._make_container("tests")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"azurite does not answer; see {self.folder / 'azurite.log'}") from None
                time.sleep(0.1)

    def _make_container(self, name: str) -> None:
        """obstore makes none. Azure's shared-key signature, as its documentation describes it."""
        date = email.utils.formatdate(usegmt=True)
        place = f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-08-06\n{place}"
        digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
        headers = {"x-ms-date": date, "x-ms-version": "2021-08-06", "Content-Length": "0"}
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        address = f"http://127.0.0.1:{self.port}/{ACCOUNT}/{name}?restype=container"
        urllib.request.urlopen(urllib.request.Request(address, headers=headers, method="PUT")).close()
