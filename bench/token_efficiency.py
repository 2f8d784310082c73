"""Tokens to a loss: the plain recipe against the speedrun's, same text, same batches, several seeds.

    python -m bench.token_efficiency --data=DATA_URL --scratch=FOLDER --steps=1000 [--shares=0.6] [--seeds=3]
        [-- --model.layers=4 ...]

For every seed the plain recipe trains for `--steps` steps to the end of its own schedule; the other one gets a share of
these steps, with its own schedule over that share, as a user would plan it. What is compared is the validation loss
at the end: a share suffices if its mean over the seeds is not above the plain one's. Everything runs through
trainer.train; what follows `--` goes to both recipes (a smaller model, another batch).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import record
from core.run.reader import Detail, read_run

CONFIGS = Path(__file__).parent.parent / "trainer" / "configs"


def main() -> None:
    options, both = _options()
    results: dict = {
        **record.header("torch"),
        "command": "python -m bench.token_efficiency " + " ".join(sys.argv[1:]),
        "steps": options.steps,
        "runs": [],
    }
    for seed in range(1, options.seeds + 1):
        plans = [(options.plain, 1.0)] + [(options.other, float(share)) for share in options.shares.split(",")]
        for preset, share in plans:
            steps = max(1, round(options.steps * share))
            results["runs"].append({"preset": preset, "share": share, "seed": seed, "steps": steps})
            results["runs"][-1] |= _run(options, preset, steps, seed, both)
            print(json.dumps(results["runs"][-1]), file=sys.stderr)
    _show(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="token set, as data_prep writes it")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the runs; what is there is continued")
    parser.add_argument("--steps", type=int, required=True, help="of the plain recipe")
    parser.add_argument("--shares", default="0.6", help="of these steps, for the other recipe")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plain", default="gpt2-124m")
    parser.add_argument("--other", default="speedrun-162m")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    return parser.parse_args(arguments[:split]), arguments[split + 1 :]


def _run(options: argparse.Namespace, preset: str, steps: int, seed: int, both: list[str]) -> dict:
    """Train, and read what it came to."""
    url = str(options.scratch / f"{preset}-{steps}-seed-{seed}")
    flags = [str(CONFIGS / f"{preset}.yaml"), f"--data.url={options.data}", f"--run.url={url}", f"--train.seed={seed}"]
    flags += [f"--train.steps={steps}", "--train.eval_every=0", "--train.sample_every=0", "--train.hellaswag_items=0"]
    # GPT-3's warm-up is 375M tokens of 300B; with so few steps in all, a tenth of them.
    flags += [f"--optimizer.warmup_steps={steps // 10}"] if preset == options.plain else []
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    done = subprocess.run([*command, "-m", "trainer.train", *flags, *both], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{preset}, seed {seed} failed:\n{done.stderr[-3000:]}")
    measured = read_run(url, Detail.ALL)
    last = measured.points("eval")[-1].values
    seconds = sum(point.values["step_seconds"] for point in measured.points("train"))
    return {"val_loss": last["val_loss"], "tokens": last["tokens"], "train_seconds": seconds}


def _show(results: dict) -> None:
    found: dict[tuple[str, float], list[dict]] = {}
    for run in results["runs"]:
        found.setdefault((run["preset"], run["share"]), []).append(run)
    table = Table("recipe", "steps", "tokens", "validation loss, mean of seeds", "spread", "seconds")
    for (preset, share), runs in found.items():
        losses = [run["val_loss"] for run in runs]
        seconds = statistics.mean(run["train_seconds"] for run in runs)
        spread = f"± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        name = preset if share == 1 else f"{preset}, {share:.0%}"
        cells = [f"{runs[0]['steps']:,}", f"{runs[0]['tokens']:,}", f"{statistics.mean(losses):.4f}", spread]
        table.add_row(name, *cells, f"{seconds:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
