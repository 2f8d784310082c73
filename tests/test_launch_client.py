"""What runs on the user's machine around a launch: what EC2 lists, pull, logs, and the variables that are read."""

import ast
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError

from clouds import ec2
from clouds.aws import Aws
from clouds.base import LABEL, Inventory, Ownership
from core import secrets, storage
from core.errors import ObjectNotFound, RunError
from core.run import journal
from launch import runs
from tests import variables
from tests.later import Later

ROOT = Path(__file__).parent.parent
moto = Later("moto")


# --- what is left ----------------------------------------------------------------------------------------------


REGIONS = ("eu-north-1", "us-east-1")
USER = "1a2b3c4d"
WHOSE = Ownership(("evaluate", "pretrain-8xa100"), USER, frozenset(), frozenset({f"other-{USER}"}))


@pytest.fixture
def account(monkeypatch):
    """EC2 in two regions. Yields what it refuses, as region and operation."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    refused: set[tuple[str, str]] = set()
    clients: dict = {}

    def client(session, region):
        def refuse(model, **_) -> None:
            if (region, model.name) in refused:
                answer = {"Error": {"Code": "UnauthorizedOperation", "Message": "not authorized"}}
                raise ClientError(answer, model.name)

        if region in clients:
            return clients[region]
        made = clients[region] = session.client("ec2", region_name=region)
        made.meta.events.register("before-call", refuse)
        if region == "us-east-1":
            made.describe_regions = lambda: {"Regions": [{"RegionName": name} for name in REGIONS]}
        return made

    with moto.mock_aws():
        monkeypatch.setattr(ec2, "_client", client)
        for region in REGIONS:
            client(boto3.session.Session(), region)
        yield SimpleNamespace(refused=refused, **{name.replace("-", "_"): made for name, made in clients.items()})


def tagged(kind: str, cluster: str = "", label: bool = True, user: str = "") -> dict:
    tags = {"ray-cluster-name": cluster, "skypilot-user": user, "project": "pretrain-launcher" if label else ""}
    shown = [{"Key": key, "Value": value} for key, value in tags.items() if value]
    return {"TagSpecifications": [{"ResourceType": kind, "Tags": shown}]} if shown else {}


def start(client, **tags) -> None:
    client.run_instances(ImageId="ami-12345678", MinCount=1, MaxCount=1, **tagged("instance", **tags))


def test_machines_and_volumes_are_found_in_every_region_by_label_and_by_skypilots_tags(account):
    assert Aws().leftovers(WHOSE) == Inventory()
    start(account.us_east_1, label=False)  # not SkyPilot's
    start(account.us_east_1, cluster=f"other-{USER}", label=False)  # this user's, of another project
    start(account.eu_north_1, cluster=f"sky-5e6f-ann-{USER}")
    volume = tagged("volume", cluster=f"evaluate-{USER}")
    account.us_east_1.create_volume(AvailabilityZone="us-east-1a", Size=100, **volume)
    machine, volume = Aws().leftovers(WHOSE).found
    assert re.fullmatch(rf"aws eu-north-1: \S+ i-\w+ \(running\) of sky-5e6f-ann-{USER}", str(machine))
    assert re.fullmatch(
        rf"aws us-east-1: unattached volume vol-\w+, 100 GB, about \$8.00 a month of evaluate-{USER}", str(volume)
    )
    account.refused.add(("us-east-1", "DescribeInstances"))
    answer = Aws().leftovers(WHOSE)
    assert [found.what for found in answer.found] == [machine.what, volume.what], "the rest is still asked"
    (refusal,) = answer.unasked
    assert refusal.startswith("aws us-east-1: could not be asked for instances (ClientError: ")
    account.refused.clear()
    machine.end()
    volume.end()
    assert Aws().leftovers(WHOSE) == Inventory()


def test_a_stopped_machine_is_listed_with_its_disk_and_what_it_costs(account):
    """The switch of a node on demand powers it off where its role may not terminate it."""
    start(account.us_east_1, cluster=f"evaluate-{USER}")
    (group,) = account.us_east_1.describe_instances()["Reservations"]
    account.us_east_1.stop_instances(InstanceIds=[group["Instances"][0]["InstanceId"]])
    (found,) = Aws().leftovers(WHOSE).found
    size = account.us_east_1.describe_volumes()["Volumes"][0]["Size"]
    disk = rf"disk vol-\w+, {size} GB, about \${0.08 * size:.2f} a month"
    assert re.fullmatch(rf"aws us-east-1: \S+ i-\w+ \(stopped; {disk}\) of evaluate-{USER}", str(found))
    assert found.mine


@pytest.mark.parametrize(
    ("cluster", "label", "mine"),
    [
        (f"sky-5e6f-ann-{USER}", True, True),
        (f"evaluate-{USER}", False, True),
        (f"pretrain-8xa100-3-{USER}", False, True),  # of a managed job
        (f"sky-jobs-controller-0f0f0f0f-{USER}", False, True),
        (f"finetune-bert-{USER}", False, False),  # this user's, but of no task
        ("evaluate-99999999", False, False),
        ("sky-5e6f-ben-99999999", True, False),
        ("", True, False),
        (f"other-{USER}", False, None),  # this user's, of another project
        ("sky-jobs-controller-0f0f0f0f-99999999", False, None),
        ("bert-99999999", False, None),
        ("", False, None),
    ],
)
def test_a_machine_is_this_users_by_its_clusters_name_and_else_only_listed(cluster, label, mine):
    """None: it is certainly of another project, or of another user's."""
    tags = tagged("instance", cluster, label, user="ben").get("TagSpecifications", [{}])[0]
    found = list(ec2.attributed("i-1", tags, None, WHOSE))
    assert [each.mine for each in found] == ([] if mine is None else [mine])
    if mine is False:
        assert str(found[0]).endswith("started by ben, not known to SkyPilot here")


