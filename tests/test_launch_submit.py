"""Launching: settings go along, and what a node would refuse is refused before anything is rented."""

import contextlib
import json
import os
import time
from pathlib import Path

import pytest

from core.errors import LauncherError
from core.run import paid
from core.run.folder import RunFolder
from core.settings import loader
from core.settings.run import RunConfig
from core.task import read_task
from launch import check, submit
from tests import corpus
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parent.parent
TRAIN = "sky/pretrain-8xa100.yaml"
REHEARSAL = {"DEVICE": "cpu", "CONFIG": "trainer/configs/debug.yaml", "DATA": "tokens"}


@pytest.fixture(scope="module")
def bucket_folder(tmp_path_factory, vocab_bpe) -> Path:
    """A folder in the place of the bucket, with a small token set."""
    folder = tmp_path_factory.mktemp("bucket")
    corpus.prepare_set(
        corpus.write_parquet(folder / "source", [corpus.documents(60)]), str(folder / "data/tokens"), vocab_bpe
    )
    return folder


def test_a_task_that_can_run_is_launched_with_its_settings(sky, bucket_folder):
    done = sky.run("launch.submit", TRAIN, **REHEARSAL, BUCKET=str(bucket_folder), MAX_USD="20")
    assert done.returncode == 0, done.stdout + done.stderr
    (launch,) = sky.called()
    assert launch.startswith("launch --cluster pretrain-8xa100 --yes --detach-run --env BUCKET=")
    assert "--env MAX_USD=20" in launch
    assert "forecast: " in done.stdout  # on a CPU its dollars are not known


# --- a launch that is interrupted or fails ---------------------------------------------------------------------

UP = {"name": "pretrain-8xa100", "status": "INIT", "cluster_name_on_cloud": "pretrain-8xa100-1a2b3c4d"}
REQUEST = {"request_id": "3f", "name": "sky.launch", "cluster_name": "pretrain-8xa100"}
NOW = 4e9  # later than any launch of a test


def answers(**more) -> dict:
    return {"launch": ["", "", "waits"], "jobs queue": ["[]", "", 0], "status": ["[]", "", 0]} | more


def said(*records: dict) -> list:
    return [json.dumps(records), "", 0]


def interrupt(sky, how, task: str = TRAIN) -> int:
    """Start a launch, interrupt it as soon as `sky launch` runs, return its exit code."""
    process = sky.start("launch.submit", task, "--no-check", BUCKET="b")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (sky.folder / "waits").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
    how(process)
    return process.wait(PATIENCE_SECONDS)


def type_ctrl_c(process) -> None:
    os.write(process.terminal, b"\x03")


