"""`make logs` against what SkyPilot 0.14.1 prints, by a `sky` that is a real process."""

import json

import pytest

from tests.pretended import NO_CONTROLLER, cluster, job, said

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


def test_logs_without_a_task_follow_what_was_launched_last(sky):
    older = cluster("pretrain-8xa100", launched_at=1000)
    foreign = cluster("somebody-elses", launched_at=3000)
    sky(**{"jobs queue": said(job(4) | {"submitted_at": 2000.5}), "status": said(older, foreign)})
    done = sky.run("launch.runs", "logs")
    assert sky.called()[-1] == "jobs logs 4"
    also = (
        "following managed job pretrain-8xa100-spot, the newest; also up: cluster pretrain-8xa100 (make logs TASK=...)"
    )
    assert also in done.stdout
    sky(**{"jobs queue": NO_CONTROLLER, "status": said(foreign)})
    assert "nothing of this project runs; all output of a run is in the bucket" in sky.run("launch.runs", "logs").stderr
