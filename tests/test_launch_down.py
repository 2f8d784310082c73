"""`make down` and `make logs` against what SkyPilot 0.14.1 prints, by a `sky` command that is a real process."""

import http.server
import json
import threading
from typing import ClassVar

import pytest

from clouds import lambda_labs
from clouds.providers import CLOUDS
from launch import down

BROUGHT_UP = (
    "\x1b[2mFailed to connect to SkyPilot API server at http://127.0.0.1:46580. Starting a local server.\x1b[0m\n"
    "\x1b[32m✓ SkyPilot API server started.\x1b[0m [INFO] ready\n"
)
NO_CONTROLLER = ("", "sky.exceptions.ClusterNotUpError: No in-progress managed jobs.\n", 1)


def cluster(name: str, **more) -> dict:
    return {"name": name, "status": "UP", "is_managed": False, "labels": None, "cluster_name_on_cloud": None, **more}


def job(number: int, status: str = "RUNNING") -> dict:
    return {"job_id": number, "job_name": "pretrain-8xa100-spot", "status": status}


@pytest.mark.parametrize(
    "queue",
    [NO_CONTROLLER, (BROUGHT_UP + "[]\n", "", 0), ("", BROUGHT_UP + "No in-progress managed jobs.\n", 1)],
    ids=["no job ever", "server was stopped", "both"],
)
def test_down_ends_clusters_whatever_the_queue_of_jobs_says(sky, queue):
    sky(**{"jobs queue": queue, "status": (BROUGHT_UP + json.dumps([cluster("pretrain-8xa100")]), "", 0)})
    done = sky.run("launch.down", "--down")
    assert "down --yes pretrain-8xa100" in sky.called()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is left" in done.stdout


def test_down_says_what_could_not_be_listed_and_ends_the_rest(sky):
    refused = ("", "Traceback ...\nConnectionError: server is unhealthy\n", 1)
    sky(**{"jobs queue": refused, "status": (json.dumps([cluster("pretrain-8xa100")]), "", 0)})
    done = sky.run("launch.down", "--down")
    assert "down --yes pretrain-8xa100" in sky.called()
    assert done.returncode == 1
    assert "managed jobs: `sky jobs queue --skip-finished` failed: Traceback ... ConnectionError" in done.stdout
    assert "nothing is left" not in done.stdout


def test_clusters_that_cannot_be_listed_are_ended_by_name(sky):
    sky(**{"jobs queue": NO_CONTROLLER, "status": ("not what was asked for\n", "", 0)})
    done = sky.run("launch.down", "--down")
    (down,) = [call for call in sky.called() if call.startswith("down")]
    assert {"pretrain-8xa100", "pretrain-gh200", "prep-data"} <= set(down.split())
    assert "pretrain-8xa100-spot" not in down.split()
    assert done.returncode == 1
    assert "clusters: `sky status` failed: not what was asked for" in done.stdout


def test_down_that_fails_for_one_thing_goes_on_with_the_next(sky):
    sky(
        **{
            "jobs queue": (json.dumps([job(1)]), "", 0),
            "jobs cancel": ("", "no such job\n", 1),
            "status": (json.dumps([cluster("pretrain-8xa100")]), "", 0),
        }
    )
    # The job stays in the queue for good: what waits for it must not make the test wait.
    done = sky.run("tests.impatient", "--down")
    assert "down --yes pretrain-8xa100" in sky.called()
    assert done.returncode == 1
    assert "managed jobs: `sky jobs cancel --yes 1` ended with 1" in done.stdout
    assert "!  managed job 1 pretrain-8xa100-spot: RUNNING" in done.stdout


def test_two_jobs_of_one_name_are_cancelled_by_number(sky):
    ended = [job(1, "SUCCEEDED"), {"job_id": 4, "job_name": "of-somebody-else", "status": "RUNNING"}]
    sky(**{"jobs queue": (json.dumps([*ended, job(2), job(3, "RECOVERING")]), "", 0), "status": ("[]", "", 0)})
    done = sky.run("launch.down", "--down")
    assert "jobs cancel --yes 3 2" in sky.called()
    assert done.returncode == 0, done.stdout + done.stderr


