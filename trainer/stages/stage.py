"""What pretraining, fine-tuning, distillation and preference optimisation do differently.

`trainer.loop.segment` runs a stage: one loop, with resume, ranks, ledger, cap, notices and checkpoints. A
stage says where micro-batches come from, which weights a run begins with and which of them train, what the loss of a
micro-batch is, and what is measured on held-out data.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from core import storage
from core.data import sets
from core.errors import ObjectNotFound
from core.run.folder import RunFolder, read_description
from core.settings.model import flops_per_token
from core.settings.training import TrainConfig
from trainer.checkpoint.load import Restored
from trainer.distributed.in_turn import Between
from trainer.distributed.process_group import Ranks, on_main
from trainer.evals.hellaswag import NAME as HELLASWAG
from trainer.evals.hellaswag import HellaSwag
from trainer.model import precision
from trainer.model.gpt import GPT
from trainer.stages import overfit, plan, sizing
from trainer.weights import folder as public
from trainer.weights.open import look_up


class MicroBatches(Protocol):
    """This rank's micro-batches, endlessly; each is one argument of the objective. `next` raises LauncherError, and
    Abandoned where it would wait although `is_leaving()`."""

    is_leaving: Callable[[], bool]

    def __next__(self) -> Any: ...
    def close(self) -> None: ...


class HeldOut(Protocol):
    """Measures a model on held-out data, with the same result on any number of ranks.

    The result has `val_loss` and `eval_tokens`; more numbers may follow. `between` may end the measurement.
    """

    def __call__(self, model: GPT, between: Between | None = None) -> Mapping[str, float]: ...


class Stage(abc.ABC):
    """Made on all ranks before anything is written, so that a wrong setting changes nothing.

    `settings` is what loop, report and looks read, with the micro-batch that was found to fit.
    """

    name: str  # in the ledger
    dealt = False  # whether ranks take turns at micro-batches (trainer.optim.reduce)
    measures_start = False  # on held-out data, before the first step
    lengths_vary = False  # of the rows of its micro-batches, from one to the next

    def __init__(self, settings: TrainConfig, ranks: Ranks):
        self.ranks = ranks
        self.precision = precision.resolve(settings.train.precision, ranks.device)
        earlier = on_main(functools.partial(stored_config, settings.run.url), ranks)
        found = earlier["batch"]["micro_batch_size"] if earlier else None
        self.settings = sizing.with_micro_batch(settings, found, ranks)
        # Whose share of a step's micro-batches this rank computes; when overfitting all ranks share a single one.
        self.share_rank, self.share_world = ranks.rank, ranks.world
        if settings.train.overfit:
            self.settings = overfit.one_micro_batch(self.settings)
            self.share_rank, self.share_world = 0, 1
        self.accumulation = plan.accumulation_of(self.settings, self.share_world)

    @property
    @abc.abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The whole configuration, as run.json and checkpoints keep it; `model` among it."""

    @property
    @abc.abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What defines the result; another segment with other values is refused."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Of the data."""

    @property
    def flops_per_token(self) -> float | None:
        """For the MFU; None where nobody has counted them."""
        return flops_per_token(self.settings.model)

    def build(self) -> GPT:
        """The model, without memory for its weights. What requires no gradient does not train and is not saved."""
        with torch.device("meta"):
            return GPT(self.settings.model, self.settings.train.activation_checkpointing)

    @abc.abstractmethod
    def fill(self, model: GPT, restored: Restored | None) -> None:
        """The weights that no checkpoint of this run has filled: all of them in its first segment."""

    @abc.abstractmethod
    def describe(self, model: GPT) -> str:
        """The numbers that the run follows from, for the log."""

    @abc.abstractmethod
    def objective(self, model: GPT) -> nn.Module:
        """Its forward(micro_batch_size) is a loss, to be averaged over a step's micro-batches."""

    @abc.abstractmethod
    def batches(self, first_step: int) -> MicroBatches: ...

    @abc.abstractmethod
    def held_out(self) -> HeldOut | None:
        """None if there is no held-out data."""

    def hellaswag(self) -> HellaSwag | None:
        """None if the set was never stored beside the data."""
        url = self.data_url
        items = on_main(functools.partial(sets.read_if_there, url, HELLASWAG), self.ranks) if url else None
        if items is None:
            return None
        return HellaSwag(items[: self.settings.train.hellaswag_items], self.encoding, self.ranks, self.precision)

    @property
    def data_url(self) -> str:
        return self.settings.data.url

    @property
    @abc.abstractmethod
    def encoding(self):
        """The tiktoken encoding of the vocabulary."""

    def as_prompt(self, text: str) -> str:
        """What a sample continues."""
        return text

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint says of the stage, beside what all of them say."""
        return {}


def stored_config(run_url: str) -> Mapping[str, Any] | None:
    """The configuration that this run's first segment settled on, if there was one."""
    try:
        return read_description(RunFolder(run_url))["config"]
    except ObjectNotFound:
        return None


def lasting_name(given: str, run_url: str, section: str, key: str) -> str:
    """Rank 0: the model `given` by a name that means the same in every segment of a run.

    A run that was begun keeps what it began with, though what it was begun with may have newer checkpoints by now.
    """
    if not public.is_public(given) and storage.is_local(given):
        given = str(storage.local_path(given).resolve())
    kept = (stored_config(run_url) or {}).get(section, {}).get(key)
    if kept and given.rstrip("/") in (kept, kept.rpartition("/checkpoints/")[0]):
        return kept
    return look_up(given)[0]


def default_cache_dir() -> Path:
    import getpass
    import tempfile

    return Path(tempfile.gettempdir()) / f"token-shards-{getpass.getuser()}"


def with_batch(config: Any, settings: TrainConfig) -> Any:
    """`config` with the batch, the rates and the length that `settings` came to."""
    return dataclasses.replace(config, batch=settings.batch, optimizer=settings.optimizer, train=settings.train)
