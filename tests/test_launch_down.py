"""`make down` against what SkyPilot 0.14.1 prints, by a `sky` that is a real process."""

import json
from dataclasses import replace

import pytest

from clouds.base import Cloud, Inventory
from clouds.providers import CLOUDS
from launch import down, left
from tests.pretended import BROUGHT_UP, LABELS, NO_CONTROLLER, SPOT_JOB, USER, cluster, downs, job, said


@pytest.mark.parametrize(
    "queue",
    [NO_CONTROLLER, (BROUGHT_UP + "[]\n", "", 0), ("", BROUGHT_UP + "No in-progress managed jobs.\n", 1)],
    ids=["no job ever", "server was stopped", "both"],
)
def test_down_ends_clusters_whatever_the_queue_of_jobs_says(sky, cloud, capsys, queue):
    sky(**{"jobs queue": queue, "status": (BROUGHT_UP + json.dumps([cluster("pretrain-8xa100")]), "", 0)})
    assert down.main(["--down"]) == 0
    assert downs(sky) == ["down --yes pretrain-8xa100"]
    assert capsys.readouterr().out.endswith("nothing is left: no job, cluster, machine or volume\n")


@pytest.mark.parametrize("program", ["launch.down", "launch.runs"])
def test_without_any_keys_nothing_is_proved(sky, program):
    """With `launch.runs status` too, although it is no failure there that something is up."""
    sky(**{"jobs queue": NO_CONTROLLER, "status": ("[]", "", 0)})
    done = sky.run(program, *(["--down"] if program == "launch.down" else ["status"]), YES="1")
    assert done.returncode == 2
    assert "aws: not asked, because this computer has no credentials for it" in done.stdout
    assert "lambda: not asked" in done.stdout
    assert "?  no cloud has credentials on this computer" in done.stdout
    assert "nothing is left" not in done.stdout
    assert "nothing of this project is up" not in done.stdout


def test_a_cloud_without_credentials_is_no_source(cloud, monkeypatch, capsys):
    monkeypatch.setitem(CLOUDS, "unused", Cloud())
    assert down.main([]) == 0
    out = capsys.readouterr().out
    assert "unused: not asked" in out
    assert "pretended: nothing" in out


def test_a_server_that_cannot_start_is_an_answer_that_is_missing(sky, cloud, capsys):
    refused = ("", "Traceback ...\nConnectionError: server is unhealthy\n", 1)
    sky(**{"jobs queue": refused, "status": refused})
    assert down.main([]) == 2
    out = capsys.readouterr().out
    assert "SkyPilot's managed jobs: could not be asked (`sky jobs queue --skip-finished` failed: Traceback ..." in out
    assert "SkyPilot's clusters: could not be asked" in out
    assert "nothing is left" not in out


def test_without_skypilot_machines_of_ours_are_ended_by_their_cloud(sky, cloud, capsys):
    (sky.folder / "sky").unlink()
    cloud.has("a machine of pretrain-8xa100", mine=True, cluster=f"pretrain-8xa100-{USER}")
    assert down.main(["--down"]) == 2
    assert cloud.ended == ["a machine of pretrain-8xa100"]
    assert "the sky command is not installed; run `make setup-launch`" in capsys.readouterr().out


def test_clusters_that_cannot_be_listed_are_ended_by_name(sky, cloud, capsys):
    sky(**{"jobs queue": NO_CONTROLLER, "status": ("not what was asked for\n", "", 0), "down": ("", "", 0)})
    assert down.main(["--down"]) == 2
    (line,) = downs(sky)
    assert {"pretrain-8xa100", "pretrain-gh200", "prep-data"} <= set(line.split())
    assert SPOT_JOB not in line.split()
    assert "clusters: could not be asked (`sky status --verbose` failed: not what" in capsys.readouterr().out


def test_what_is_up_outranks_what_could_not_be_asked(sky, cloud, capsys):
    cloud.has("a machine", mine=True)
    cloud.unasked = ("pretended north: could not be asked",)
    assert down.main([]) == 1
    out = capsys.readouterr().out
    assert "!  a machine" in out
    assert "?  pretended north" in out
    cloud.machines = []
    assert down.main([]) == 2


