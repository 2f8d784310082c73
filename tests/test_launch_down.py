"""`make down`, `make logs` and `make watch` against what SkyPilot 0.14.1 prints, by a `sky` that is a real process."""

import http.server
import json
import threading
import urllib.error
from dataclasses import replace
from typing import ClassVar

import pytest

from clouds import lambda_labs, skypilot
from clouds.base import Cloud, Inventory, Leftover, Ownership
from clouds.lambda_labs import LambdaLabs
from clouds.providers import CLOUDS
from core.errors import ConfigError
from launch import down, left
from launch.watch import Watch

BROUGHT_UP = (
    "\x1b[2mFailed to connect to SkyPilot API server at http://127.0.0.1:46580. Starting a local server.\x1b[0m\n"
    "\x1b[32m✓ SkyPilot API server started.\x1b[0m [INFO] ready\n"
)
NO_CONTROLLER = ("", "sky.exceptions.ClusterNotUpError: No in-progress managed jobs.\n", 1)


USER = "1a2b3c4d"
LABELS = {"project": "pretrain-launcher"}
SPOT_JOB = "pretrain-8xa100-spot"


def cluster(name: str, **more) -> dict:
    on_cloud = f"{name}-{USER}"
    record = {"name": name, "status": "UP", "is_managed": False, "labels": None, "cluster_name_on_cloud": on_cloud}
    return record | {"cluster_hash": f"hash-{name}", **more}


def job(number: int, status: str = "RUNNING", name: str = SPOT_JOB) -> dict:
    return {"job_id": number, "job_name": name, "status": status}


def said(*records: dict) -> tuple[str, str, int]:
    return json.dumps(records), "", 0


class Pretended(Cloud):
    """A cloud with `machines`; one that is ended is gone."""

    def __init__(self):
        self.machines: list[Leftover] = []
        self.unasked: tuple[str, ...] = ()
        self.ended: list[str] = []

    def is_configured(self) -> bool:
        return True

    def leftovers(self, whose: Ownership) -> Inventory:
        return Inventory(tuple(self.machines), self.unasked)

    def has(self, what: str, **more) -> None:
        def end() -> None:
            self.ended.append(what)
            self.machines = [each for each in self.machines if each.what != what]

        self.machines.append(Leftover(what, end=end, **more))


@pytest.fixture
def cloud(sky, monkeypatch) -> Pretended:
    """The only cloud of a user whose `sky` is ours. `down.main` runs in this process, with YES=1 and no pauses."""
    sky.find_here(monkeypatch)
    (sky.home / ".sky").mkdir()
    (sky.home / ".sky/user_hash").write_text(USER)
    monkeypatch.setenv("YES", "1")
    monkeypatch.delenv("ALL", raising=False)
    monkeypatch.setattr(down, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(down.environment, "adopt", lambda: None)
    pretended = Pretended()
    for name in list(CLOUDS):
        monkeypatch.delitem(CLOUDS, name)
    monkeypatch.setitem(CLOUDS, "pretended", pretended)
    sky(**{"jobs queue": NO_CONTROLLER, "status": said()})
    return pretended


def downs(sky) -> list[str]:
    return [call for call in sky.called() if call.startswith("down")]


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
    envs = f"envs: {{BUCKET: {tmp_path}, RUN: first}}\n"
    mine = cluster("pretrain-8xa100", last_creation_yaml=envs)
    records = [{"cluster_hash": "hash-pretrain-8xa100", "total_cost": 3.204, "duration": 720}, {"cluster_hash": "x"}]
    sky(**{"jobs queue": NO_CONTROLLER, "status": said(mine), "cost-report": said(*records)})
    assert down.main(["--down"]) == 0
    out = capsys.readouterr().out
    assert "what it cost:\n   cluster pretrain-8xa100: $3.20 for 0.20 hours at today's list price" in out
    assert f"{tmp_path}/runs/first: no run here yet" in out


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


# --- Lambda's key ----------------------------------------------------------------------------------------------

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


# --- make watch ------------------------------------------------------------------------------------------------


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
    assert lines == ["SkyPilot could not be asked, so that nothing is ended; `make down` ends what is yours"]
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
