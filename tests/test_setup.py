"""requirements/setup.sh: which Python, what it repairs, and one sentence for what it cannot mend.

`uv` is a real process here that installs nothing; CI runs the real set-up.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "requirements/setup.sh"

UV = """#!/usr/bin/env bash
echo "$*" >>"{folder}/calls"
case "$1" in
  --version) echo "uv 0.13.9 (test)" ;;
  venv) mkdir -p "${{@: -1}}/bin"; touch "${{@: -1}}/pyvenv.cfg"; ln -s "{python}" "${{@: -1}}/bin/python" ;;
  pip) {pip} ;;
esac
"""


class SetUp:
    def __init__(self, folder: Path):
        self.folder, self.venv = folder, folder / "a venv"
        self.uv()

    def uv(self, pip: str = "true") -> None:
        """The `uv` on PATH; `pip` is what its `uv pip` does."""
        file = self.folder / "uv"
        file.write_text(UV.format(folder=self.folder, python=sys.executable, pip=pip))
        file.chmod(0o755)

    def python(self, version: str) -> str:
        file = self.folder / "other-python"
        file.write_text(f"#!/bin/sh\necho {version}\n")
        file.chmod(0o755)
        return str(file)

    def run(self, python: str = sys.executable, build: str = "torch") -> subprocess.CompletedProcess:
        given = {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "PYTHON": python, "LC_ALL": "C"}
        return subprocess.run(
            [SCRIPT, "demo", str(self.venv), build], env=given, cwd="/", capture_output=True, text=True
        )

    def called(self) -> str:
        return (self.folder / "calls").read_text()


@pytest.fixture
def setup(tmp_path) -> SetUp:
    return SetUp(tmp_path)


def test_a_new_environment_gets_the_pinned_set_and_torch_by_its_hash(setup):
    done = setup.run()
    assert done.returncode == 0, done.stderr
    assert (setup.venv / "pyvenv.cfg").exists()
    assert "--no-deps --require-hashes -r requirements/demo.txt" in setup.called()
    assert "--require-hashes -r requirements/torch-cpu.txt" in setup.called()


def test_an_environment_that_works_is_kept_and_a_broken_one_made_anew(setup):
    setup.run()
    (setup.venv / "mine").touch()
    assert setup.run().returncode == 0
    assert (setup.venv / "mine").exists()
    (setup.venv / "bin/python").unlink()
    (setup.venv / "bin/python").symlink_to(setup.folder / "gone")
    done = setup.run()
    assert done.returncode == 0, done.stderr
    assert "has no working Python" in done.stdout
    assert not (setup.venv / "mine").exists()


def test_a_folder_that_is_no_environment_is_not_removed(setup):
    setup.venv.mkdir()
    (setup.venv / "thesis.tex").touch()
    done = setup.run()
    assert done.returncode == 1
    assert "is not a virtual environment; move it away, or set VENV" in done.stderr
    assert (setup.venv / "thesis.tex").exists()


@pytest.mark.parametrize("version", ["3.10", "3.15", "2.7"])
def test_other_versions_of_python_are_refused(setup, version):
    done = setup.run(setup.python(version))
    assert done.returncode == 1
    assert f"Python 3.11, 3.12, 3.13, 3.14 is supported, {setup.folder}/other-python is {version}" in done.stderr
    assert not setup.venv.exists()


def test_no_python_one_sentence(setup):
    done = setup.run("python-that-is-not-there")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "PYTHON is python-that-is-not-there, which does not run; install Python 3.11, 3.12" in done.stderr


@pytest.mark.parametrize(
    ("uv_says", "sentence"),
    [
        ("error: Failed to fetch: dns error: failed to lookup address", "the package index does not answer"),
        ("error: failed to write: No space left on device (os error 28)", "the disk is full; free some GB"),
        ("error: Hash mismatch for `rich==15.0.0`", "a file differs from its pinned hash"),
        ("error: something else", "then run the same command again"),
    ],
)
def test_what_uv_cannot_do_is_said_in_one_sentence_with_the_remedy(setup, uv_says, sentence):
    setup.uv(f"echo '{uv_says}' >&2; exit 2")
    done = setup.run()
    assert done.returncode == 1
    first, last = done.stderr.strip().splitlines()
    assert first == uv_says
    assert last.startswith("error: could not install requirements/demo.txt into ")
    assert sentence in last
    setup.uv()
    assert setup.run().returncode == 0, "the next call repairs it"


def nvidia_smi(setup, lines: str, code: int = 0) -> None:
    file = setup.folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\necho '{lines}'\nexit {code}\n")
    file.chmod(0o755)


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        (
            "couldnt communicate",
            9,
            "no NVIDIA GPU answers (nvidia-smi: couldnt communicate); install NVIDIA's driver",
        ),
        (
            "570.86.15, 8.9, NVIDIA L4",
            0,
            "the driver is '570.86.15', and CUDA 13.0, with which torch is built, needs",
        ),
        ("580.95.05, 6.1, NVIDIA GeForce GTX 1080", 0, "this computer has NVIDIA GeForce GTX 1080 (6.1)"),
    ],
    ids=["no driver", "old driver", "old GPU"],
)
def test_a_gpu_that_torch_cannot_use_is_said_before_anything_is_installed(setup, lines: str, code: int, said: str):
    nvidia_smi(setup, lines, code)
    done = setup.run(build="cuda")
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (setup.folder / "calls").exists()


def test_a_gpu_gets_torch_with_cuda_and_is_tried(setup):
    nvidia_smi(setup, "580.95.05, 8.9, NVIDIA L4")
    done = setup.run(build="cuda")
    assert "--require-hashes -r requirements/train-cuda.txt" in setup.called()
    assert "torch-cpu" not in setup.called()
    assert done.returncode == 1  # the torch of this environment has no CUDA
    assert "error: torch finds no GPU (" in done.stderr
