"""Before a machine is rented, checks that a task's inputs exist: tokens, weights, examples, prompts."""

from collections.abc import Iterator, Mapping

from clouds.base import Finding
from core import bucket, storage
from core.data import manifest, sets
from core.errors import DataError
from core.run.folder import RunFolder
from core.settings.tuning import DistilConfig, FinetuneConfig, SynthesisConfig
from core.task import TaskSpec

# Stages that work on a trained run, and the property of RunFolder that names their ledger.
BESIDE = {"evaluate": "evaluations", "serve": "serving", "export": "exports"}


def check_data(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Looks for the inputs of a stage: tokens to train on, or weights and examples for a tuning or an evaluation."""
    workload = task.workload
    if workload.stage in ("finetune", "dpo") and not isinstance(workload.config, FinetuneConfig):
        return  # check_config names the problem
    if isinstance(workload.config, FinetuneConfig):
        yield from _weights(workload.config.start.weights)
        examples = workload.config.data.examples
        if not examples.endswith(".jsonl"):
            rows = sets.info_of(bucket.url(task.envs, "DATA"), examples).rows
            yield Finding("ok", f"data: {rows:,} rows of {examples!r}")
    elif workload.stage in BESIDE:
        yield from _weights(task.envs.get("MODEL") or bucket.url(task.envs, "RUN"))
    elif isinstance(workload.config, SynthesisConfig):
        prompts = workload.config.make.prompts
        if storage.exists(prompts):
            yield Finding("ok", f"data: prompts at {prompts}")
        else:
            yield Finding("x", f"data: {prompts}: there is no such file; PROMPTS is the URL of a .txt or .jsonl file")
    elif workload.programs == ("trainer.train",):  # a task that also runs another program prepares its data itself
        url = bucket.url(task.envs, "DATA")
        try:
            tokens = manifest.read(url).splits["train"].tokens
            yield Finding("ok", f"data: {tokens:,} training tokens at {url}")
        except DataError as error:
            yield Finding("x", f"data: {error}; `make prep-data` makes it")
        if isinstance(workload.config, DistilConfig):
            yield from _weights(workload.config.teacher.weights)


def _weights(start: str) -> Iterator[Finding]:
    """Looks for the weights of a run or checkpoint. The weights of a public model are not checked."""
    if "://" not in start:
        return
    if storage.list_names(start if "/checkpoints/" in start else RunFolder(start).checkpoints):
        yield Finding("ok", f"start: {start} has weights")
    else:
        yield Finding("x", f"start: {start} has no checkpoint; check the name, or `make pretrain` first")
