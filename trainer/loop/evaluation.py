"""Evaluates the model during training: validation loss, HellaSwag and text samples, at their intervals."""

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from core import storage
from core.errors import ObjectNotFound
from core.figures import quantity
from core.run import journal
from core.run.segment import SegmentLog
from core.settings.inference import Sampling
from trainer.checkpoint.load import Restored
from trainer.data.order import derive_key
from trainer.distributed.process_group import Abandoned, Ranks, gather_numbers
from trainer.evals.hellaswag import HellaSwag
from trainer.inference.engine import Engine, GenerationRequest
from trainer.loop.inputs import takes_samples
from trainer.loop.report import StepReporter
from trainer.model.gpt import GPT
from trainer.stages.stage import Stage

log = logging.getLogger("train")

TOP_K = 50


class TrainingEvaluator:
    """Runs the evaluations that are due after a step, on all ranks together.

    A request to stop ends an evaluation between two batches. The evaluation is then not recorded, and the next segment
    repeats it.
    """

    def __init__(
        self,
        stage: Stage,
        ranks: Ranks,
        model: GPT,
        segment: SegmentLog,
        reporter: StepReporter,
        hellaswag_rows: Sequence[Mapping[str, Any]],
        is_leaving: Callable[[], bool] = lambda: False,
    ):
        self._stage = stage
        self._train = stage.settings.train
        self._tokens_per_step = stage.settings.batch.tokens_per_step
        self._ranks = ranks
        self._model = model
        self._segment = segment
        self._reporter = reporter
        self._is_leaving = is_leaving
        # Each ending is scored after its context, so the context is counted for each ending. This estimate takes four
        # characters per token.
        endings = ((len(row["ctx"]) + len(each)) for row in hellaswag_rows for each in row["endings"])
        self._hellaswag_tokens = sum(endings) // 4
        self._seconds: dict[str, float] = {}  # seconds that each kind of evaluation took the last time
        self._validation = functools.cache(stage.validation)
        self._hellaswag_rows = hellaswag_rows
        self._hellaswag = functools.cache(self._encode_hellaswag)
        self.best: tuple[int, float] | None = None  # step and loss of the lowest validation loss; the same on all ranks

    def recall(self, best: Sequence[float] | None, step: int, measured: Mapping[str, Mapping[str, Any]]) -> None:
        """Set the lowest validation loss so far: the restored `best`, or the loss measured at `step` if it is lower."""
        if best:
            self.best = (int(best[0]), float(best[1]))
        if loss := measured.get("eval", {}).get("val_loss"):
            self._compare(step, loss)

    def _compare(self, step: int, loss: float) -> None:
        if self.best is None or loss < self.best[1]:
            self.best = (step, loss)

    def start(self) -> None:
        """Measure the validation loss and samples before the first step, if they are due then. Raises Abandoned."""
        due = self.due(0) if self._train.eval_first else []
        if "eval" in due or self._stage.measures_start:
            self.validate(0)
        if "sample" in due:
            self._sample(0)

    def evaluate(self, step: int, without: Collection[str] = (), is_last: bool = False) -> bool:
        """Run the evaluations that are due after `step`, except the kinds in `without`.

        Returns False, on all ranks, if a request to stop ended an evaluation.
        """
        evaluations = {"eval": self.validate, "hellaswag": self._score_hellaswag, "sample": self._sample}
        due = [kind for kind in self.due(step, is_last) if kind not in without]
        if not due:
            return True
        is_done = True
        try:
            for kind in due:
                began = self._segment.now()
                evaluations[kind](step)
                self._seconds[kind] = self._segment.now() - began
        except Abandoned:
            is_done = False
        # Only rank 0 makes samples, so `is_done` may differ between the ranks.
        is_done = bool(gather_numbers([is_done], self._ranks).all())
        if not is_done:
            log.warning("the evaluation of step %d is cut off: the next segment repeats it", step)
        return is_done

    def due(self, step: int, is_last: bool = False) -> list[str]:
        """The kinds of metrics that are due after `step`; after the last step, all kinds."""
        train = self._train
        every = {"eval": train.eval_every, "hellaswag": train.hellaswag_every, "sample": train.sample_every}
        if not self._hellaswag_rows:
            del every["hellaswag"]
        if not takes_samples(train):
            del every["sample"]
        return [kind for kind, steps in every.items() if is_last or (steps and step % steps == 0)]

    def last_seconds(self, seconds_per_token: float) -> float:
        """Expected seconds of the evaluations after the last step.

        For each kind, this is the last measured time. Before the first measurement, half the time of training on the
        same tokens is assumed. This is enough, because a pass without gradients takes a third. Samples count as 0 then.
        """
        tokens = {"eval": self._train.eval_tokens, "hellaswag": self._hellaswag_tokens}
        return sum(
            self._seconds.get(kind, tokens.get(kind, 0) * seconds_per_token / 2) for kind in self.due(0, is_last=True)
        )

    def validate(self, step: int) -> None:
        """Measure the validation loss, if the stage has validation data. Raises Abandoned."""
        with self._segment.phase("eval"):
            validation = self._validation()
            if validation is None:
                return
            found = validation(self._model, self._check_stop)
        self._reporter.metric("eval", {"step": step, "tokens": step * self._tokens_per_step, **found})
        if step:
            self._compare(step, found["val_loss"])
        text = f"step %d/%d | validation loss {found['val_loss']:.4f} over {quantity(found['eval_tokens'])} tokens"
        more = [name for name in found if name not in ("val_loss", "eval_tokens")]
        text += "".join(f" | {name.removeprefix('val_').replace('_', ' ')} {found[name]:.4f}" for name in more)
        log.info(text, step, self._stage.steps)

    def _score_hellaswag(self, step: int) -> None:
        with self._segment.phase("eval"):
            score = self._hellaswag()(self._model, self._check_stop)
        tokens = step * self._tokens_per_step
        self._reporter.metric("hellaswag", {"step": step, "tokens": tokens, **score.as_dict()})
        log.info("step %d/%d | HellaSwag %s", step, self._stage.steps, score)

    def _encode_hellaswag(self) -> HellaSwag:
        stage = self._stage
        return HellaSwag(self._hellaswag_rows, stage.encoding, stage.ranks, stage.precision)

    def _sample(self, step: int) -> None:
        if not self._ranks.is_main:
            return
        train, stage = self._train, self._stage
        texts = []
        with self._segment.phase("sample"):
            for number, prompt in enumerate(train.sample_prompts):
                for each in range(train.samples_per_prompt):
                    seed = derive_key(train.seed, number, *([each] if each else [])) >> 1
                    begin, length, device = stage.as_prompt(prompt), train.sample_tokens, self._ranks.device
                    text = sample(self._model, stage.encoding, begin, length, seed, device, self._is_leaving)
                    texts.append((prompt, text))
        for prompt, text in texts:
            self._reporter.metric("sample", {"step": step, "prompt": prompt, "text": text})
            log.info("step %d/%d | sample: %s", step, stage.steps, " ".join(text.split()))

    def _check_stop(self) -> None:
        """Raises Abandoned on all ranks if one of them must stop, so that no rank waits for another's results."""
        if gather_numbers([self._is_leaving()], self._ranks).any():
            raise Abandoned


