"""The task files, read as YAML: what they name exists, and they carry the rules of this project.

tests/test_sky_loader.py gives the same files to SkyPilot's own loader and optimizer.
"""

import re
from pathlib import Path

import pytest
import yaml

from clouds import skypilot
from core.errors import ConfigError
from core.exit_codes import BAD_NODE, PREEMPTED
from core.task import read_task
from launch import managed

ROOT = Path(__file__).parent.parent
TASKS = sorted((ROOT / "sky").glob("*.yaml"))
TRAINING = [path for path in TASKS if path.stem.startswith(("pretrain", "smoke"))]
# The cap's may not be here, or a capped job would start again.
RECOVERED = [PREEMPTED, BAD_NODE]


def task_of(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.fixture(params=TASKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def test_the_folder_holds_tasks_only():
    assert {path.suffix for path in (ROOT / "sky").iterdir()} == {".yaml"}
    stems = {path.stem for path in TASKS}
    assert {"prep-data", "pretrain-8xa100", "pretrain-8xa100-spot", "pretrain-gh200"} <= stems


def test_head_comment_says_how_to_launch_watch_and_stop_and_what_it_costs(path):
    head = path.read_text().split("\nname:")[0]
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "launch/targets.mk").read_text(), re.M))
    for word in ("launch", "watch", "stop", "costs"):
        assert re.search(rf"^#   {word} +\S", head, re.M), word
    assert set(re.findall(r"\bmake ([a-z-]+)", head)) <= targets
    assert re.search(r"\$\d", head)
    assert re.search(r"commits? [0-9a-f]{7}", head), "prices without their date"


def test_every_machine_ends_by_itself(path):
    resources = task_of(path)["resources"]
    if "job_recovery" in resources:  # a managed job's machines end with it
        assert "autostop" not in resources
    else:
        assert resources["autostop"]["down"] is True
        assert 0 < resources["autostop"]["idle_minutes"] <= 5
        assert resources["autostop"]["wait_for"] == "jobs"
    assert resources["max_hourly_cost"] > 0
    assert resources["labels"] == {"project": "pretrain-launcher"}


def test_recovery_names_our_codes_and_never_the_cap():
    recoveries = [task_of(path)["resources"].get("job_recovery") for path in TASKS]
    managed = [recovery for recovery in recoveries if recovery]
    assert managed
    for recovery in managed:
        assert recovery["recover_on_exit_codes"] == RECOVERED
        assert recovery["max_restarts_on_errors"] == 0


def test_every_task_can_be_a_managed_job(path, tmp_path, monkeypatch):
    monkeypatch.setattr(managed, "FOLDER", tmp_path)
    assert managed.chosen(str(path), {}) == str(path)
    copy = Path(managed.chosen(str(path), {"MANAGED": "1"}))
    before, after = task_of(path), task_of(copy)
    assert read_task(str(copy), {}).managed
    if "job_recovery" in before["resources"]:
        assert copy == path
        return
    assert {name for name in before if before[name] != after[name]} == {"resources", "envs"}
    assert {"ordered", "any_of"} & before["resources"].keys() <= {"any_of"}
    candidates = after["resources"].get("ordered", [])
    assert sorted(map(str, candidates)) == sorted(map(str, before["resources"].get("any_of", [])))
    spot = [candidate.get("use_spot", False) for candidate in candidates]
    assert spot == sorted(spot, reverse=True)
    assert "autostop" not in after["resources"]
    assert after["resources"]["job_recovery"]["recover_on_exit_codes"] == RECOVERED


def test_managed_jobs_order_their_candidates():
    """SkyPilot 0.14.1 tries any_of of a managed job in arbitrary order."""
    for path in TASKS:
        resources = task_of(path)["resources"]
        if "job_recovery" in resources:
            assert "any_of" not in resources
            spot = [candidate.get("use_spot", False) for candidate in resources["ordered"]]
            assert spot == sorted(spot, reverse=True), "on demand is the last resort"


def test_commands_stop_at_the_first_error_and_name_what_exists(path):
    task = task_of(path)
    for part in ("setup", "run"):
        script = task[part]
        assert script.startswith("set -euo pipefail\n")
        assert "|| true" not in script
        assert "apt" not in script
        assert "pip " not in script
        for file in re.findall(r"\bbash (\S+)", script):
            assert (ROOT / file).is_file()
        for module in re.findall(r"-m ([a-z_.]+)", script):
            place = ROOT / module.replace(".", "/")
            assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
        for target in re.findall(r"container\.sh \w+ (\w+)", script):
            assert re.search(rf"^FROM \S+ AS {target}$", (ROOT / "Dockerfile").read_text(), re.M), target