def close_terminal(process) -> None:
    os.close(process.terminal)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        pytest.param(type_ctrl_c, 130, id="Ctrl-C"),
        pytest.param(lambda process: process.terminate(), 143, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(close_terminal, 129, id="closed terminal", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_launch_is_cancelled_and_what_it_began_is_ended(sky, how, code):
    other = {"request_id": "9", "name": "sky.launch", "cluster_name": "workbench", "created_at": NOW}
    before = {**REQUEST, "request_id": "1", "created_at": 1.0}
    requests = said(other, before, {**REQUEST, "created_at": NOW})
    sky(**answers(**{"api status": requests, "status": said({**UP, "launched_at": NOW})}))
    assert interrupt(sky, how) == code
    calls = [call for call in sky.called() if call.startswith(("api cancel", "down", "jobs cancel"))]
    assert calls == ["api cancel --yes 3f", "down --yes pretrain-8xa100"]


def test_a_launch_waits_for_a_machine_no_longer_than_it_may(sky):
    """MAX_WAIT of a second: nothing is up, so the launch is cancelled; a cluster that is up is left to go on."""
    requests = said({**REQUEST, "created_at": NOW})
    sky(**answers(**{"api status": requests}))
    done = sky.run("launch.submit", TRAIN, "--no-check", BUCKET="b", MAX_WAIT="0.02")
    assert done.returncode == 143
    assert "no machine within MAX_WAIT" in done.stdout
    assert "tried A100-80GB:8 at lambda" in done.stdout or "tried A100:8 at" in done.stdout
    calls = sky.called()
    assert "--retry-until-up" in calls[0]
    assert "api cancel --yes 3f" in calls


@pytest.mark.slow
def test_a_managed_job_waits_no_longer_either(sky):
    name = "pretrain-8xa100-spot"
    job = {"job_id": 2, "job_name": name, "status": "STARTING", "submitted_at": NOW}
    sky(**answers(**{"jobs launch": ["", "", 0], "jobs queue": said(job), "api status": said()}))
    done = sky.run("launch.submit", f"sky/{name}.yaml", "--no-check", BUCKET="b", MAX_WAIT="0.02")
    assert done.returncode == 143
    assert "tried A100:8 on spot at aws/us-east-1, A100:8 on spot at aws/us-west-2" in done.stdout
    assert "jobs cancel --yes 2" in sky.called()
    sky(**answers(**{"jobs launch": ["", "", 0], "jobs queue": said(job | {"status": "RUNNING"})}))
    assert sky.run("launch.submit", f"sky/{name}.yaml", "--no-check", BUCKET="b", MAX_WAIT="60").returncode == 0
    wrong = sky.run("launch.submit", f"sky/{name}.yaml", "--no-check", BUCKET="b", MAX_WAIT="30 min")
    assert "environment variable MAX_WAIT is '30 min', must be a number above zero" in wrong.stderr


def test_a_cluster_that_was_up_before_stays(sky):
    sky(**answers(**{"api status": said({**REQUEST, "created_at": NOW}), "status": said({**UP, "launched_at": 1})}))
    assert interrupt(sky, type_ctrl_c) == 130
    calls = sky.called()
    assert "api cancel --yes 3f" in calls
    assert not [call for call in calls if call.startswith("down")]


def test_an_interrupted_job_is_cancelled_by_number(sky):
    name = "pretrain-8xa100-spot"
    jobs = [{"job_id": number, "job_name": name, "status": "PENDING"} for number in (1, 2)]
    jobs = [jobs[0] | {"submitted_at": 1.0}, jobs[1] | {"submitted_at": NOW}]
    request = {"request_id": "4", "name": "sky.jobs.launch", "cluster_name": "sky-jobs-controller-1", "created_at": NOW}
    launch = {"jobs launch": ["", "", "waits"], "jobs queue": said(*jobs), "api status": said(request)}
    sky(**answers(**launch))
    assert interrupt(sky, type_ctrl_c, "sky/pretrain-8xa100-spot.yaml") == 130
    assert [call for call in sky.called() if "cancel" in call] == ["api cancel --yes 4", "jobs cancel --yes 2"]


def test_a_launch_that_cannot_be_undone_says_what_ends_it(sky, capfd):
    refused = ["", "server is unhealthy", 1]
    sky(**answers(**{"api status": refused, "status": refused, "jobs queue": refused}))
    shown = []

    def ctrl_c(process) -> None:
        type_ctrl_c(process)
        with contextlib.suppress(OSError):  # the terminal ends with its program
            while text := os.read(process.terminal, 1 << 16):
                shown.append(text.decode())

    assert interrupt(sky, ctrl_c) == 130
    text = "".join(shown)
    assert "?  `sky api status --verbose` failed: server is unhealthy" in text
    assert "nothing was found, but not everything could be asked: `make down` asks again" in text


def test_a_failed_launch_ends_with_a_look_at_what_is_left(sky):
    sky(**answers(launch=["", "", 1], status=said({**UP, "launched_at": NOW})))
    done = sky.run("launch.submit", TRAIN, "--no-check", BUCKET="b")
    assert done.returncode == 1
    assert "!  cluster pretrain-8xa100: INIT" in done.stdout
    assert done.stdout.endswith("1 up and maybe billed; `make down` ends it\n")


# --- checks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MAX_USD", "$20", "environment variable MAX_USD: max_usd is '$20', must be a number"),
        ("MAX_USD", "20 USD", "max_usd is '20 USD', must be a number"),
        ("MAX_USD", "20,50", "max_usd is '20,50', must be a number"),
        ("MAX_USD", "-5", "max_usd: is -5.0, must be at least 0"),
        ("USD_PER_HOUR", "$12", "USD_PER_HOUR is '$12', must be a number above zero"),
        ("RANKS_PER_NODE", "eight", "RANKS_PER_NODE is 'eight', must be a whole number"),
        ("HANG_MINUTES", "15m", "HANG_MINUTES is '15m', must be a number above zero"),
        ("DEVICE", "gpu", "DEVICE is 'gpu', must be cuda or cpu"),
        ("RUN", "../x", "RUN is '../x', must be the name of a folder in BUCKET/runs"),
        ("BUCKET", "s3:/b", "BUCKET is 's3:/b', which looks like a URL but is not one; did you mean s3://b?"),
        ("AWS_ENDPOINT_URL", "r2.example.com", "AWS_ENDPOINT_URL is 'r2.example.com', must begin with https://"),
        ("BUCKET_ENDPOINT_URL", "r2.example.com", "BUCKET_ENDPOINT_URL is 'r2.example.com', must begin with https://"),
        ("BUCKET_GOOGLE_KEY", "nowhere.json", "BUCKET_GOOGLE_KEY: the file cannot be read (No such file or directory)"),
        ("TRAIN_ARGS", "--train.stepz=5", "unknown setting train.stepz"),
        ("DATA", "elsewhere", "`make prep-data` makes it"),
    ],
)
def test_what_the_node_would_refuse_is_refused(monkeypatch, capsys, bucket_folder, name, value, said):
    monkeypatch.chdir(ROOT)
    settings = {**REHEARSAL, "BUCKET": str(bucket_folder), name: value}
    assert not submit.launchable(read_task(TRAIN, settings), settings)
    assert said in capsys.readouterr().out


