"""Evaluation within a run: validation loss, HellaSwag and samples, where due. What is made for them is made once."""

import functools
import logging
from collections.abc import Callable, Collection

from core.data import sets
from core.figures import quantity
from trainer.data.order import derive_key
from trainer.distributed.process_group import Abandoned, Ranks, gather_numbers, on_main
from trainer.evals.hellaswag import NAME as HELLASWAG
from trainer.evals.hellaswag import HellaSwag
from trainer.loop.record import Record
from trainer.loop.report import Report
from trainer.loop.samples import sample
from trainer.model.gpt import GPT
from trainer.stages.stage import Stage

log = logging.getLogger("train")


class Looks:
    """`__call__(step)` does what is due. Asks `is_leaving()` between batches, on all ranks together.

    What is cut off is not recorded, so that the next segment does it again.
    """

    def __init__(
        self,
        stage: Stage,
        ranks: Ranks,
        model: GPT,
        record: Record,
        report: Report,
        is_leaving: Callable[[], bool] = lambda: False,
    ):
        self._stage = stage
        self._train = stage.settings.train
        self._tokens_per_step = stage.settings.batch.tokens_per_step
        self._ranks = ranks
        self._model = model
        self._record = record
        self._report = report
        self._is_leaving = is_leaving
        self._held_out = functools.cache(stage.held_out)
        self._hellaswag = functools.cache(functools.partial(read_hellaswag, stage))

    def __call__(self, step: int, without: Collection[str] = (), is_last: bool = False) -> bool:
        """Whether all of it was done, on all ranks alike; without the kinds of metrics that are there already."""
        looks = {"eval": self.measure, "hellaswag": self._answer, "sample": self._sample}
        due = [looks[kind] for kind in self.due(step, is_last) if kind not in without]
        if not due:
            return True
        is_done = True
        try:
            for look in due:
                look(step)
        except Abandoned:
            is_done = False
        # Samples are rank 0's alone.
        is_done = bool(gather_numbers([is_done], self._ranks).all())
        if not is_done:
            log.warning("the evaluation of step %d is cut off: the next segment does it again", step)
        return is_done

    def due(self, step: int, is_last: bool = False) -> list[str]:
        """The kinds of metrics that are due after `step`; all of them after the last one."""
        train = self._train
        every = {"eval": train.eval_every, "hellaswag": train.hellaswag_every, "sample": train.sample_every}
        if not train.hellaswag_items:
            del every["hellaswag"]
        return [kind for kind, steps in every.items() if is_last or (steps and step % steps == 0)]

    def measure(self, step: int) -> None:
        """On held-out data, if there is any. Raises Abandoned."""
        with self._record.phase("eval"):
            held_out = self._held_out()
            if held_out is None:
                return
            found = held_out(self._model, self._between)
        self._report.metric("eval", {"step": step, "tokens": step * self._tokens_per_step, **found})
        text = f"step %d/%d | validation loss {found['val_loss']:.4f} over {quantity(found['eval_tokens'])} tokens"
        more = [name for name in found if name not in ("val_loss", "eval_tokens")]
        text += "".join(f" | {name.removeprefix('val_').replace('_', ' ')} {found[name]:.4f}" for name in more)
        log.info(text, step, self._train.steps)

    def _answer(self, step: int) -> None:
        with self._record.phase("eval"):
            hellaswag = self._hellaswag()
            if hellaswag is None:
                return
            score = hellaswag(self._model, self._between)
        tokens = step * self._tokens_per_step
        self._report.metric("hellaswag", {"step": step, "tokens": tokens, **score.as_dict()})
        log.info("step %d/%d | HellaSwag %s", step, self._train.steps, score)

    def _sample(self, step: int) -> None:
        if not self._ranks.is_main:
            return
        train, stage = self._train, self._stage
        texts = []
        with self._record.phase("sample"):
            for number, prompt in enumerate(train.sample_prompts):
                seed = derive_key(train.seed, number) >> 1
                prompt, length = stage.as_prompt(prompt), train.sample_tokens
                device = self._ranks.device
                texts.append(sample(self._model, stage.encoding, prompt, length, seed, device, self._is_leaving))
        for prompt, text in zip(train.sample_prompts, texts, strict=True):
            self._report.metric("sample", {"step": step, "prompt": prompt, "text": text})
            log.info("step %d/%d | sample: %s", step, train.steps, " ".join(text.split()))

    def _between(self) -> None:
        """All ranks give up as soon as one is to leave, so that none waits alone for the others' results."""
        if gather_numbers([self._is_leaving()], self._ranks).any():
            raise Abandoned


def read_hellaswag(stage: Stage) -> HellaSwag | None:
    """The set that is stored beside the stage's data, or None."""
    url = stage.data_url
    items = on_main(functools.partial(sets.read_if_there, url, HELLASWAG), stage.ranks) if url else None
    if items is None:
        return None
    return HellaSwag(items[: stage.settings.train.hellaswag_items], stage.encoding, stage.ranks, stage.precision)