def test_the_label_is_that_of_the_tasks():
    for path in (ROOT / "sky").glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["resources"]["labels"] == dict([LABEL])


# --- pull and logs ---------------------------------------------------------------------------------------------


@pytest.fixture
def run_url() -> str:
    url = "memory://pull/run"
    names = ("run.json", "ledger/segment-000001/start.jsonl", "metrics/segment-000001/00000000-00000001.jsonl")
    for name in names:
        storage.write_bytes(storage.join(url, name), name.encode())
    for step, marker in ((50, True), (100, True), (150, False)):
        folder = storage.join(url, f"checkpoints/step-{step:08d}")
        storage.write_bytes(storage.join(folder, "payload"), b"weights")
        if marker:
            storage.write_bytes(storage.join(folder, "COMPLETE"), b"{}")
    yield url
    for info in storage.list_objects(url):
        storage.delete(info.uri)


def test_pull_takes_the_newest_complete_checkpoint_and_no_other(run_url, tmp_path, capsys):
    runs.pull([run_url, str(tmp_path / "here")])
    steps = sorted(path.name for path in (tmp_path / "here/checkpoints").iterdir())
    assert steps == ["step-00000100"]
    assert (tmp_path / "here/ledger/segment-000001/start.jsonl").read_text() == "ledger/segment-000001/start.jsonl"
    assert "checkpoint: step-00000100" in capsys.readouterr().out
    runs.pull([run_url, str(tmp_path / "here")])
    assert capsys.readouterr().out.startswith("memory://pull/run: 0 of ")


def test_pull_without_a_run_one_sentence(tmp_path):
    with pytest.raises(ObjectNotFound, match="there is no run here; check RUN and BUCKET"):
        runs.pull(["memory://pull/none", str(tmp_path)])


