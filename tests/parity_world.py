"""A folder that looks like a clone after `make setup`, with the data, runs and models that docs/parity.md speaks of."""

import functools
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from core.data import sets
from tests import corpus, hub_cache, launching, models, tuning, warm
from tests.fake_endpoint import KEY
from tests.fake_hub import Hub
from tests.patience import PATIENCE_SECONDS

LINKED = "clouds core costs data_prep demo launch requirements sky trainer Makefile cost_report.py".split()
# Sets of the Hub that the configs name: owner and name, commit, file.
SETS = {
    "HuggingFaceFW/fineweb-edu": "sample/10BT/000_00000.parquet sample/100BT/000_00000.parquet",
    "karpathy/fineweb-edu-100B-gpt2-token-shards": "edu_fineweb_train_000001.bin edu_fineweb_val_000000.bin",
    "roneneldan/TinyStories": "data/train-00000-of-00001.parquet",
}
STEPS = 4  # of the finished run, whose last one stands for the step that the page names
CONFIG = {
    "model": {"layers": 1, "heads": 2, "width": 16, "context": 64, "padded_vocab_size": 50304},
    "batch": {"tokens_per_step": 2048, "micro_batch_size": 2},
    "optimizer": {"lr": 0.01, "warmup_steps": 2},
    "train": {"steps": 19073, "eval_tokens": 1024, "sample_tokens": 4, "hellaswag_items": 8},
}
SHORT = {"tokens_per_step": 64, "micro_batch_size": 1}
# What somebody's shell may hold and a newcomer's does not.
OWN = re.compile(
    r"(AWS|BUCKET|HF|WANDB|MLFLOW|OPENAI|SKYPILOT|MAX|USD|RUN|DATA|SOURCE)(_\w+)?|VENV|GPU|CONFIG|PREP_ARGS|TRAIN_ARGS"
)


@dataclass(frozen=True)
class World:
    """What all commands share. Nothing writes into it."""

    folder: Path
    vocab: Path
    stamps: tuple[str, ...]

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def run(self) -> Path:
        """A finished run of STEPS steps."""
        return self.folder / "runs/finished"

    @property
    def other(self) -> Path:
        """Another one, shorter."""
        return self.folder / "runs/other"

    @property
    def hub(self) -> Path:
        """The Hub's cache, with models and sets of random content under the public names."""
        return self.folder / "hub"


def make(folder: Path, vocab: Path) -> World:
    """Prepare the data, train the runs, lay out the cache."""
    (folder / "runs").mkdir()
    data = Path(models.prepare_data(folder, vocab))
    for name, kind, rows in (
        ("instructions", "conversations", [sets.conversation(row) for row in tuning.conversations(40)]),
        ("preferences", "preferences", tuning.preferences(40)),
    ):
        sets.write(str(data), name, kind, "made for the tests", "CC0", "".join(map(as_line, rows)).encode())
    for name, steps in (("finished", STEPS), ("other", 2)):
        train = {**CONFIG["train"], "steps": steps}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**CONFIG, "batch": SHORT, "train": train}))
        tuning.run_alone(
            "trainer.train",
            str(folder / f"{name}.yaml"),
            f"--data.url={data}",
            f"--run.url={folder / 'runs' / name}",
            environment={"USD_PER_HOUR": "3.6"},
        )
    public_models(folder / "hub", vocab)
    hub_cache.lay_out(folder / "hub", "roneneldan/TinyStories", {SETS["roneneldan/TinyStories"]: parquet(600)})
    listed = subprocess.run(
        ["make", "-pn", "help"], cwd=launching.REPOSITORY, capture_output=True, text=True, check=True
    )
    stamps = re.findall(r"^(?:LAUNCH_)?STAMP := (.*)$", listed.stdout, re.M)
    assert len(stamps) == 2
    return World(folder, vocab, tuple(stamps))


def as_line(row: Mapping) -> str:
    return json.dumps(row) + "\n"


def parquet(count: int) -> bytes:
    stream = io.BytesIO()
    pq.write_table(corpus.table(corpus.documents(count)), stream)
    return stream.getvalue()


def public_models(home: Path, vocab: Path) -> None:
    """The public GPT-2s as their users' caches hold them, with random weights and one small layer."""
    import transformers

    shape = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64)
    folder = home / "made"
    transformers.GPT2LMHeadModel(shape).save_pretrained(folder)
    shutil.copy(vocab, folder / "merges.txt")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("gpt2", "gpt2-medium", "gpt2-xl"):
        hub_cache.lay_out(home, f"openai-community/{name}", files, kind="models")