def test_configs_exist_and_fit_their_program(path):
    envs = task_of(path)["envs"]
    if "CONFIG" not in envs:
        pytest.skip("names no config")
    assert (ROOT / envs["CONFIG"]).is_file()
    given = {name: "s3://b/prompts.txt" for name, value in envs.items() if value is None and name != "BUCKET"}
    workload = read_task(str(path), given).workload
    assert workload.stage in ("pretrain", "prep", "finetune", "dpo", "distil", "synthesize")
    assert workload.problem == ""


def test_every_variable_that_a_command_uses_is_declared(path):
    """And the other way round: a declared variable reaches the container, or the launcher."""
    task = task_of(path)
    declared = set(task["envs"]) | set(task.get("secrets") or {})
    used = set(re.findall(r"\$\{?([A-Z_]+)", task["setup"] + task["run"]))
    assert used - {"RUN_URL"} <= declared
    launcher = (ROOT / "launch/node/container.sh").read_text()
    for name in declared - used:
        assert re.search(rf"\b{name}\b", launcher) or name.startswith(("AWS_", "BUCKET_")), f"{name} goes nowhere"


def test_secrets_are_no_envs(path):
    task = task_of(path)
    assert not [name for name in task["envs"] if re.search(r"KEY|TOKEN|PASSWORD|SECRET", name)]
    assert all(value in ("", None) for value in (task.get("secrets") or {}).values())


def test_shared_parts_are_the_same_in_all():
    """Each env that several tasks have means the same in all of them."""
    meaning: dict[str, set[str]] = {}
    for path in TRAINING:
        for name, comment in re.findall(r"^  ([A-Z_]+): .*?# (.*)$", path.read_text(), re.M):
            meaning.setdefault(name, set()).add(comment)
    specific = {"RUN", "DATA", "PREP_ARGS"}
    assert {name: said for name, said in meaning.items() if len(said) > 1 and name not in specific} == {}


def command_of(path: str, given: dict[str, str]) -> list[str]:
    return skypilot.launch_command(read_task(str(ROOT / path), given), given, "abc", [])


def test_sky_command_carries_settings_and_hides_secrets(monkeypatch):
    monkeypatch.setattr(skypilot, "find_sky", lambda: "sky")
    path = "sky/pretrain-8xa100.yaml"
    given = {"BUCKET": "b", "MAX_USD": "5", "BUCKET_ACCESS_KEY_ID": "AKIA-very-secret", "UNRELATED": "x"}
    given["AWS_ENDPOINT_URL_S3"] = "https://r2.example"
    command = command_of(path, given)
    text = " ".join(command)
    assert text.startswith("sky launch --cluster pretrain-8xa100 --yes")
    for part in ("BUCKET=b", "MAX_USD=5", "GIT_REVISION=abc", "BUCKET_ENDPOINT_URL=https://r2.example"):
        assert f"--env {part}" in text
    assert "--secret BUCKET_ACCESS_KEY_ID" in text
    assert "very-secret" not in text
    assert "UNRELATED" not in text


def test_the_login_by_which_skypilot_rents_goes_to_no_node(monkeypatch):
    """Not even where the bucket has no keys of its own: a node on AWS has a role."""
    monkeypatch.setattr(skypilot, "find_sky", lambda: "sky")
    login = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t", "AWS_PROFILE": "p"}
    for path in (ROOT / "sky").glob("*.yaml"):
        declared = task_of(path)
        assert not {*login} & {*(declared.get("envs") or {}), *(declared.get("secrets") or {})}
        required = {name: "x" for name, value in declared["envs"].items() if value is None}
        given = {**required, "BUCKET": "b", "IMAGE": "i", "BUCKET_SESSION_TOKEN": "b", "HF_TOKEN": "h", **login}
        command = command_of(f"sky/{path.name}", given)
        sent = {command[at + 1] for at, word in enumerate(command) if word == "--secret"}
        assert sent == ({"BUCKET_SESSION_TOKEN", "HF_TOKEN"} if "BUCKET" in declared["envs"] else set())


def test_awss_files_stay_here_where_all_candidates_are_on_lambda(monkeypatch):
    monkeypatch.setattr(skypilot, "find_sky", lambda: "sky")
    for name, keeps in (("pretrain-gh200", True), ("pretrain-8xa100", False), ("prep-data", False)):
        assert ("aws.remote_identity=NO_UPLOAD" in command_of(f"sky/{name}.yaml", {"BUCKET": "b"})) == keeps


def test_spot_is_a_managed_job(monkeypatch):
    monkeypatch.setattr(skypilot, "find_sky", lambda: "sky")
    path = "sky/pretrain-8xa100-spot.yaml"
    command = command_of(path, {"BUCKET": "b"})
    assert command[:3] == ["sky", "jobs", "launch"]


def test_without_a_bucket_one_sentence(monkeypatch):
    monkeypatch.setattr(skypilot, "find_sky", lambda: "sky")
    path = "sky/pretrain-8xa100.yaml"
    with pytest.raises(ConfigError, match=r"BUCKET is required and empty; give BUCKET=\.\.\."):
        command_of(path, {})
