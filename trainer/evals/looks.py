"""Evaluation within a run: validation loss, HellaSwag and samples, where due. What is made for them is made once."""

import functools
import logging

from core.console import quantity
from trainer.data.order import derive_key
from trainer.distributed import Ranks
from trainer.evals.sample import sample
from trainer.model.gpt import GPT
from trainer.record import Record
from trainer.report import Report
from trainer.stages.stage import Stage

log = logging.getLogger("train")


class Looks:
    """`__call__(step)` does what is due."""

    def __init__(self, stage: Stage, ranks: Ranks, model: GPT, record: Record, report: Report):
        self._stage = stage
        self._train = stage.settings.train
        self._tokens_per_step = stage.settings.batch.tokens
        self._ranks = ranks
        self._model = model
        self._record = record
        self._report = report
        self._held_out = functools.cache(stage.held_out)
        self._hellaswag = functools.cache(stage.hellaswag)

    def __call__(self, step: int) -> None:
        train = self._train
        if self._due(step, train.eval_every):
            self.measure(step)
        if train.hellaswag_items and self._due(step, train.hellaswag_every):
            with self._record.phase("eval"):
                self._answer(step)
        if self._due(step, train.sample_every):
            with self._record.phase("sample"):
                self._sample(step)

    def _due(self, step: int, every: int) -> bool:
        return step == self._train.steps or bool(every and step % every == 0)

    def measure(self, step: int) -> None:
        """On held-out data, if there is any."""
        with self._record.phase("eval"):
            held_out = self._held_out()
            if held_out is None:
                return
            found = held_out(self._model)
        self._report.metric("eval", {"step": step, "tokens": step * self._tokens_per_step, **found})
        text = f"step %d/%d | validation loss {found['val_loss']:.4f} over {quantity(found['eval_tokens'])} tokens"
        more = [name for name in found if name not in ("val_loss", "eval_tokens")]
        text += "".join(f" | {name.removeprefix('val_').replace('_', ' ')} {found[name]:.4f}" for name in more)
        log.info(text, step, self._train.steps)

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
        train, stage = self._train, self._stage
        for number, prompt in enumerate(train.sample_prompts):
            seed = derive_key(train.seed, number) >> 1
            text = sample(
                self._model, stage.encoding, stage.as_prompt(prompt), train.sample_tokens, seed, self._ranks.device
            )
            self._report.metric("sample", {"step": step, "prompt": prompt, "text": text})
            log.info("step %d/%d | sample: %s", step, train.steps, " ".join(text.split()))
