"""`make watch` ends the machine that nothing else ends."""

import urllib.error

import pytest

from clouds import skypilot
from clouds.base import Leftover
from launch import left
from launch.watch import Watch
from tests.pretended import NO_CONTROLLER, SPOT_JOB, USER, Pretended, cluster, job


def watched(cloud: Pretended, *clusters: dict, jobs: list[dict] | None = (), asked: bool = True) -> left.Survey:
    return left.Survey(list(clusters) if asked else None, None if jobs is None else list(jobs), list(cloud.machines))


def test_a_machine_that_never_gets_autostop_is_ended(cloud):
    """Its launch died: SkyPilot has half a record of it, or none."""
    cloud.has("a", mine=True, cluster=f"one-{USER}")
    cloud.has("b", mine=True, cluster=f"two-{USER}")
    half, watch = cluster("one", status="INIT", autostop=-1), Watch(600.0)
    assert [line.partition(":")[0] for line in watch.step(watched(cloud, half), 0.0)] == ["a", "b"]
    assert list(watch.step(watched(cloud, half), 599.0)) == []
    assert [line.rpartition(", ")[2] for line in watch.step(watched(cloud, half), 600.0)] == ["and was ended"] * 2
    assert cloud.ended == ["a", "b"]


def test_a_machine_that_something_ends_is_left_alone(cloud):
    cloud.has("with autostop", mine=True, cluster=f"one-{USER}")
    cloud.has("of a job", mine=True, cluster=f"{SPOT_JOB}-7-{USER}")
    cloud.has("of others", mine=False, cluster="three-ffffffff")
    survey, watch = watched(cloud, cluster("one", autostop=2), jobs=[job(7)]), Watch(600.0)
    assert [list(watch.step(survey, now)) for now in (0.0, 9999.0)] == [[], []]


def test_autostop_in_time_is_the_end_of_the_matter(cloud):
    cloud.has("a", mine=True, cluster=f"one-{USER}")
    watch = Watch(600.0)
    list(watch.step(watched(cloud, cluster("one", autostop=-1)), 0.0))
    (said,) = watch.step(watched(cloud, cluster("one", autostop=2)), 500.0)
    assert said == f"one-{USER}: has autostop now, or is gone"
    list(watch.step(watched(cloud, cluster("one", autostop=-1)), 9999.0))
    assert cloud.ended == []


@pytest.mark.parametrize("missing", [{"asked": False}, {"jobs": None}])
def test_while_skypilot_cannot_be_asked_the_watch_ends_nothing(cloud, missing):
    cloud.has("a", mine=True, cluster=f"one-{USER}")
    watch = Watch(600.0)
    lines = [line for now in (0.0, 700.0, 1400.0) for line in watch.step(watched(cloud, **missing), now)]
    assert lines == ["SkyPilot did not answer, so nothing is ended now; `make down` ends your machines"]
    assert cloud.ended == []


def test_an_api_that_refuses_is_asked_again(cloud):
    def refuse() -> None:
        raise urllib.error.URLError("no network")

    machine = Leftover("a", mine=True, cluster=f"one-{USER}", end=refuse)
    watch, survey = Watch(600.0), left.Survey([], [], [machine])
    list(watch.step(survey, 0.0))
    for now in (600.0, 660.0):
        assert list(watch.step(survey, now)) == [
            "a: could not be ended (<urlopen error no network>); it is tried again"
        ]


def test_a_server_that_hangs_is_an_answer_that_is_missing(sky, cloud, monkeypatch):
    monkeypatch.setattr(skypilot, "LIST_SECONDS", 0.5)
    sky(status=("", "", "waits"), **{"jobs queue": NO_CONTROLLER})
    survey = left.look()
    assert survey.clusters is None
    assert "`sky status --verbose` did not answer within 0 s" in survey.unasked[0]
    assert survey.exit_code == left.UNKNOWN
