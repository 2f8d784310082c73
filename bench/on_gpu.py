"""Everything that needs a GPU, in one call: tests, training steps beside other trainers, tokens to a loss.

    python -m bench.on_gpu --data=DATA_URL --out=FOLDER [--minutes=9] [--rivals=FOLDER] [--only=tests,steps]

Each part is a command of its own, shown before it runs; all share --minutes. One that fails does not keep the others
from running, unless they need its result, and the exit status says that one did. FOLDER gets each command's output and
dated results, to be put below bench/results/. How many steps bench.token_efficiency makes follows from the measured
step and the minutes that are left. --rehearse runs the same on a CPU, with small models: for the commands, not for the
numbers.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from demo.processes import kill_tree

PLAIN, OTHER, SEEDS, SHARE = "gpt2-124m", "speedrun-162m", 3, 0.6
# A start until the first step, compilation and the last evaluation; per run of bench.token_efficiency.
RUN_SECONDS = 40.0
# So that some steps are between warm-up and end.
FEWEST_STEPS = 20
SMALL = ["--model.layers=2", "--model.heads=2", "--model.width=64", "--model.context=64"]


def main() -> None:
    options = _options()
    if "://" not in options.data:
        options.data = str(Path(options.data).resolve())
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    failed = [name for name, command in _parts(options, deadline) if not _run(name, command, options, deadline)]
    if failed:
        sys.exit(f"failed or out of time: {', '.join(failed)}; see {options.out}/NAME.log")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="token set, as data_prep writes it; best a local folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for outputs and results")
    parser.add_argument("--minutes", type=float, default=60.0, help="in all")
    parser.add_argument("--rivals", type=Path, help="folder with checkouts of other trainers: bench.train_step --help")
    parser.add_argument("--only", default="tests,steps,efficiency", help="parts to run")
    parser.add_argument("--micro-batch", type=int, default=32, help="sequences, of the steps that are measured")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with small models")
    return parser.parse_args()


def _parts(options: argparse.Namespace, deadline: float) -> Iterator[tuple[str, list[str]]]:
    """Name and command of each part; later ones look at what earlier ones measured."""
    only = options.only.split(",")
    if "tests" in only:
        yield "tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rs", "tests/test_gpu.py"]
    if "steps" in only:
        for preset in (PLAIN, OTHER):
            yield f"train-step-{preset}", _step_command(options, preset)
    if "efficiency" in only:
        steps = _affordable_steps(options, deadline - time.monotonic())
        yield "token-efficiency", _efficiency_command(options, steps)


def _step_command(options: argparse.Namespace, preset: str) -> list[str]:
    command = [sys.executable, "-m", "bench.train_step", f"--preset={preset}", f"--out={_result(options, preset)}"]
    if options.rehearse:
        return [*command, "--device=cpu", "--micro-batch=1", "--context=32", "--steps=2", "--warm-up=1", "--rounds=1"]
    command += [f"--micro-batch={options.micro_batch}"]
    return [*command, f"--rivals={options.rivals}"] if options.rivals and preset == PLAIN else command


def _efficiency_command(options: argparse.Namespace, steps: int) -> list[str]:
    command = [sys.executable, "-m", "bench.token_efficiency", f"--data={options.data}", f"--steps={steps}"]
    command += [f"--scratch={options.out}/runs-{steps}", f"--plain={PLAIN}", f"--other={OTHER}", f"--seeds={SEEDS}"]
    command += [
        f"--shares={SHARE}",
        f"--out={_named(options, 'token-efficiency')}",
        "--",
        f"--batch.tokens={_tokens(options)}",
    ]
    if options.rehearse:
        return [*command, "--train.device=cpu", "--batch.micro_batch=1", *SMALL]
    return [*command, f"--batch.micro_batch={options.micro_batch}", "--checkpoint.keep=1"]


def _tokens(options: argparse.Namespace) -> int:
    """Per step of bench.token_efficiency: one micro-batch of 4, small for a GPU, so that there are many steps."""
    return 256 if options.rehearse else 4 * options.micro_batch * 1024


def _affordable_steps(options: argparse.Namespace, seconds_left: float) -> int:
    """Steps of the plain recipe, so that all runs end in the time that is left."""
    if options.rehearse:
        return FEWEST_STEPS
    per_step = 0.0
    for preset, share in ((PLAIN, 1.0), (OTHER, SHARE)):
        path = _result(options, preset)
        if not path.exists():
            sys.exit(f"{path} is not there: run the part `steps` on this machine first")
        runs = json.loads(path.read_text())["runs"]["ours"]
        per_step += share * _tokens(options) / statistics.median(run["tokens_per_second"] for run in runs)
    return max(FEWEST_STEPS, int((seconds_left / SEEDS - 2 * RUN_SECONDS) / per_step))


def _result(options: argparse.Namespace, preset: str) -> Path:
    return _named(options, f"train-step-{preset}")


def _named(options: argparse.Namespace, name: str) -> Path:
    return options.out / f"{date.today().isoformat()}-{name}.json"


def _run(name: str, command: list[str], options: argparse.Namespace, deadline: float) -> bool:
    print(f"$ {shlex.join(command)}", flush=True)
    environment = os.environ | ({"TEST_DEVICE": "cpu"} if options.rehearse else {}) | {"TEST_DATA": options.data}
    started = time.monotonic()
    with (options.out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            process.wait(max(1.0, deadline - started))
        except subprocess.TimeoutExpired:
            kill_tree(process)
    output = (options.out / f"{name}.log").read_text()
    print(output[-4000:])
    print(f"{name}: exit status {process.returncode} after {time.monotonic() - started:.0f} s", flush=True)
    return process.returncode == 0


if __name__ == "__main__":
    main()