def test_launch_and_check_say_the_same_and_rent_nothing(sky, bucket_folder):
    given = {**REHEARSAL, "BUCKET": str(bucket_folder), "MAX_USD": "$20"}
    done = sky.run("launch.submit", TRAIN, **given)
    assert done.returncode == 1
    assert "max_usd is '$20', must be a number" in done.stdout
    assert "nothing was rented" in done.stderr
    assert sky.called() == []
    done = sky.run("launch.check", TRAIN, **given)
    assert done.returncode == 1
    assert "max_usd is '$20', must be a number" in done.stdout


def test_a_launch_without_checks_must_be_asked_for(sky, bucket_folder):
    given = {**REHEARSAL, "BUCKET": str(bucket_folder), "DATA": "elsewhere"}
    assert sky.run("launch.submit", TRAIN, "--no-check", **given).returncode == 0
    (launch,) = sky.called()
    assert "--no-check" not in launch


def test_nothing_is_rented_on_a_spent_cap(sky, bucket_folder):
    folder = RunFolder(f"{bucket_folder}/runs/spent")
    paid.begin(folder, "refused", time.time() - 3600, 16.0, "elsewhere")
    paid.end(folder, "refused")
    given = {**REHEARSAL, "BUCKET": str(bucket_folder), "RUN": "spent"}
    done = sky.run("launch.submit", TRAIN, **given, MAX_USD="15")
    assert done.returncode == 1
    assert f"x  cap: {folder} has cost $16.00, all of MAX_USD ($15)" in done.stdout
    assert sky.called() == []
    assert sky.run("launch.submit", TRAIN, **given, MAX_USD="20").returncode == 0


def test_a_cap_of_zero_is_said_aloud(sky, bucket_folder):
    """Shells, and make once more, turn MAX_USD=$20 into MAX_USD=0, which is no cap."""
    done = sky.run("launch.submit", TRAIN, **REHEARSAL, BUCKET=str(bucket_folder), MAX_USD="0")
    assert done.returncode == 0
    assert "MAX_USD is 0, so nothing caps what this costs" in done.stdout


@pytest.mark.parametrize("text", ["$20", "20.", "1e1", "0", "-5", "20 USD", "nan", "inf", "1_000", "", "none"])
def test_check_and_node_agree_on_a_cap(monkeypatch, text):
    monkeypatch.chdir(ROOT)
    settings = {"BUCKET": "b", "MAX_USD": text}
    task = read_task(TRAIN, settings)
    given = {**settings, **task.envs}
    refused = any(finding.mark == "x" for finding in check.findings(check.check_config, task, given))
    try:
        loader.load(RunConfig, [], {"RUN_URL": "x", "MAX_USD": text})
        assert not refused
    except LauncherError:
        assert refused


def test_status_of_a_run_that_is_not_there_shows_no_dollars(sky, bucket_folder):
    done = sky.run("launch.runs", "status", TRAIN, BUCKET=f"{bucket_folder}/", RUN="mistyped")
    assert f"{bucket_folder}/runs/mistyped: no run here yet; check RUN and BUCKET" in done.stdout
    assert "$0.00" not in done.stdout


def test_a_task_without_a_bucket_needs_none(sky):
    done = sky.run("launch.submit", "sky/build-image.yaml", IMAGE="registry/name:tag")
    assert done.returncode == 0, done.stdout + done.stderr