def test_down_that_fails_for_one_thing_goes_on_with_the_next(sky, cloud, monkeypatch, capsys):
    monkeypatch.setattr(down, "WAIT_SECONDS", 0.0)  # the job stays in the queue for good
    answers = {"jobs queue": said(job(1)), "jobs cancel": ("", "no such job\n", 1)}
    sky(**answers, status=said(cluster("pretrain-8xa100")))
    assert down.main(["--down"]) == 1
    assert downs(sky) == ["down --yes pretrain-8xa100"]
    out = capsys.readouterr().out
    assert "managed jobs: `sky jobs cancel --yes 1` ended with 1" in out
    assert "!  managed job 1 pretrain-8xa100-spot: RUNNING" in out


def test_a_cancelled_job_that_is_still_going_down_is_waited_for(sky, cloud, capsys):
    queue = [said(job(1)), said(job(1, "CANCELLING")), said(job(1, "CANCELLING")), said()]
    sky(**{"jobs queue": queue, "status": said()})
    assert down.main([]) == 1
    sky(**{"jobs queue": queue[1:], "status": said()})
    assert down.main(["--down"]) == 0
    out = capsys.readouterr().out
    assert out.index("waiting until it is gone: managed job 1") < out.index("nothing is left")


def test_a_machine_is_waited_for_until_its_cloud_lists_it_no_more(sky, cloud, capsys):
    """SkyPilot has forgotten the cluster, and its machine is still shutting down."""
    listings = [2]
    cloud.has("i-1 (shutting-down)", mine=True, cluster=f"evaluate-{USER}")

    def leftovers(whose):
        listings[0] -= 1
        return Inventory(tuple(cloud.machines) if listings[0] >= 0 else ())

    cloud.leftovers = leftovers
    cloud.machines = [replace(cloud.machines[0], end=lambda: None)]
    assert down.main(["--down"]) == 0
    assert "waiting until it is gone: i-1 (shutting-down)" in capsys.readouterr().out


def test_two_jobs_of_one_name_are_cancelled_by_number(sky, cloud):
    ended = [job(1, "SUCCEEDED"), job(4, name="of-another-project")]
    sky(**{"jobs queue": said(*ended, job(2), job(3, "RECOVERING")), "status": said()})
    assert down.main(["--down"]) == 0
    assert "jobs cancel --yes 3 2" in sky.called()


def test_a_job_with_another_name_is_known_by_its_machine(sky, cloud):
    cloud.has("a machine", mine=True, labelled=True, cluster=f"my-try-7-{USER}")
    sky(**{"jobs queue": said(job(7, name="my-try"), job(8, name="other")), "status": said()})
    assert down.main(["--down"]) == 0
    assert "jobs cancel --yes 7" in sky.called()


@pytest.mark.parametrize("how", [{"labels": LABELS}, {"last_creation_yaml": f"setup: bash {left.OUR_COMMAND} image\n"}])
def test_down_ends_a_cluster_of_ours_that_has_a_made_up_name_and_no_other(sky, cloud, how):
    """As a plain `sky launch sky/pretrain-8xa100.yaml` calls it."""
    mine, other = cluster("sky-5e6f-ann", **how), cluster("workbench", labels={"project": "mine"})
    managed = cluster("pretrain-8xa100-spot-7", labels=LABELS, is_managed=True)
    sky(**{"jobs queue": NO_CONTROLLER, "status": said(mine, other, managed)})
    assert down.main([]) == 1
    sky(**{"jobs queue": NO_CONTROLLER, "status": [said(mine, other, managed), said(other)]})
    assert down.main(["--down"]) == 0
    assert downs(sky) == ["down --yes sky-5e6f-ann"]


def test_a_controller_ends_once_its_jobs_have(sky, cloud, capsys):
    controller = cluster("sky-jobs-controller-1a2b3c4d")
    sky(**{"jobs queue": [said(job(1)), said(job(1, "CANCELLING")), said()], "status": said(controller)})
    assert down.main(["--down"]) == 0
    assert downs(sky) == ["down sky-jobs-controller-1a2b3c4d"]
    assert sky.called().index("jobs cancel --yes 1") < sky.called().index("down sky-jobs-controller-1a2b3c4d")