def test_down_ends_a_cluster_of_ours_that_has_a_made_up_name_and_no_other(sky):
    labels = {"project": "pretrain-launcher"}
    mine, other = cluster("sky-1a2b-user", labels=labels), cluster("workbench", labels={"project": "mine"})
    managed = cluster("pretrain-8xa100-spot-7", labels=labels, is_managed=True)
    sky(**{"jobs queue": NO_CONTROLLER, "status": (json.dumps([mine, other, managed]), "", 0)})
    sky.run("launch.down", "--down")
    assert [call for call in sky.called() if call.startswith("down")] == ["down --yes sky-1a2b-user"]


def test_without_sky_the_clouds_are_asked_and_the_exit_is_1(sky, tmp_path):
    (tmp_path / "bin/sky").unlink()
    done = sky.run("launch.down", "--down")
    assert done.returncode == 1
    assert "the sky command is not installed; run `make setup-launch`" in done.stdout
    assert "nothing is left" not in done.stdout


# --- logs ------------------------------------------------------------------------------------------------------

SPOT = "sky/pretrain-8xa100-spot.yaml"


def test_logs_follow_the_newest_of_several_jobs_and_name_the_others(sky):
    sky(**{"jobs queue": (json.dumps([job(2), job(5), job(3, "PENDING"), job(9, "FAILED")]), "", 0)})
    done = sky.run("launch.runs", "logs", SPOT)
    assert sky.called()[-1] == "jobs logs 5"
    assert "following job 5, the newest; also running as pretrain-8xa100-spot: 3 (PENDING), 2 (RUNNING)" in done.stdout


@pytest.mark.parametrize(
    ("queue", "said"),
    [
        ((json.dumps([job(2, "SUCCEEDED")]), "", 0), "is running, job 2 has ended (SUCCEEDED)"),
        (NO_CONTROLLER, "is running, there has been none"),
    ],
)
def test_logs_of_an_ended_job_name_the_command_that_shows_them(sky, queue, said):
    sky(**{"jobs queue": queue})
    done = sky.run("launch.runs", "logs", SPOT, RUN="second")
    assert done.returncode == 1
    assert said in done.stderr
    assert "make logs FROM=bucket RUN=second" in done.stderr


def test_logs_of_a_cluster_that_is_gone_name_the_command_that_shows_them(sky):
    sky(status=("[]", "", 0))
    done = sky.run("launch.runs", "logs", "sky/pretrain-8xa100.yaml")
    assert done.returncode == 1
    assert "no cluster pretrain-8xa100 is up" in done.stderr
    assert "make logs FROM=bucket RUN=gpt2-124m" in done.stderr


# --- Lambda's key ----------------------------------------------------------------------------------------------

KEY = "secret_of-the-team.0123456789abcdef"


@pytest.fixture
def lambda_api(monkeypatch, tmp_path):
    """A server in the place of Lambda's: refuses `refusals` times with 429, then knows KEY."""

    class Handler(http.server.BaseHTTPRequestHandler):
        refusals = 0
        asked: ClassVar[list[str]] = []

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
            self.wfile.write(b'{"data": []}')

    Handler.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(lambda_labs, "API", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(lambda_labs, "KEYS", tmp_path / "lambda_keys")
    monkeypatch.delitem(CLOUDS, "aws")
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
    assert down.look(["pretrain-8xa100"]) == ([], [])
    assert lambda_api.asked == [f"Bearer {KEY}"]


def test_too_many_requests_are_waited_out(lambda_api, tmp_path):
    (tmp_path / "lambda_keys").write_text(f"api_key = {KEY}\n")
    lambda_api.refusals = 2
    assert down.look(["pretrain-8xa100"]) == ([], [])
    assert len(lambda_api.asked) == 3


def test_a_key_that_no_header_can_carry_is_not_printed(lambda_api, tmp_path):
    (tmp_path / "lambda_keys").write_text(f"api_key = {KEY}\x01more-of-it\n")
    found, (problem,) = down.look(["pretrain-8xa100"])
    assert found == []
    assert "could not be asked" in problem
    assert KEY not in problem


def test_a_file_without_a_key_one_sentence(lambda_api, tmp_path):
    (tmp_path / "lambda_keys").write_text("api_key=without-blanks\n")
    _, (problem,) = down.look(["pretrain-8xa100"])
    assert "holds no `api_key = ...` line, with a blank on both sides of the =" in problem
    assert "without-blanks" not in problem
