"""docs/walkthrough.md, command by command, as somebody would type them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import launching

PAGE = launching.REPOSITORY / "docs" / "walkthrough.md"


def commands() -> list[str]:
    return re.findall(r"^ {4}((?:python|export) .*)$", PAGE.read_text(), re.M)


@pytest.mark.slow
def test_every_command_works(tmp_path):
    for name in ("clouds", "core", "costs", "data_prep", "demo", "launch", "sky", "trainer", "cost_report.py"):
        (tmp_path / name).symlink_to(launching.REPOSITORY / name)
    (tmp_path / "python").symlink_to(sys.executable)
    programs = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment = {**os.environ, **programs, "DATA_CACHE_DIR": str(tmp_path / "cache"), "USD_PER_HOUR": "3.6"}
    exported = {}
    for command in commands():
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail; {command}; echo VOCAB_URL=$VOCAB_URL"],
            cwd=tmp_path,
            env={"VOCAB_URL": "", **environment, **exported},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        exported["VOCAB_URL"] = done.stdout.rsplit("VOCAB_URL=", 1)[1].strip()
        last = done.stdout
    assert (tmp_path / "walk/plots/loss.png").exists()
    assert (tmp_path / "walk/exported/model.safetensors").exists()
    for run in ("walk/base", "walk/chat", "walk/lora", "walk/dpo", "walk/small"):
        assert run.removeprefix("walk/") in last, last