def test_a_controller_that_serves_another_project_stays(sky, cloud):
    controller = cluster("sky-jobs-controller-1a2b3c4d")
    sky(**{"jobs queue": said(job(1, name="of-another-project")), "status": said(controller)})
    assert down.main(["--down"]) == 0
    assert downs(sky) == []


def test_what_others_started_is_listed_and_left_alone(sky, cloud, monkeypatch, capsys):
    cloud.has("a machine of a colleague", labelled=True, cluster="evaluate-99999999")
    cloud.has("a machine without a label", cluster="x")
    assert down.main(["--down"]) == 1
    assert cloud.ended == []
    monkeypatch.setenv("ALL", "1")
    assert down.main(["--down"]) == 1
    assert cloud.ended == ["a machine of a colleague"]
    assert {"status --verbose --all-users -o json", "jobs queue --skip-finished --all-users -o json"} <= {*sky.called()}


def test_a_machine_that_skypilot_has_lost_is_ended_by_its_cloud_and_no_other(sky, cloud):
    """One in SkyPilot's records is left to SkyPilot; a running job would replace it."""
    cloud.has("in the records", mine=True, cluster=f"evaluate-{USER}")
    cloud.has("lost", mine=True, cluster=f"finetune-{USER}")
    survey = left.Survey(clusters=[cluster("evaluate")], jobs=[], on_clouds=cloud.machines)
    down.end_rest(survey, everyone=False)
    assert cloud.ended == ["lost"]
    down.end_rest(replace(survey, clusters=[], jobs=[job(1)]), everyone=False)
    assert cloud.ended == ["lost"]


def test_what_a_machine_leaves_as_it_goes_is_ended_too(sky, cloud):
    """A volume shows as unattached only once its machine is gone, after the first look."""
    cloud.has("a machine", mine=True)
    end = cloud.machines[0].end

    def end_and_leave_a_volume() -> None:
        end()
        cloud.has("its volume", mine=True)

    cloud.machines = [replace(cloud.machines[0], end=end_and_leave_a_volume)]
    assert down.main(["--down"]) == 0
    assert cloud.ended == ["a machine", "its volume"]


@pytest.mark.parametrize(("answer", "ends"), [("y", True), ("n", False), ("", False)])
def test_one_question_is_asked_on_a_terminal(sky, cloud, monkeypatch, capsys, answer, ends):
    monkeypatch.delenv("YES")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    questions = []
    monkeypatch.setattr("builtins.input", lambda prompt: questions.append(prompt) or answer)
    sky(**{"jobs queue": NO_CONTROLLER, "status": said(cluster("evaluate"))})
    assert down.main(["--down"]) == (0 if ends else 1)
    assert len(questions) == 1
    assert bool(downs(sky)) == ends


def test_without_a_terminal_nothing_is_ended_unasked(sky):
    sky(**{"jobs queue": NO_CONTROLLER, "status": said(cluster("evaluate"))})
    done = sky.run("launch.down", "--down")
    assert done.returncode == 1
    assert "to end:\n   cluster evaluate\nnothing was ended: there is no terminal to ask on; give YES=1" in done.stdout
    assert downs(sky) == []


def test_what_it_cost_is_said_at_the_end(sky, cloud, capsys, tmp_path):
    envs, command = (
        "envs: {BUCKET: null, RUN: gpt2-124m}\n",
        f"sky launch --env BUCKET={tmp_path} --env RUN=first x.yaml",
    )
    mine = cluster("pretrain-8xa100", last_creation_yaml=envs, last_creation_command=command)
    records = [{"cluster_hash": "hash-pretrain-8xa100", "total_cost": 3.204, "duration": 720}, {"cluster_hash": "x"}]
    sky(**{"jobs queue": NO_CONTROLLER, "status": said(mine), "cost-report": said(*records)})
    assert down.main(["--down"]) == 0
    out = capsys.readouterr().out
    assert "what it cost:\n   cluster pretrain-8xa100: $3.20 for 0.20 hours at today's list price" in out
    assert f"{tmp_path}/runs/first: no run here yet" in out
