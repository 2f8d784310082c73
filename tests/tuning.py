"""A small pretrained run and small rows for the tests of what follows pretraining."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests import corpus, launching, patched, warm

MODEL = ["--model.layers=2", "--model.heads=2", "--model.width=32", "--model.context=64"]
BATCH = [
    "--batch.tokens_per_step=256",
    "--batch.micro_batch_size=2",
    "--optimizer.lr=1e-2",
    "--optimizer.warmup_steps=2",
]
QUIET = [
    "--optimizer.weight_decay=0",
    "--train.log_every=1",
    "--train.sample_every=0",
    "--train.sample_tokens=4",
    "--train.cpu_threads=1",
    "--train.norms_every=0",
]
COLOURS = ["red", "blue", "green", "white", "black", "brown"]
THINGS = ["house", "river", "horse", "table", "road", "field", "tree", "book", "door", "ship", "hand", "stone"]


def pretrain(folder: Path, vocab_bpe: Path) -> tuple[str, str]:
    """A prepared set and a short run on it: (data_url, run_url), in `folder`."""
    data_url, run_url = str(folder / "data"), str(folder / "base")
    source = corpus.write_parquet(folder / "source", [corpus.speeches(12)])
    corpus.prepare_set(source, data_url, vocab_bpe)
    run_alone(
        "trainer.train",
        *MODEL,
        *BATCH,
        *QUIET,
        f"--data.url={data_url}",
        f"--run.url={run_url}",
        "--train.steps=30",
        "--train.eval_every=0",
        "--train.eval_tokens=1024",
    )
    return data_url, run_url


def conversations(count: int, seed: int = 1) -> list[dict]:
    """Questions whose answers follow from them: what a small model can learn."""
    chosen = random.Random(seed)
    rows = []
    for number in range(count):
        thing, colour = chosen.choice(THINGS), chosen.choice(COLOURS)
        rows.append({"instruction": f"{number}: is the {thing} {colour}?", "output": f"Yes, the {thing} is {colour}."})
    return rows


def preferences(count: int, seed: int = 1) -> list[dict]:
    """The better answer is polite, the worse one is not."""
    chosen = random.Random(seed)
    rows = []
    for number in range(count):
        thing = chosen.choice(THINGS)
        prompt = f"Tell me about the {thing} with the number {number}."
        polite, rude = f"Gladly, the {thing} is old and good.", f"No, leave me alone with the {thing}."
        rows.append({"prompt": prompt, "chosen": polite, "rejected": rude})
    return rows


def write_rows(path: Path, rows: Sequence) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def start_alone(
    module: str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    constants: Mapping[str, float] | None = None,
) -> subprocess.Popen:
    """A program as one rank, without torchrun and imports: quicker to start. `constants` as in launching.start."""
    return warm.Popen(
        [sys.executable, *patched.module_of(module, constants or {}), *arguments],
        cwd=launching.REPOSITORY,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run_alone(module: str, *arguments: str, **options: Mapping[str, str] | Mapping[str, float]) -> str:
    """The output of a program that succeeds. `options` are those of `start_alone`."""
    code, output = launching.finish(start_alone(module, *arguments, **options))
    assert code == 0, output
    return output


def refused(module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """The one sentence with which a program refuses."""
    code, output = launching.finish(start_alone(module, *arguments, environment=environment))
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code != 0, output
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0]


def kill_after(process: subprocess.Popen, run_url: str, step: int) -> None:
    """SIGKILL once a checkpoint of `step` or a later one is complete."""
    launching.wait_until(lambda: (launching.completed(run_url) or [0])[0] >= step, process)
    launching.kill(process)


def stage_in_report(run_url: str) -> tuple[str, int]:
    """Stage and number of segments by the cost report."""
    command = [sys.executable, "cost_report.py", run_url, "--json"]
    result = subprocess.run(command, cwd=launching.REPOSITORY, capture_output=True, text=True, check=True)
    report = json.loads(result.stdout)
    return report["stage"], len(report["segments"])
