"""Defines the interface of a stage of training: the parts that differ between stages.

`trainer.loop` runs every stage with one loop, one way to resume and one ledger. A stage provides the micro-batches,
the weights that a run begins with, the weights to train, the loss of a micro-batch, and the validation.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from core import storage
from core.data.vocabulary import Vocabulary
from core.errors import ObjectNotFound
from core.figures import counted, quantity
from core.run.folder import RunFolder, read_description
from core.settings import loader
from core.settings.model import ModelConfig, flops_per_token
from core.settings.training import TrainingConfig, check_batch
from trainer.checkpoint.load import Restored
from trainer.distributed.process_group import Ranks, StopCheck, on_main
from trainer.model import precision
from trainer.model.gpt import GPT
from trainer.optim.schedule import Schedule
from trainer.stages import sizing
from trainer.weights import folder as public
from trainer.weights.open import look_up


class MicroBatches(Protocol):
    """Yields this rank's micro-batches without end; each micro-batch is the only argument of the objective.

    `next` raises LauncherError for data that cannot be read. If `is_leaving()` is true, `next` raises Abandoned and
    does not wait.
    """

    numbers: list[int]  # the numbers of this rank's micro-batches within a step
    is_leaving: Callable[[], bool]

    def __next__(self) -> Any: ...
    def close(self) -> None: ...


class Validation(Protocol):
    """Measures a model on validation data, with the same result on any number of ranks.

    The result has `val_loss` and `eval_tokens`, and may have more numbers. `check_stop` may end the measurement.
    """

    def __call__(self, model: GPT, check_stop: StopCheck | None = None) -> Mapping[str, float]: ...


class Stage(abc.ABC):
    """Stages are constructed on all ranks before anything is written, so that a wrong setting changes nothing.

    `settings` are the given settings, in which this run replaces some values: the micro-batch size that fits, the
    number of steps, the names of models. `model` is the network, `context` the length of the sequences in tokens.
    `schedule` follows the settings until trainer.loop.segment replaces it by the schedule of the run's course.
    """

    name: str  # in the ledger
    settings: TrainingConfig
    round_robin = False  # whether ranks take micro-batches in turn (trainer.optim.reduce)
    measures_start = False  # whether step 0 is validated even if validations at intervals are off
    lengths_vary = False  # whether micro-batches differ in the length of their sequences

    def __init__(self, settings: TrainingConfig, model: ModelConfig, context: int, ranks: Ranks):
        check_batch(settings, context)
        self.ranks = ranks
        self.precision = precision.resolve(settings.train.precision, ranks.device)
        precision.check_residual(settings.train.residual, self.precision)
        earlier = on_main(functools.partial(stored_config, settings.run.url), ranks)
        found = earlier["batch"]["micro_batch_size"] if earlier else None
        settings = sizing.with_micro_batch(settings, dataclasses.replace(model, context=context), found, ranks)
        # This rank's share of a step's micro-batches. When overfitting, every rank computes the same single
        # micro-batch.
        self.share_rank, self.share_world = ranks.rank, ranks.world
        if settings.train.overfit:
            settings, model = sizing.one_micro_batch(settings, model, context)
            self.share_rank, self.share_world = 0, 1
        self.settings, self.model, self.context = settings, model, context
        self.schedule = Schedule(settings.optimizer, settings.train.steps)
        self.accumulation = sizing.accumulation(settings.batch, context, self.share_world, earlier is not None)

    @property
    def steps(self) -> int:
        """The last step of the run, as planned now; when overfitting, the largest number of steps allowed."""
        return self.schedule.end

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings and the model in the form that run.json and checkpoints store."""
        return {**loader.to_dict(self.settings), "model": loader.to_dict(self.model)}

    @property
    def identity(self) -> Mapping[str, Any]:
        """The settings that define the result. A later segment with other values is refused."""
        identity = loader.identity(self.settings)
        extended = [change.steps for change in self.schedule.changes if change.kind == "extend"]
        if extended and identity["train.steps"] == extended[-1]:
            identity["train.steps"] = self.schedule.first_steps
        return identity

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A checksum that identifies the training data."""

    @property
    def flops_per_token(self) -> float | None:
        """FLOPs per token for the MFU, or None for a stage whose FLOPs are not counted."""
        return flops_per_token(dataclasses.replace(self.model, context=self.context))

    def build(self) -> GPT:
        """The model without memory for its weights. Weights that require no gradient are neither trained nor saved."""
        with torch.device("meta"):
            return GPT(self.model, self.settings.train.activation_checkpointing, self.settings.train.residual)

    @abc.abstractmethod
    def fill(self, model: GPT, restored: Restored | None) -> None:
        """Set the weights that were not restored from a checkpoint of this run.

        In the first segment, these are all weights.
        """

    def describe(self, model: GPT) -> str:
        """A text for the log.

        It holds the settings that differ from their defaults, and numbers that follow from the settings.
        """
        settings = loader.describe(self.settings, f"all: {RunFolder(self.settings.run.url).description}")
        return "\n".join([settings, *self.describe_data(model), *self._batch_and_length()])

    @abc.abstractmethod
    def describe_data(self, model: GPT) -> list[str]:
        """Lines about the model and the data."""

    @abc.abstractmethod
    def describe_epochs(self) -> str:
        """The number of epochs, as the end of a log line."""

    def _batch_and_length(self) -> list[str]:
        batch, train, ranks = self.settings.batch, self.settings.train, self.ranks
        sequences, count = counted(batch.micro_batch_size, "sequence"), counted(ranks.world, "rank")
        where = f"{count} on {ranks.device.type}"
        tokens = f"batch: {batch.tokens_per_step:,} tokens = {sequences} x {self.context} tokens"
        if train.overfit:
            return [
                f"{tokens}, the same ones in every step and on each of {where}",
                f"length: until the loss is below train.overfit_max_loss = {train.overfit_max_loss:g}, "
                f"at most {counted(train.steps, 'step')}",
            ]
        total = quantity(batch.tokens_per_step * self.steps)
        most = "at most " if self.schedule.anneals and not self.schedule.cooldown else ""
        micro_batches = counted(self.accumulation, "micro-batch")
        return [
            f"{tokens} x {micro_batches} x {where}",
            f"length: {most}{counted(self.steps, 'step')} = {total} tokens{self.describe_epochs()}",
        ]

    @abc.abstractmethod
    def objective(self, model: GPT, share: float) -> nn.Module:
        """A module whose forward(micro_batch) gives the loss of the micro-batch.

        The backward pass of the module gives the gradient of `share` times this loss. The loss of a step is the mean
        over its micro-batches.
        """

    @abc.abstractmethod
    def batches(self, first_step: int) -> MicroBatches: ...

    @abc.abstractmethod
    def validation(self) -> Validation | None:
        """The measurement on validation data, or None if there is no such data."""

    @property
    @abc.abstractmethod
    def data_url(self) -> str:
        """The URL of the dataset, where evaluation sets are stored too. It is empty if there is no dataset."""

    @abc.abstractmethod
    def read_vocabulary(self) -> Vocabulary:
        """On rank 0: the vocabulary at VOCAB_URL, else the one stored with the data or with the starting weights.

        Raises ConfigError if there is none, DataError for any vocabulary except GPT-2's.
        """

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary. All ranks open it together."""
        return on_main(self.read_vocabulary, self.ranks)

    @property
    def encoding(self):
        """The tiktoken encoding of the vocabulary."""
        return self.vocabulary.encoding()

    def check_stored(self) -> None:
        """On rank 0: check that the stored data that the run reads later exists. Raises DataError."""
        return

    def as_prompt(self, text: str) -> str:
        """The text that a sample continues, made from a prompt of train.sample_prompts."""
        return text

    def state(self) -> Mapping[str, Any]:
        """The state of the stage that a checkpoint stores, besides the common state."""
        return {}


def stored_config(run_url: str) -> Mapping[str, Any] | None:
    """The config that the first segment of this run stored, or None for a new run."""
    try:
        return read_description(RunFolder(run_url))["config"]
    except ObjectNotFound:
        return None


def lasting_name(given: str, run_url: str, section: str) -> str:
    """On rank 0: a name for the model `given` that refers to the same weights in every segment of a run.

    The first segment stores this name in `section` of its config. Later segments use the stored name, even if the run
    that `given` names has newer checkpoints by then.
    """
    if not public.is_public(given) and storage.is_local(given):
        given = str(storage.local_path(given).resolve())
    kept = (stored_config(run_url) or {}).get(section, {}).get("weights")
    if kept and given.rstrip("/") in (kept, kept.rpartition("/checkpoints/")[0]):
        return kept
    return look_up(given)[0]
