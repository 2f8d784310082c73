"""What a task's program needs before it can start: its data, settings that hold, and memory for them.

For launch.check. Reads the bucket and the config files of this checkout.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core import config, manifest, sets, storage
from core.architecture import ModelConfig
from core.errors import ConfigError, DataError, LauncherError
from core.run import read_run
from core.schema import DataConfig, TrainConfig
from core.schema_tuning import FinetuneConfig
from costs.task import public_model
from launch import memory
from launch.submit import candidates


@dataclass(frozen=True)
class Finding:
    mark: str  # ok ! x ?
    what: str

    def __str__(self) -> str:
        return f"{self.mark:>2}  {self.what}"


def check_data(task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    """Tokens to train on, and what is tuned or evaluated."""
    run = task["run"]
    if "trainer.finetune" in run or "trainer.evaluate" in run:
        yield from _start(settings["START"] if "trainer.finetune" in run else run_url(settings))
    if "trainer.finetune" in run:
        rows = _finetune(settings).data.rows
        if not rows.endswith(".jsonl"):
            yield Finding("ok", f"data: {sets.info_of(data_url(settings), rows).rows:,} rows of {rows!r}")
    if "trainer.train" not in run or "data_prep" in run:
        return
    try:
        found = manifest.read(data_url(settings))
    except DataError as error:
        yield Finding("x", f"data: {error}; `make prep-data` makes it")
        return
    yield Finding("ok", f"data: {found.splits['train'].tokens:,} training tokens at {data_url(settings)}")


def _start(start: str) -> Iterator[Finding]:
    """Weights that are there; of a public name nothing is asked."""
    if "://" not in start:
        return
    steps = storage.list_names(start if "/checkpoints/" in start else storage.join(start, "checkpoints"))
    if steps:
        yield Finding("ok", f"start: {start} has weights")
    else:
        yield Finding("x", f"start: {start} has no checkpoint; check the name, or `make pretrain` first")


def check_config(task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    """Settings, and for each kind of GPU among the candidates: batch over ranks, and memory."""
    if "trainer.train" in task["run"]:
        train = config.load(TrainConfig, _arguments(settings), _urls(settings))
    elif "trainer.finetune" in task["run"]:
        train = _as_training(_finetune(settings))
    else:
        return
    length = f"{train.train.steps:,} steps of {train.batch.tokens:,} tokens"
    yield Finding("ok", f"config: {settings['CONFIG']}, {length}")
    if settings.get("DEVICE") == "cpu":
        return
    for gpu, count in dict.fromkeys(accelerator(candidate) for candidate in candidates(task)):
        if not gpu:
            continue
        ranks = int(settings.get("RANKS_PER_NODE") or count) * int(task.get("num_nodes") or 1)
        micro_batches = train.batch.tokens // (max(1, train.batch.micro_batch) * train.model.context)
        if micro_batches % ranks:
            yield Finding(
                "x", f"config: {micro_batches} micro-batches do not divide over {ranks} ranks of {gpu}:{count}"
            )
        elif (found := memory.verdict(train, gpu, ranks)) is not None:
            fits, said = found
            yield Finding("ok" if fits else "x", f"memory: {said}")


def _finetune(settings: Mapping[str, str]) -> FinetuneConfig:
    return config.load(
        FinetuneConfig, [*_arguments(settings), f"--finetune.start={settings['START']}"], _urls(settings)
    )


def _as_training(tuned: FinetuneConfig) -> TrainConfig:
    """What its memory follows from, with all weights of the model that it begins with; one of a name that we do not
    know counts as GPT-2 124M."""
    start = tuned.finetune.start.partition("/checkpoints/")[0]
    model = public_model(start) or ModelConfig()
    if "://" in start:
        model = config.from_dict(ModelConfig, read_run(start)["config"]["model"], start)
    kept = {name: getattr(tuned, name) for name in ("run", "batch", "optimizer", "train", "checkpoint")}
    return TrainConfig(data=DataConfig(url=tuned.data.url or start), model=model, **kept)


def _arguments(settings: Mapping[str, str]) -> list[str]:
    return [settings["CONFIG"], *(settings.get("TRAIN_ARGS") or "").split()]


def _urls(settings: Mapping[str, str]) -> dict[str, str]:
    return {"RUN_URL": run_url(settings), "DATA_URL": data_url(settings)}


def bucket_url(settings: Mapping[str, str]) -> str:
    bucket = settings.get("BUCKET")
    if not bucket:
        raise ConfigError("BUCKET is empty; give BUCKET=NAME to make, or set it in .env")
    return bucket if "://" in bucket else f"s3://{bucket}"


def run_url(settings: Mapping[str, str]) -> str:
    return storage.join(bucket_url(settings), "runs", settings["RUN"])


def data_url(settings: Mapping[str, str]) -> str:
    return storage.join(bucket_url(settings), "data", settings["DATA"])


def data_bytes(settings: Mapping[str, str]) -> int:
    """What a machine would read; 0 if there is no data yet."""
    try:
        return sum(shard.bytes for shard in manifest.read(data_url(settings)).splits["train"].shards)
    except LauncherError:
        return 0


def accelerator(candidate: Mapping[str, Any]) -> tuple[str, int]:
    name, _, count = str(candidate.get("accelerators") or "").partition(":")
    return name, int(count or 1)