@dataclass
class Place:
    """A clone of one command, with its placeholders, which are made when they are used."""

    world: World
    clone: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in LINKED:
            (self.clone / name).symlink_to(launching.REPOSITORY / name)
        for stamp in self.world.stamps:
            program = (self.clone / stamp).parent / "bin/python"
            program.parent.mkdir(parents=True)
            program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
            program.chmod(0o755)
            (self.clone / stamp).touch()
        (self.clone / "input.txt").write_text("\n\n".join(corpus.speeches(3)))
        tuning.write_rows(self.clone / "rows.jsonl", [sets.conversation(row) for row in tuning.conversations(80)])
        tuning.write_rows(self.clone / "pairs.jsonl", tuning.preferences(40))
        (self.clone / "prompts.txt").write_text("What is one?\nWhat is two?\n")
        for split in ("train", "val"):
            shard = sorted((self.world.data / split).glob("*.bin"))[0]
            shutil.copy(shard, self.clone / f"fineweb_{split}_000001.bin")
        (self.clone / "config.yaml").write_text(yaml.safe_dump(CONFIG))
        self.environment = {
            **{name: value for name, value in launching.no_ranks().items() if not OWN.fullmatch(name)},
            **hub_cache.offline(self.world.hub),
            "HOME": str(self.clone / "home"),
            "VOCAB_URL": str(self.world.vocab),
            "DATA_CACHE_DIR": str(self.clone / "cache"),
            "USD_PER_HOUR": "3.6",
            "EXIT_CODE_FILE": str(self.clone / "code"),
            "TORCHELASTIC_ERROR_FILE": os.devnull,
            "WARM_CHILDREN": "yes",
            "WANDB_MODE": "offline",
            "PET_MASTER_PORT": str(free_port()),
            "OPENAI_API_KEY": KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @functools.cached_property
    def bucket(self) -> Path:
        """A folder in the place of a bucket, with the data and the runs that tasks work on."""
        folder = self.clone / "bucket"
        shutil.copytree(self.world.data, folder / "data/fineweb-edu-10bt")
        for name in ("R", "RUN", "gpt2-124m"):
            shutil.copytree(self.world.run, folder / "runs" / name)
        (folder / "data/prompts.txt").write_text("What is one?\n")
        return folder

    def copied(self, what: Path, name: str) -> Path:
        if not (self.clone / name).exists():
            shutil.copytree(what, self.clone / name)
        return self.clone / name

    def words(self, command: str, **places: Path | str) -> list[str]:
        """The words of a command with something for each placeholder; `places` are those of one kind of command."""
        known = {
            "RUN_URL": lambda: self.copied(self.world.run, "run"),
            "RUN_A": lambda: self.copied(self.world.run, "first"),
            "RUN_B": lambda: self.copied(self.world.other, "second"),
            "OTHER": lambda: self.copied(self.world.other, "second"),
            "DATA_URL": lambda: self.copied(self.world.data, "set"),
            "START": lambda: self.world.run,
            "FOLDER": lambda: self.world.hub / "made",
            "CONFIG": lambda: "config.yaml",
            "NAME": lambda: "large",
            **{name: lambda place=place: place for name, place in places.items()},
        }
        command = command.replace("step-00002000", f"step-{STEPS:08d}")
        names = re.compile(rf"(?<![\w/])({'|'.join(known)})(?![\w=])")
        return [names.sub(lambda match: str(known[match[1]]()), word) for word in shlex.split(command)]

    def start(self, words: list[str], **streams) -> subprocess.Popen:
        """A Python program or torchrun, in the clone."""
        starts = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
        return warm.Popen(
            [*starts[words[0]], *words[1:]],
            cwd=self.clone,
            env=self.environment,
            text=True,
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **streams},
        )

    def shell(self, command: str) -> tuple[int, str]:
        """Exit code and output of a command as a shell runs it."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.clone,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        return done.returncode, done.stdout


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def hub_of(place: Place, repository: str, commit: str) -> Iterator[None]:
    """A Hub with one of SETS, in place of the cache."""
    names = SETS[repository].split()
    shards = [place.clone / f"fineweb_{split}_000001.bin" for split in ("train", "val")]
    files = [shard.read_bytes() for shard in shards] if names[0].endswith(".bin") else [parquet(600)] * len(names)
    with Hub(repository, commit) as server:
        server.files = dict(zip(names, files, strict=True))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place.environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
        place.environment |= {"HF_HOME": str(place.clone / "empty")}
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            del place.environment[name]
        yield
        server.shutdown()
