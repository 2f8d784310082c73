"""Measures how many tokens a recipe needs to reach another recipe's loss, on the same text, with several seeds.

    python -m bench.token_efficiency --data=DATA_URL --scratch=FOLDER --steps=1000 [--shares=0.6] [--seeds=3]
        [-- --model.layers=4 ...]

For each seed, the plain recipe trains for `--steps` steps. The other recipe trains once for each share of these steps.
All runs follow their complete schedule. A share suffices if the mean of its final validation losses is not above the
plain recipe's. Every run is a call of trainer.train. Arguments after `--` go to both recipes, for instance a smaller
model.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from bench import harness
from bench.gpu import presets
from core.run.reader import Detail, read_run


def main() -> None:
    options, both = _options()
    sides = {}
    for preset, share in [(options.plain, 1.0), *((options.other, float(each)) for each in options.shares.split(","))]:
        steps = max(1, round(options.steps * share))
        facts = {"preset": preset, "share": share, "steps": steps}

        def train(number: int, facts=facts) -> dict:
            return {**facts, "seed": number + 1, **_train(options, facts["preset"], facts["steps"], number + 1, both)}

        sides[preset if share == 1 else f"{preset}, {share:.0%}"] = train
    results = {
        **harness.header("torch"),
        "command": "python -m bench.token_efficiency " + " ".join(sys.argv[1:]),
        "steps": options.steps,
        "runs": harness.interleaved(sides, options.seeds),
    }
    harness.finish(results, show, options.out)


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = harness.options(__doc__)
    parser.add_argument("--data", required=True, help="token set that data_prep has written")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for runs; unfinished runs are continued")
    parser.add_argument("--steps", type=int, required=True, help="number of steps of the plain recipe")
    parser.add_argument("--shares", default="0.6", help="shares of --steps for the other recipe, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plain", default="gpt2-124m")
    parser.add_argument("--other", default="speedrun-162m")
    parser.add_argument("--ranks", type=int, default=1)
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    return parser.parse_args(arguments[:split]), arguments[split + 1 :]


def _train(options: argparse.Namespace, preset: str, steps: int, seed: int, both: list[str]) -> dict[str, float]:
    """Train once. Returns final validation loss, tokens, and seconds of all steps."""
    url = str(options.scratch / f"{preset}-{steps}-seed-{seed}")
    flags = [str(presets.path(preset)), f"--data.url={options.data}", f"--run.url={url}", f"--train.seed={seed}"]
    flags += [f"--train.steps={steps}", "--train.eval_every=0", "--train.sample_tokens=0", "--train.hellaswag_items=0"]
    # GPT-3's warm-up of 375M tokens would be longer than such short runs. Here the warm-up is a tenth of the steps.
    flags += [f"--optimizer.warmup_steps={steps // 10}"] if preset == options.plain else []
    command = [*harness.TORCHRUN, f"--nproc-per-node={options.ranks}", "-m", "trainer.train", *flags, *both]
    done = subprocess.run(command, capture_output=True, text=True, cwd=harness.REPOSITORY)
    if done.returncode:
        raise SystemExit(f"{preset}, seed {seed} failed:\n{done.stderr[-3000:]}")
    run = read_run(url, Detail.ALL)
    last = run.points("eval")[-1].values
    seconds = sum(point.values["step_seconds"] for point in run.points("train"))
    return {"val_loss": last["val_loss"], "tokens": last["tokens"], "train_seconds": seconds}


def show(results: dict) -> None:
    rows = []
    for name, runs in results["runs"].items():
        losses = [run["val_loss"] for run in runs]
        spread = f"± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        seconds = statistics.mean(run["train_seconds"] for run in runs)
        about = [name, f"{runs[0]['steps']:,}", f"{runs[0]['tokens']:,}", f"{statistics.mean(losses):.4f}"]
        rows.append([*about, spread, f"{seconds:.0f}"])
    heads = ("recipe", "steps", "tokens", "validation loss, mean of seeds", "spread", "seconds")
    harness.print_table("tokens to a loss", heads, rows)


if __name__ == "__main__":
    main()