def sample(
    model: torch.nn.Module,
    encoding,
    prompt: str,
    new_tokens: int,
    seed: int,
    device: torch.device,
    is_leaving: Callable[[], bool] = lambda: False,
) -> str:
    """Continue `prompt` by up to `new_tokens` tokens or to the end of the document, with top-k 50 at temperature 1, as
    build-nanogpt does. The fixed seed makes the samples of different steps comparable.

    A prompt that leaves too little room in the model's context is cut at its beginning. `is_leaving` is called after
    each token; if it returns true, Abandoned is raised.
    """
    engine = Engine(model, encoding, device)
    tokens = engine.encode(prompt)[-max(1, engine.context - new_tokens) :]
    settings = Sampling(max_tokens=new_tokens, temperature=1.0, top_k=TOP_K, seed=seed)
    model.eval()
    with torch.compiler.set_stance("force_eager"):  # lengths vary, and torch would compile for each length
        text = prompt
        for piece in engine.stream([GenerationRequest(tokens, settings)]):
            if is_leaving():
                raise Abandoned
            text += piece.text
    model.train()
    return text


def measured_before(segment: SegmentLog, restored: Restored) -> dict[str, Mapping[str, Any]]:
    """On rank 0: the metrics that earlier segments recorded for the restored step, by kind.

    They are in the segment that saved the step, or in a later segment. An evaluation that was cut off recorded nothing.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for number in range(restored.segment, segment.number):
        for info in reversed(storage.list_objects(segment.ledger.folder.segment(number).metrics)):
            with contextlib.suppress(ObjectNotFound):  # the object was merged with others after the listing
                events, _ = journal.read_objects([info.uri])
                found |= {event["kind"]: event for event in events if event["step"] == restored.step}
                if events and events[0]["step"] < restored.step:
                    break
    return found
