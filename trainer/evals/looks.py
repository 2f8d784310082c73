"""Evaluation within a run: validation loss, HellaSwag and samples, where due. What is made for them is made once."""

import functools
import logging
from collections.abc import Callable

from core.console import quantity
from core.schema import TrainConfig
from trainer.data.order import derive_key
from trainer.distributed import Ranks
from trainer.evals.hellaswag import HellaSwag
from trainer.evals.loss import ValidationLoss
from trainer.evals.sample import sample
from trainer.model.gpt import GPT
from trainer.record import Record
from trainer.report import Report

log = logging.getLogger("train")


class Looks:
    """`__call__(step)` does what is due. `hellaswag` may give None: the set is not there."""

    def __init__(
        self,
        settings: TrainConfig,
        ranks: Ranks,
        model: GPT,
        record: Record,
        report: Report,
        validation: Callable[[], ValidationLoss | None],
        hellaswag: Callable[[], HellaSwag | None],
        encoding: Callable[[], object],
    ):
        self._train = settings.train
        self._tokens_per_step = settings.batch.tokens
        self._ranks = ranks
        self._model = model
        self._record = record
        self._report = report
        self._validation = functools.cache(validation)
        self._hellaswag = functools.cache(hellaswag)
        self._encoding = functools.cache(encoding)

    def __call__(self, step: int) -> None:
        train = self._train
        if self._due(step, train.eval_every):
            with self._record.phase("eval"):
                self._measure(step)
        if train.hellaswag_items and self._due(step, train.hellaswag_every):
            with self._record.phase("eval"):
                self._answer(step)
        if self._due(step, train.sample_every):
            with self._record.phase("sample"):
                self._sample(step)

    def _due(self, step: int, every: int) -> bool:
        return step == self._train.steps or bool(every and step % every == 0)

    def _measure(self, step: int) -> None:
        validation = self._validation()
        if validation is None:
            return
        loss = validation(self._model)
        tokens = step * self._tokens_per_step
        values = {"step": step, "tokens": tokens, "val_loss": loss, "eval_tokens": validation.tokens}
        self._report.metric("eval", values)
        text = "step %d/%d | validation loss %.4f over %s tokens"
        log.info(text, step, self._train.steps, loss, quantity(validation.tokens))

    def _answer(self, step: int) -> None:
        hellaswag = self._hellaswag()
        if hellaswag is None:
            return
        score = hellaswag(self._model)
        tokens = step * self._tokens_per_step
        self._report.metric("hellaswag", {"step": step, "tokens": tokens, **score.as_dict()})
        log.info("step %d/%d | HellaSwag %s", step, self._train.steps, score)

    def _sample(self, step: int) -> None:
        if not self._ranks.is_main:
            return
        train = self._train
        for number, prompt in enumerate(train.sample_prompts):
            seed = derive_key(train.seed, number) >> 1
            text = sample(self._model, self._encoding(), prompt, train.sample_tokens, seed, self._ranks.device)
            self._report.metric("sample", {"step": step, "prompt": prompt, "text": text})
            log.info("step %d/%d | sample: %s", step, train.steps, " ".join(text.split()))
