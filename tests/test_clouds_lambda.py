"""Lambda's API: its keys, its refusals, and which of its machines are ours."""

import http.server
import json
import threading
import urllib.error
from typing import ClassVar

import pytest

from clouds import lambda_labs
from clouds.base import Inventory, Ownership
from clouds.lambda_labs import LambdaLabs
from clouds.providers import CLOUDS
from core.errors import ConfigError
from launch import down, left
from tests.pretended import LABELS, NO_CONTROLLER, USER, cluster, downs, said

KEY = "secret_of-the-team.0123456789abcdef"


@pytest.fixture
def lambda_api(monkeypatch, tmp_path):
    """A server in the place of Lambda's: refuses `refusals` times with 429, then knows KEY and lists `instances`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        refusals = 0
        asked: ClassVar[list[str]] = []
        instances: ClassVar[list[dict]] = []
        terminated: ClassVar[list[str]] = []

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.asked.append(self.headers.get("Authorization"))
            known = self.headers.get("Authorization") == f"Bearer {KEY}"
            code = 200 if known else 403
            if Handler.refusals:
                Handler.refusals -= 1
                code = 429
            self.send_response(code)
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(json.dumps({"data": Handler.instances}).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/instance-operations/terminate"
            Handler.terminated += body["instance_ids"]
            Handler.instances = [each for each in Handler.instances if each["id"] not in body["instance_ids"]]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": {}}')

    Handler.asked, Handler.instances, Handler.terminated = [], [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(lambda_labs, "API", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(lambda_labs, "KEYS", tmp_path / "lambda_keys")
    yield Handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "text",
    [
        f"api_key = {KEY}\n",
        f"api_key = {KEY}\nssh_key_name = sky-key-ab12\n",
        f"ssh_key_name = sky-key-ab12\napi_key = {KEY}",
        f"# of the team, ask = Ann\n\napi_key = {KEY}\r\n",
        f"\ufeffapi_key = {KEY}\n",
    ],
)
def test_lambda_keys_are_read_as_skypilot_reads_them(lambda_api, tmp_path, text):
    (tmp_path / "lambda_keys").write_text(text, encoding="utf-8")
    assert LambdaLabs().leftovers(Ownership()) == Inventory()
    assert lambda_api.asked == [f"Bearer {KEY}"]


def test_too_many_requests_are_waited_out(lambda_api, tmp_path):
    (tmp_path / "lambda_keys").write_text(f"api_key = {KEY}\n")
    lambda_api.refusals = 2
    assert LambdaLabs().leftovers(Ownership()) == Inventory()
    assert len(lambda_api.asked) == 3


def test_a_key_that_no_header_can_carry_is_not_printed(lambda_api, tmp_path):
    (tmp_path / "lambda_keys").write_text(f"api_key = {KEY}\x01more-of-it\n")
    with pytest.raises(urllib.error.HTTPError, match="403") as problem:
        LambdaLabs().leftovers(Ownership())
    assert KEY not in left.brief(problem.value)


def test_a_file_without_a_key_one_sentence(lambda_api, tmp_path):
    (tmp_path / "lambda_keys").write_text("api_key=without-blanks\n")
    with pytest.raises(
        ConfigError, match=r"holds no `api_key = \.\.\.` line, with a blank on both sides of the ="
    ) as problem:
        LambdaLabs().leftovers(Ownership())
    assert "without-blanks" not in str(problem.value)


def on_lambda(name: str | None) -> dict:
    place = {"region": {"name": "us-east-1"}, "instance_type": {"name": "gpu_8x_a100"}}
    return {"id": f"id-of-{name}", "name": name, "status": "active", **place}


def test_machines_on_lambda_are_told_apart_by_name(sky, cloud, lambda_api, tmp_path, monkeypatch, capsys):
    """A plain `sky launch` names it after the user; SkyPilot's records tell that it is ours."""
    (tmp_path / "lambda_keys").write_text(f"api_key = {KEY}\n")
    monkeypatch.setitem(CLOUDS, "lambda", LambdaLabs())
    plain = cluster("sky-5e6f-ann", labels=LABELS)
    names = [f"sky-5e6f-ann-{USER}-head", f"finetune-{USER}-worker", f"other-project-{USER}-head"]
    lambda_api.instances = [on_lambda(name) for name in (*names, "evaluate-99999999-head", "bench", None)]
    sky(**{"jobs queue": NO_CONTROLLER, "status": said(plain, cluster("other-project"))})
    assert down.main(["--down"]) == 1
    assert downs(sky) == ["down --yes sky-5e6f-ann"]
    # This `sky down` ends no machine, so that both are lost.
    assert lambda_api.terminated == [f"id-of-sky-5e6f-ann-{USER}-head", f"id-of-finetune-{USER}-worker"]
    out = capsys.readouterr().out
    assert "other-project" not in out
    foreign = [line for line in out.splitlines() if line.startswith("!  lambda us-east-1: gpu_8x_a100 ")]
    assert [line.partition(", ")[2] for line in foreign[-3:]] == [
        "not known to SkyPilot here; if it is yours, end it in Lambda's console"
    ] * 3
    assert "nothing is left" not in out


def test_a_machine_of_somebody_else_on_lambda_is_listed_and_left_alone(cloud, lambda_api, tmp_path, monkeypatch):
    (tmp_path / "lambda_keys").write_text(f"api_key = {KEY}\n")
    monkeypatch.setitem(CLOUDS, "lambda", LambdaLabs())
    lambda_api.instances = [on_lambda("bench")]
    monkeypatch.setenv("ALL", "1")
    assert down.main(["--down"]) == 1
    assert lambda_api.terminated == []
