"""The Makefile's recipes: what is typed is a word for the program, never a command, and no secret is typed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The Makefile beside a launcher that prints its arguments, one in each pair of brackets."""
    folder = tmp_path_factory.mktemp("make")
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("launch", "requirements"):
        shutil.copytree(ROOT / name, folder / name)
    python = folder / ".venv-launch/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"; echo\n")
    python.chmod(0o755)
    database = subprocess.run(["make", "-pn", "help"], cwd=folder, capture_output=True, text=True).stdout
    [stamp] = [line.split(" := ")[1] for line in database.splitlines() if line.startswith("LAUNCH_STAMP")]
    (folder / stamp).touch()
    return folder


def make(tree: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    plain = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(["make", "-s", *arguments], cwd=tree, env=plain | variables, capture_output=True, text=True)


VALUES = ("x; touch ran", "$(touch ran)", "`touch ran`", "a'b; touch ran'", "$(shell touch ran)", '"')


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(
    ("target", "name", "shown"),
    [
        ("status", "TASK", "<sky/{}.yaml>"),
        ("pull", "TASK", "<sky/{}.yaml>"),
        ("pretrain", "GPUS", "<--gpus><{}>"),
        ("check", "NODES", "<--num-nodes><{}>"),
        ("pretrain", "INFRA", "<--infra><{}>"),
        ("plan", "USD", "<cost_report.py><plan><--usd={}>"),
        ("plan", "DEADLINE", "<--deadline={}>"),
        ("run", "USD", "<launch.run><--usd={}>"),
        ("run", "ADD_USD", "<launch.run><--add-usd={}>"),
        ("status", "RUN", ""),
        ("logs", "FROM", ""),
        ("smoke", "TASK", "<sky/smoke-cpu.yaml>"),
    ],
)
def test_a_variable_is_one_word_and_runs_nothing(tree: Path, target: str, name: str, shown: str, value: str):
    done = make(tree, target, **{name: value})
    assert done.returncode == 0, done.stderr
    assert shown.format(value) in done.stdout
    assert not (tree / "ran").exists()


@pytest.mark.parametrize("name", ["REGISTRY_PASSWORD", "BUCKET_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_URI"])
def test_a_secret_on_the_command_line_is_refused_and_in_the_environment_taken(tree: Path, name: str):
    done = make(tree, "image", f"{name}=very-secret")
    assert done.returncode != 0
    assert f"{name} on make's command line shows in the list of processes; put it into .env" in done.stderr
    assert "very-secret" not in done.stdout + done.stderr
    done = make(tree, "image", **{name: "very-secret"})
    assert done.returncode == 0, done.stderr
    assert "<launch.submit><sky/build-image.yaml>" in done.stdout
