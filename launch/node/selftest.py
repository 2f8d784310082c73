"""Tests an image. Imports the modules of its programs.

On each GPU, initialises CUDA, multiplies matrices and compiles a function.

    docker run --rm IMAGE
    python -m launch.node.selftest --health     the image's health check: files only, no torch, no GPU

The variable IMAGE_TARGET in the image says which programs the image contains. Prints one line, or fails with the first
error. The health check runs every few minutes during a training, so it uses no GPU memory and compiles nothing.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from clouds.machine import gpus
from core.console import run_entry
from core.errors import ConfigError

PROGRAMS = {
    "prep": ("data_prep.prepare", "data_prep.verify", "cost_report", "launch.node"),
    "train": ("trainer.train", "cost_report", "launch.node"),
}


def main(arguments: list[str]) -> None:
    target = os.environ.get("IMAGE_TARGET")
    if target not in PROGRAMS:
        raise ConfigError(f"IMAGE_TARGET is {target!r}, must be one of {', '.join(PROGRAMS)}; is this our image?")
    if arguments == ["--health"]:
        print(f"{target} image is healthy: {check_files(target)}")
        return
    if arguments:
        raise ConfigError(f"unknown arguments {' '.join(arguments)}; usage: python -m launch.node.selftest [--health]")
    # Programs import core.stores.remote only when they open a bucket.
    for program in (*PROGRAMS[target], "core.stores.remote"):
        importlib.import_module(program)
    if os.geteuid() == 0:
        raise ConfigError("the image runs as root; its USER was changed")
    found = check_torch() if target == "train" else check_no_torch()
    print(f"{target} image works: Python {sys.version.split()[0]}, {found}, revision {revision()}")


def check_files(target: str) -> str:
    """The health check. Returns a text that names the container's first process.

    Raises ConfigError if a program's file is missing.
    """
    for program in PROGRAMS[target]:
        if not Path(*program.split(".")).with_suffix(".py").exists() and not Path(*program.split(".")).is_dir():
            raise ConfigError(f"{program} is not in the image's folder {Path.cwd()}")
    first = Path("/proc/1/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    return f"process 1 is {first or '?'}"


def check_no_torch() -> str:
    if importlib.util.find_spec("torch"):
        raise ConfigError("torch is installed in the prep image")
    return "no torch"


def check_torch() -> str:
    import torch

    # trainer.train imports these late.
    for module in ("trainer.loop.loop", "trainer.checkpoint.save"):
        importlib.import_module(module)
    preflight = importlib.import_module("trainer.distributed.preflight")
    if not shutil.which("cc"):
        raise ConfigError("the train image has no C compiler, which Triton needs")
    # torch counts zero GPUs if CUDA does not initialise.
    count = max(torch.cuda.device_count(), len(gpus())) if torch.version.cuda else 0
    for number in range(count):
        if problem := preflight.cuda_problem(torch.device("cuda", number)):
            raise ConfigError(problem)
        ones = torch.ones(256, 256, device=f"cuda:{number}", dtype=torch.bfloat16)
        double = torch.compile(lambda x: x @ x * 2)
        if float(double(ones).float().mean()) != 512.0:
            raise ConfigError(f"GPU {number} multiplies wrongly")
    return f"torch {torch.__version__}, {count} GPUs" + (f", libcuda {preflight.libcuda()}" if count else "")


def revision() -> str:
    return os.environ.get("GIT_REVISION") or "unknown"


if __name__ == "__main__":
    run_entry(main)
