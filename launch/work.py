"""What a task's program needs before it can start: its data, settings that hold, and memory for them.

For launch.check. Reads the bucket and the config files of this checkout.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from core import bucket, storage
from core.data import manifest, sets
from core.errors import DataError, LauncherError
from core.gpus import has_fp8
from core.run.folder import RunFolder, read_description
from core.settings import loader, memory
from core.settings.model import ModelConfig, public_model
from core.settings.stages import training_schema
from core.settings.training import PretrainConfig, TrainingConfig, check_batch
from core.settings.tuning import FinetuneConfig
from launch import node_settings
from launch.task import candidates, read_task, settings_of


@dataclass(frozen=True)
class Finding:
    mark: str  # ok ! x ?
    what: str

    def __str__(self) -> str:
        return f"{self.mark:>2}  {self.what}"


def check_data(task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    """Tokens to train on, and what is tuned or evaluated."""
    run = task["run"]
    tunes = "--start.weights" in run
    if tunes or "trainer.evaluate" in run:
        yield from _start(settings["START"] if tunes else run_url(settings))
    if tunes:
        rows = _training(task, settings).data.examples
        if not rows.endswith(".jsonl"):
            yield Finding("ok", f"data: {sets.info_of(data_url(settings), rows).rows:,} rows of {rows!r}")
    if tunes or "trainer.train" not in run or "data_prep" in run:
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
    steps = storage.list_names(start if "/checkpoints/" in start else RunFolder(start).checkpoints)
    if steps:
        yield Finding("ok", f"start: {start} has weights")
    else:
        yield Finding("x", f"start: {start} has no checkpoint; check the name, or `make pretrain` first")


def check_config(task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    """Settings, by the parsers of the node, and for each kind of GPU: batch over ranks, and memory."""
    problems = node_settings.problems(settings)
    for problem in problems:
        yield Finding("x", f"settings: {problem}")
    if problems:
        return
    if float(settings.get("MAX_USD") or 1) == 0:
        yield Finding(
            "!",
            "settings: MAX_USD is 0, so nothing caps what this costs "
            "(shells and make turn $20 into 0: for twenty dollars write MAX_USD=20)",
        )
    if "trainer.train" not in task["run"]:
        return
    train = _training(task, settings)
    model = train.model if isinstance(train, PretrainConfig) else _start_model(train)
    check_batch(train, model.context)
    length = f"{train.train.steps:,} steps of {train.batch.tokens_per_step:,} tokens"
    yield Finding("ok", f"config: {settings['CONFIG']}, {length}")
    if settings.get("DEVICE") == "cpu":
        return
    for gpu, count in dict.fromkeys(accelerator(candidate) for candidate in candidates(task)):
        if not gpu:
            continue
        ranks = int(settings.get("RANKS_PER_NODE") or count) * int(task.get("num_nodes") or 1)
        micro_batches = train.batch.tokens_per_step // (max(1, train.batch.micro_batch_size) * model.context)
        if micro_batches % ranks:
            yield Finding(
                "x", f"config: {micro_batches} micro-batches do not divide over {ranks} ranks of {gpu}:{count}"
            )
        elif train.train.precision == "fp8" and has_fp8(gpu) is False:
            yield Finding("x", f"config: train.precision is fp8, but {gpu} has no fp8 units; set bf16, or take H100")
        elif (found := memory.verdict(train, model, gpu, ranks)) is not None:
            fits, said = found
            yield Finding("ok" if fits else "x", f"memory: {said}")


def _training(task: Mapping[str, Any], settings: Mapping[str, str]) -> TrainingConfig:
    """The settings of the training that the task runs."""
    arguments = _arguments(settings)
    if "--start.weights" in task["run"]:
        arguments.append(f"--start.weights={settings['START']}")
    return loader.load(training_schema(arguments), arguments, _variables(settings))


def _start_model(tuned: FinetuneConfig) -> ModelConfig:
    """The model that a tuning begins with; one of a name that we do not know counts as GPT-2 124M."""
    start = tuned.start.weights.partition("/checkpoints/")[0]
    if "://" in start:
        return loader.from_dict(ModelConfig, read_description(RunFolder(start))["config"]["model"], start)
    return public_model(start) or ModelConfig()


def _arguments(settings: Mapping[str, str]) -> list[str]:
    """As the task's own command gives them."""
    device = [f"--train.device={settings['DEVICE']}"] if settings.get("DEVICE") else []
    return [settings["CONFIG"], *device, *(settings.get("TRAIN_ARGS") or "").split()]


def _variables(settings: Mapping[str, str]) -> dict[str, str]:
    """What the program reads from its environment on the node."""
    urls = {"RUN_URL": run_url(settings), "DATA_URL": data_url(settings)}
    return {**urls, "MAX_USD": settings.get("MAX_USD", "")}


def run_url(settings: Mapping[str, str]) -> str:
    """Raises ConfigError."""
    return bucket.url(settings, "RUN")


def run_of(source: str, environment: Mapping[str, str]) -> str:
    """The URL of a run: `source`, or for a task's file RUN_URL, else that of BUCKET and RUN. Raises ConfigError."""
    if not source.endswith(".yaml"):
        return source
    return environment.get("RUN_URL") or run_url(settings_of(read_task(source), environment))


def data_url(settings: Mapping[str, str]) -> str:
    """Raises ConfigError."""
    return bucket.url(settings, "DATA")


def data_bytes(settings: Mapping[str, str]) -> int:
    """What a machine would read; 0 if there is no data yet."""
    try:
        return sum(shard.bytes for shard in manifest.read(data_url(settings)).splits["train"].shards)
    except LauncherError:
        return 0


def accelerator(candidate: Mapping[str, Any]) -> tuple[str, int]:
    name, _, count = str(candidate.get("accelerators") or "").partition(":")
    return name, int(count or 1)
