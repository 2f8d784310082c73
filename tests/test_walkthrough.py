"""docs/walkthrough.md, command by command in one shell, as a newcomer would type them."""

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.run.reader import read_run
from core.settings import evaluation, loader
from core.settings.preparation import PrepConfig
from core.settings.stages import training_schema, written_out
from tests import corpus, launching

PAGE = launching.REPOSITORY / "docs" / "walkthrough.md"
HOURS = 3600.0


def commands() -> list[str]:
    """All indented lines, in their order. Sets that the page offers in place of its own get folders of their own.

    Their texts come from a file, which also stands in for an address on the internet.
    """
    typed = re.findall(r"^ {4}(\S.*)$", PAGE.read_text(), re.M)
    place = "SOURCE_URL=input.txt DATA_URL=walk/other-{}"
    return [f"{place.format(at)} {line}" if "SOURCE=" in line else line for at, line in enumerate(typed)]


def test_settings_of_the_page_are_accepted(monkeypatch):
    monkeypatch.chdir(launching.REPOSITORY)
    environment, loaded = {"DATA_URL": "walk/data"}, []
    for command in commands():
        words = shlex.split(command.rstrip("&"))
        if "trainer.train" in words:
            arguments = written_out(words[3:])
            loaded.append(loader.load(training_schema(arguments), arguments, environment))
        elif "trainer.evaluate" in words:
            loaded.append(evaluation.parse(words[3:], environment))
        elif "data_prep.prepare" in words:
            loaded.append(loader.load(PrepConfig, words[3:], environment))
    assert len(loaded) == 11


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone after `make setup`."""
    for name in ("clouds", "core", "costs", "data_prep", "demo", "launch", "requirements", "sky", "trainer"):
        (tmp_path / name).symlink_to(launching.REPOSITORY / name)
    for name in ("Makefile", "cost_report.py"):
        (tmp_path / name).symlink_to(launching.REPOSITORY / name)
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python").chmod(0o755)
    (programs / "activate").write_text(f"export PATH={programs}:$PATH\n")
    database = subprocess.run(["make", "-pn", "help"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (tmp_path / re.search(r"^STAMP := (.*)$", database, re.M)[1]).touch()
    (tmp_path / "input.txt").write_text("\n\n".join(corpus.speeches(3)))
    return tmp_path


def type_all(typed: list[str], folder: Path) -> str:
    """Output of the commands, in a shell that stops at the first one that fails."""
    own = ("VENV", "GPU", "DATA", "RUN", "BUCKET", "CONFIG", "PREP_ARGS")
    environment = {name: value for name, value in launching.no_ranks().items() if name not in own}
    shell = subprocess.Popen(
        ["bash", "-c", "set -euxo pipefail\n" + "\n".join(typed)],
        cwd=folder,
        env=environment | {"DATA_CACHE_DIR": str(folder / "cache"), "USD_PER_HOUR": "3.6"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = shell.communicate(timeout=HOURS)
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
    assert shell.returncode == 0, output[-8000:]
    return output


@pytest.mark.slow
def test_every_command_works(clone: Path):
    output = type_all(commands(), clone)
    base = read_run(str(clone / "walk/base"))
    assert [segment.end is None for segment in base.segments] == [True, False, False]
    assert base.last_step == 240
    assert read_run(str(clone / "walk/branch")).last_step == 200
    with (clone / "walk/metrics.csv").open() as file:
        assert {row["step"] for row in csv.DictReader(file)} >= {"1", "200"}
    for made in ("plots/loss.png", "comparison.svg", "exported/model.safetensors", "random/model.safetensors"):
        assert (clone / "walk" / made).exists()
    assert re.search(r"resumed from step (50|75|100)", output)
    assert "'role': 'assistant'" in output
    for run in ("base", "branch", "chat", "lora", "dpo", "small"):
        assert run in output[output.rindex("cost_report.py --compare") :].partition("\n")[2]
    assert len(list(clone.glob("walk/other-*/manifest.json"))) == 2
