"""Compares a run that is killed and resumed with an uninterrupted run, bit by bit; a measurement of bench.on_gpu.

    python -m bench.gpu.resume --work=FOLDER -- CONFIG.yaml --data.url=... [more settings]

The trainer runs as a process with deterministic kernels and receives SIGKILL twice. The last checkpoint (weights and
optimizer state) and the loss of every step must be equal. Both runs train at the same time.
"""

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench import harness
from core.run.reader import Detail, read_run
from demo.processes import kill_tree
from trainer.checkpoint import layout
from trainer.checkpoint.blocks import tensors_of
from trainer.checkpoint.early import read_payload

KILLS = 2
POLL_SECONDS = 0.02
LAST_LINES = 3


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True, help="folder for both runs")
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args(arguments[:split])
    options.work.mkdir(parents=True, exist_ok=True)
    runs = Runs(options.work, options.steps, arguments[split + 1 :])
    with runs.beside("straight"):
        killed_at = [runs.kill("killed", after=options.steps * (number + 1) // (KILLS + 2)) for number in range(KILLS)]
        harness.say(f"killed with SIGKILL when steps {killed_at} were stored", kind="killed", stored=killed_at)
        runs.train("killed")
    problems = runs.differences()
    segments = len(list((options.work / "killed" / "metrics").iterdir()))
    said = "no bit differs" if not problems else "; ".join(problems)
    text = f"continued to step {options.steps} in {segments} segments: {said}"
    harness.say(text, kind="resume", segments=segments, equal=not problems, differences=problems)
    if problems:
        sys.exit(f"a run that was killed at {killed_at} differs from a run that was not killed: {problems[0]}")


class Runs:
    """Starts, kills and compares runs of the trainer. The name of a run is its folder below `work`."""

    def __init__(self, work: Path, steps: int, flags: list[str]):
        self._work = work
        self._steps = steps
        self._flags = [*flags, f"--train.steps={steps}", "--train.deterministic=true"]

    @contextlib.contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Train in the background while the block runs, and wait for the end of the training after the block."""
        process, log = self._start(name)
        try:
            yield
            self._wait(name, process, log)
        finally:
            kill_tree(process)

    def train(self, name: str) -> None:
        """Train to the end."""
        self._wait(name, *self._start(name))

    def _wait(self, name: str, process: subprocess.Popen, log: Path) -> None:
        if code := process.wait():
            raise SystemExit(f"{name}: the trainer ended with {code}: {_last_lines(log)}")

    def kill(self, name: str, after: int) -> int:
        """Train, and kill the trainer once the checkpoint of step `after` or of a later step is stored.

        Returns the newest stored step.
        """
        process, log = self._start(name)
        try:
            while (newest := self._newest(name)) < after:
                if process.poll() is not None:
                    raise SystemExit(f"{name}: ended with {process.returncode} before its kill: {_last_lines(log)}")
                time.sleep(POLL_SECONDS)
        finally:
            kill_tree(process)
        newest = self._newest(name)
        if newest >= self._steps:
            raise SystemExit(
                f"{name}: ended before it could be killed at step {after}; give it more than {self._steps} steps"
            )
        return newest

    def differences(self) -> list[str]:
        return [*self._tensors_that_differ(), *self._losses_that_differ()]

    def _start(self, name: str) -> tuple[subprocess.Popen, Path]:
        command = [sys.executable, "-m", "trainer.train", *self._flags, f"--run.url={self._work / name}"]
        log = self._work / f"{name}.log"
        with log.open("a") as output:
            process = subprocess.Popen(
                command,
                cwd=harness.REPOSITORY,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=harness.end_with_parent,
            )
        return process, log

    def _newest(self, name: str) -> int:
        return max(layout.complete_steps(str(self._work / name)), default=0)

    def _tensors_that_differ(self) -> list[str]:
        one, other = (self._tensors(name) for name in ("straight", "killed"))
        if one.keys() != other.keys():
            return [f"the checkpoints of step {self._steps} hold different tensors"]
        found = []
        for key, values in one.items():
            different = _bits(values) != _bits(other[key])
            if different.any():
                largest = float((values - other[key]).abs().max())
                count = f"{int(different.sum())} of {values.numel()} numbers"
                found.append(f"{key}: {count} differ, by {largest:.1e} at most")
        return found

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Weights and optimizer state of the last step."""
        url = str(self._work / name)
        manifest = layout.read_manifest(url, self._steps, layout.stored(url)[self._steps])
        folder = Path(layout.folder_of(url, self._steps))
        found = {}
        for file in manifest.files:
            data, checksum = read_payload(str(folder / file.name), file.bytes)
            if checksum != file.xxh3_128:
                raise SystemExit(f"{folder / file.name}: checksum differs from its manifest's")
            found |= tensors_of(data)
        return found

    def _losses_that_differ(self) -> list[str]:
        one, other = (
            {point.step: point.values["loss"] for point in read_run(str(self._work / name), Detail.ALL).points("train")}
            for name in ("straight", "killed")
        )
        different = sorted(step for step in one.keys() | other.keys() if one.get(step) != other.get(step))
        return [f"the losses of {len(different)} steps differ, first at step {different[0]}"] if different else []


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Bits of `values` as integers, so that NaN equals NaN and zero differs from minus zero."""
    return values.view({2: torch.int16, 4: torch.int32}[values.element_size()])


def _last_lines(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])[-400:]


if __name__ == "__main__":
    main()
