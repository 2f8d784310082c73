"""Start the real trainer as its users do: torchrun, processes, signals."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from core import storage
from core.run import journal
from demo.processes import kill_tree
from tests import patched, warm
from tests.patience import PATIENCE_SECONDS
from trainer.checkpoint import layout
from trainer.checkpoint.blocks import tensors_of

REPOSITORY = Path(__file__).parent.parent

# One layer, sixteen wide: what takes time is the GPT-2 vocabulary and starting Python.
TINY = [
    "--model.layers=1",
    "--model.heads=2",
    "--model.width=16",
    "--model.context=32",
    "--batch.tokens_per_step=128",
    "--batch.micro_batch_size=1",
    "--optimizer.lr=1e-2",
    "--optimizer.warmup_steps=2",
    "--train.log_every=1",
    "--train.eval_every=0",
    "--train.eval_tokens=256",
    "--train.sample_every=0",
    "--train.sample_tokens=4",
    "--train.cpu_threads=1",
]


def no_ranks() -> dict[str, str]:
    """The environment without the variables of the fixture `ranks`, for a program that is not one of its ranks."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in names}


def start(
    ranks: int,
    *flags: str,
    environment: Mapping[str, str] | None = None,
    module: str = "trainer.train",
    base: Sequence[str] = TINY,
    torchrun: Sequence[str] = (),
    within: Sequence[str] = (),
    constants: Mapping[str, float] | None = None,
) -> subprocess.Popen:
    """A run in a process group of its own, output to be read; `within` is a command that runs another.

    torchrun starts several ranks, or one that is given options of it; else one rank starts directly. `constants` of the
    program replace those of the code (tests/patched.py).
    """
    command = [*within, sys.executable]
    if ranks > 1 or torchrun:
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0"]
        command += ["--rdzv-backend=c10d", "--local-addr=127.0.0.1"]
        command += torchrun or ["--rdzv-endpoint=127.0.0.1:0"]
    command += [*patched.module_of(module, constants or {}), *base, *flags]
    env = {**no_ranks(), "TORCHELASTIC_ERROR_FILE": os.devnull, "WARM_CHILDREN": "yes", **(environment or {})}
    popen = subprocess.Popen if within else warm.Popen
    return popen(
        command,
        cwd=REPOSITORY,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, patience_seconds: float = PATIENCE_SECONDS) -> tuple[int, str]:
    """Exit code and output, at the end."""
    try:
        output, _ = process.communicate(timeout=patience_seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    return process.returncode, output


def train(
    ranks: int,
    *flags: str,
    patience_seconds: float = PATIENCE_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run to the end, which must be a success. Returns the output."""
    code, output = finish(start(ranks, *flags, environment=environment), patience_seconds)
    assert code == 0, output
    return output


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for torchrun and all ranks at once."""
    kill_tree(process)
    process.stdout.close()


def wait_until(holds: Callable[[], bool], process: subprocess.Popen) -> None:
    """Until something is true of the run; fails when the process ends first."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} before its time:\n{process.stdout.read()}")
        if time.monotonic() > deadline:
            kill(process)
            raise AssertionError("nothing happened in time")
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended: one that nothing waits for stays in the list of processes."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def completed(run_url: str) -> list[int]:
    """Steps with a complete checkpoint, newest first."""
    return layout.complete_steps(run_url)


def manifest(run_url: str, step: int) -> layout.CheckpointManifest:
    return layout.read_manifest(run_url, step, layout.stored(run_url)[step])


def tensors(run_url: str, step: int) -> dict[str, bytes]:
    """The exact bits of a checkpoint, by row block."""
    found = {}
    folder = layout.folder_of(run_url, step)
    for file in manifest(run_url, step).files:
        data = np.frombuffer(bytearray(storage.read_bytes(storage.join(folder, file.name))), np.uint8)
        for key, tensor in tensors_of(data).items():
            found[key] = tensor.numpy().tobytes()
    return found


def metrics(run_url: str, kind: str = "train") -> dict[int, dict]:
    """The newest record of each step over all segments."""
    found = {}
    for segment in storage.list_names(storage.join(run_url, "metrics")):
        events, problems = journal.read(storage.join(run_url, "metrics", segment))
        assert not problems
        found |= {event["step"]: event for event in events if event["kind"] == kind}
    return found