def begin_run(url: str, times: list[float], evaluated: float | None = None) -> None:
    storage.write_bytes(f"{url}/run.json", b"{}")
    ledgers = [("ledger", time) for time in times] + ([("evaluations/ledger", evaluated)] if evaluated else [])
    for number, (ledger, time) in enumerate(ledgers, 1):
        storage.write_bytes(f"{url}/{ledger}/segment-{number:06d}/start.jsonl", b'{"time": %.1f}' % time)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (([1.0],), ([2.0],)),
        (([1.0, 2.0, 3.0],), ([4.0],)),  # the new life has not come as far
        (([1.0],), ([4.0, 5.0, 6.0],)),
        (([1.0],), ([],)),
        (([1.0], 2.0), ([1.0], 3.0)),  # evaluations, made anew
    ],
)
def test_a_run_made_anew_under_its_name_is_not_mixed_with_the_copy_of_the_old_one(tmp_path, first, second):
    """Objects of both have the same names, and often the same sizes."""
    url, folder = str(tmp_path / "bucket/runs/smoke"), str(tmp_path / "pulled/smoke")
    begin_run(url, *first)
    runs.pull([url, folder])
    before = {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    storage.write_bytes(f"{url}/ledger/segment-000009/start.jsonl", b"{}")
    runs.pull([f"{url}/", folder])  # the same run, which went on
    Path(folder, "ledger/segment-000009/start.jsonl").unlink()
    shutil.rmtree(url)
    begin_run(url, *second)
    with pytest.raises(RunError, match=f"^{folder}: is a copy of another run: .*; remove that folder, or pull into"):
        runs.pull([url, folder])
    assert {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()} == before
    runs.pull([url, f"{folder}-2"])


@pytest.mark.parametrize(
    ("url", "name"), [("s3://b/runs/a", "a"), ("s3://b/runs/team/a", "team/a"), ("memory://pull/run", "run")]
)
def test_a_copy_has_the_name_of_its_run(url, name):
    assert runs.name_of(url) == name


def test_logs_of_all_attempts_are_shown_in_order(tmp_path, capsys):
    for attempt, line in (("20260101T000000Z-node-000", "first"), ("20260102T000000Z-node-000", "second")):
        kept = journal.Journal(str(tmp_path / "logs" / attempt))
        kept.add({"time": 0.0, "line": line})
        kept.close()
    runs.show_stored(str(tmp_path))
    shown = capsys.readouterr().out
    assert shown.index("first") < shown.index("20260102T000000Z") < shown.index("second")
    with pytest.raises(ObjectNotFound, match="no machine has written output yet"):
        runs.show_stored(str(tmp_path / "elsewhere"))


def test_a_stored_log_hides_keys_and_reads_the_environment_once_per_object(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "a-secret-of-this-user")
    kept = journal.Journal(str(tmp_path / "logs" / "20260101T000000Z-node-000"))
    for number in range(1000):
        kept.add({"time": 0.0, "line": f"{number} a-secret-of-this-user \x1b[2J"})
    kept.close()
    made = []
    whole = secrets.scrubber
    monkeypatch.setattr(secrets, "scrubber", lambda: made.append(1) or whole())
    runs.show_stored(str(tmp_path))
    shown = capsys.readouterr().out.splitlines()[1:]
    assert shown == [f"00:00:00 {number} *** \\x1b[2J" for number in range(1000)]
    assert len(made) == 1


# --- variables ---------------------------------------------------------------------------------------------------

KINDS = {".py", ".sh", ".yaml"}
# Read, but not for a user to set: Python's, torchrun's and the system's own.
NOT_SETTINGS = {"PATH", "HOME", "USER", "LD_LIBRARY_PATH", "MASTER_ADDR", "MASTER_PORT"}


def variables_in_python() -> set[str]:
    """Names in environ["X"], environ.get("X"), environment.get("X"), settings["X"], positive(environment, "X"),
    settings with env="X", and those of the stores, which look several up in turn."""
    found = set()
    for folder in ("core", "clouds", "costs", "data_prep", "launch", "trainer"):
        for path in [*(ROOT / folder).rglob("*.py"), ROOT / "cost_report.py"]:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "env" and isinstance(node.value, ast.Constant):
                    found.add(node.value.value)
                if isinstance(node, ast.Constant) and re.fullmatch(r"(BUCKET|AWS)_[A-Z0-9_]+", str(node.value)):
                    found.add(node.value)
                source = None
                if isinstance(node, ast.Subscript):
                    source, name = node.value, node.slice
                elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                    source, name = node.func.value, node.args[0]
                elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "positive":
                    source, name = node.args
                if source is not None and isinstance(name, ast.Constant) and isinstance(name.value, str):
                    of = source.attr if isinstance(source, ast.Attribute) else getattr(source, "id", "")
                    if of in ("environ", "environment", "settings") and re.fullmatch(r"[A-Z][A-Z0-9_]+", name.value):
                        found.add(name.value)
    return found - NOT_SETTINGS


def variables_of_tasks() -> set[str]:
    tasks = [yaml.safe_load(path.read_text()) for path in (ROOT / "sky").glob("*.yaml")]
    return {name for task in tasks for part in ("envs", "secrets") for name in task.get(part) or {}}


def test_the_example_is_short_and_gives_no_value():
    text = (ROOT / ".env.example").read_text()
    assert len(text.splitlines()) < 50
    assert set(re.findall(r"^[A-Z0-9_]+=(.*)$", text, re.M)) == {""}


def test_every_variable_is_listed_once_in_the_example_or_in_the_document():
    names = [*variables.in_example(), *variables.in_document()]
    assert len(names) == len(set(names))
    found = variables_in_python()
    assert {"RUN_URL", "SKYPILOT_NODE_IPS", "HANG_MINUTES", "AWS_ENDPOINT_URL"} <= found, "the search works"
    assert sorted((found | variables_of_tasks()) - set(names)) == []


def test_every_listed_variable_is_read_somewhere():
    """By a program, by a shell script, or by a library for which the code names it."""
    folders = ("core", "clouds", "costs", "data_prep", "launch", "trainer", "sky")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.*") if file.suffix in KINDS]
    texts = [file.read_text() for file in [*files, ROOT / "tests/lab.py"]]
    words = {word for text in texts for word in re.findall(r"[A-Z][A-Z0-9_]+", text)}
    assert sorted({*variables.in_example(), *variables.in_document()} - words) == []
