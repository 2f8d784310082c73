"""The training loop: exchange, checkpoint, evaluate, step.

At each step boundary the ranks first tell each other what they know (a failed batch, a request to stop), then all
do the same: save what the last step made, evaluate it, and go on or leave. So no rank is left alone in a
collective, and a checkpoint always comes before the evaluation that could fail.
"""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel

from core import config
from core.console import quantity
from core.errors import LauncherError, TrainingError
from core.gpus import peak_flops
from core.schema import TrainConfig
from trainer.checkpoint.save import Saver
from trainer.data.loader import Batches
from trainer.data.order import derive_key
from trainer.distributed import PeerFailed, Ranks, gather_numbers
from trainer.evals.loss import ValidationLoss
from trainer.evals.sample import sample
from trainer.model.gpt import GPT
from trainer.optim.reduce import TreeReducer
from trainer.optim.schedule import learning_rate
from trainer.optim.units import UnitOptimizer
from trainer.precision import autocast
from trainer.record import Record
from trainer.watch.cap import SpendingCap
from trainer.watch.notice import Notice, Requests

log = logging.getLogger("train")

KINDS = ("signal", "spot", "cap")  # why ranks leave, as they tell each other


@dataclass
class Loop:
    """Runs the optimizer steps of one segment. `validation` and `encoding` are made at their first use."""

    settings: TrainConfig
    ranks: Ranks
    model: GPT
    optimizer: UnitOptimizer
    accumulation: int
    batches: Batches
    saver: Saver
    record: Record
    requests: Requests
    cap: SpendingCap | None
    validation: Callable[[], ValidationLoss]
    encoding: Callable[[], object]
    data_fingerprint: str

    def __post_init__(self):
        on_gpu = self.ranks.device.type == "cuda"
        self.compiled = self.settings.train.compile and on_gpu
        if self.compiled:
            # Block by block: equal blocks compile once, and DDP can send early gradients while later ones are
            # computed, which one graph for the whole model would not allow.
            for block in self.model.h:
                block.compile()
        self.ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.reducer = TreeReducer(self.ddp, self.accumulation)
        peak = peak_flops(torch.cuda.get_device_name()) if on_gpu else None
        self.peak_flops = peak * self.ranks.world if peak else None
        self.flops_per_step = self.model.flops_per_token() * self.settings.batch.tokens
        self.step_seconds = 0.0
        self.after_first_step: Callable[[], None] | None = None

    def run(self, first_step: int) -> tuple[int, Notice | None]:
        """Train up to the last step or until asked to leave. Returns the step reached, which is saved, and why."""
        steps = self.settings.train.steps
        step = first_step
        while True:
            self.record.switch("data_wait")
            started = time.monotonic()
            fetched = self._fetch() if step < steps else []
            notice, save = self._exchange(step, fetched)
            waited = time.monotonic() - started
            if step > first_step:
                self._save(step, save, last=notice is not None or step == steps)
            elif step == steps:
                log.info("the run has reached its last step, %d, before", step)
            if step == steps:
                self._look(step)
                return step, None
            if notice:
                return step, notice
            if step > first_step:
                self._look(step)
            self.record.switch("compile" if self.compiled and step == first_step else "train")
            self._step(step + 1, fetched, waited)
            step += 1
            if step == first_step + 1:
                self.record.mark("first_step", step=step)
                if self.after_first_step:
                    threading.Thread(target=self.after_first_step, name="after first step", daemon=True).start()

    def _fetch(self) -> list[torch.Tensor] | LauncherError:
        """This rank's micro-batches of the next step, or why there are none."""
        try:
            return [next(self.batches) for _ in range(self.accumulation)]
        except LauncherError as error:
            return error

    def _exchange(self, step: int, fetched: list[torch.Tensor] | LauncherError) -> tuple[Notice | None, bool]:
        """All ranks learn what any of them knows: (why to leave, whether to save). Raises if a rank failed."""
        failure = fetched if isinstance(fetched, LauncherError) else self.saver.taken_over
        save = False
        if self.ranks.is_main:
            if self.cap.reached(self.step_seconds, self.saver.seconds()):
                self.requests.ask_to_leave("cap", self.cap.describe())
            save = self.saver.cadence.due(step, self.step_seconds) and not self.saver.busy
        wish = self.requests.take_save()
        if wish:
            log.warning("saving now: %s", wish)
        leave = self.requests.leave
        mine = [failure is not None, KINDS.index(leave.kind) + 1 if leave else 0, save or wish is not None]
        told = gather_numbers(mine, self.ranks)
        if failure is not None:
            raise failure
        if told[:, 0].any():
            raise PeerFailed
        if told[:, 1].any():
            asked = int(told[:, 1].argmax())
            kind = KINDS[int(told[asked, 1]) - 1]
            return (leave or Notice(kind, f"told by rank {asked}")), True
        return None, bool(told[:, 2].any())

    def _save(self, step: int, due: bool, last: bool) -> None:
        """Begin a checkpoint if one is due; the last one of a segment is waited for."""
        if not (due or last):
            return
        with self.record.phase("checkpoint"):
            self.saver.begin(step, self._state(step))
            if last:
                self.saver.finish(step)
                log.info("step %d is saved", step)

    def _look(self, step: int) -> None:
        """Validation loss and samples where due. After the save: what fails here must not cost the step."""
        train = self.settings.train
        finished = step == train.steps
        if finished or (train.eval_every and step % train.eval_every == 0):
            with self.record.phase("eval"):
                self._evaluate(step)
        if finished or (train.sample_every and step % train.sample_every == 0):
            with self.record.phase("sample"):
                self._sample(step)

    def _step(self, step: int, micro_batches: list[torch.Tensor], waited_seconds: float) -> None:
        """One optimizer step. Raises TrainingError before the weights change if a number is not finite."""
        settings = self.settings
        started = time.monotonic()
        micro_batches_in_all = self.accumulation * self.ranks.world
        losses = []
        self.reducer.reset()
        for index, tokens in enumerate(micro_batches):
            # Whatever is random in a forward pass depends on the micro-batch, not on who computes it.
            torch.manual_seed(derive_key(settings.train.seed, step, self.ranks.rank * self.accumulation + index))
            with self.reducer.context(index):
                with autocast(self.ranks.device):
                    loss = self.ddp(tokens[:, :-1], tokens[:, 1:])
                (loss / micro_batches_in_all).backward()
            losses.append(loss.detach())
            self.reducer.micro_batch_done(index)
        clip = settings.optimizer.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        everyones = gather_numbers(torch.stack(losses).double().cpu(), self.ranks)
        self._check_finite(step, everyones, float(norm))
        rate = learning_rate(step, settings.train.steps, settings.optimizer)
        self.optimizer.step(rate)
        self.record.step_done(step)
        seconds = time.monotonic() - started + waited_seconds
        self.step_seconds = seconds
        self._report(step, float(everyones.mean()), rate, float(norm), seconds, waited_seconds)

    def _check_finite(self, step: int, losses: torch.Tensor, norm: float) -> None:
        if bool(losses.isfinite().all()) and math.isfinite(norm):
            return
        if not self.ranks.is_main:
            raise PeerFailed  # all ranks see it, one says it
        bad = (~losses.isfinite()).nonzero()
        where = (
            f"the loss on rank {int(bad[0, 0])} is {float(losses[tuple(bad[0])])}"
            if len(bad)
            else f"the gradient norm is {norm}"
        )
        raise TrainingError(
            f"step {step}: {where}; the weights were not changed. Start again to retry from the last checkpoint, "
            "and if it comes back lower optimizer.lr or look at the data of this step"
        )

    def _report(self, step: int, loss: float, rate: float, norm: float, seconds: float, waited_seconds: float) -> None:
        """One metric per step; one log line per interval."""
        train = self.settings.train
        speed = self.settings.batch.tokens / seconds
        mfu = self.flops_per_step / seconds / self.peak_flops if self.peak_flops else None
        values = {
            "step": step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "tokens": step * self.settings.batch.tokens,
            "step_seconds": seconds,
            "tokens_per_second": speed,
            "mfu": mfu,
            "data_wait_seconds": waited_seconds,
        }
        self.record.metric("train", values)
        if step % train.log_every and step != train.steps:
            return
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if self.ranks.device.type == "cuda" else "cpu"
        spent = self.cap.spent_usd() if self.cap else None
        log.info(
            "step %d/%d | loss %.4f | lr %.2e | grad norm %.3f | %s tokens/s | MFU %s | %s | spent %s | remaining %s",
            step,
            train.steps,
            loss,
            rate,
            norm,
            quantity(speed),
            "?" if mfu is None else f"{100 * mfu:.1f} %",
            memory,
            "?" if spent is None else f"${spent:.2f}",
            _duration(seconds * (train.steps - step)),
        )

    def _evaluate(self, step: int) -> None:
        validation = self.validation()
        loss = validation(self.model)
        self.record.metric(
            "eval",
            {
                "step": step,
                "tokens": step * self.settings.batch.tokens,
                "val_loss": loss,
                "eval_tokens": validation.tokens,
            },
        )
        log.info(
            "step %d/%d | validation loss %.4f over %s tokens",
            step,
            self.settings.train.steps,
            loss,
            quantity(validation.tokens),
        )

    def _sample(self, step: int) -> None:
        if not self.ranks.is_main:
            return
        train = self.settings.train
        for number, prompt in enumerate(train.sample_prompts):
            seed = derive_key(train.seed, number) >> 1
            text = sample(self.model, self.encoding(), prompt, train.sample_tokens, seed, self.ranks.device)
            self.record.metric("sample", {"step": step, "prompt": prompt, "text": text})
            log.info("step %d/%d | sample: %s", step, train.steps, " ".join(text.split()))

    def _state(self, step: int) -> dict:
        """What a checkpoint holds besides tensors. Random numbers need no state: they are a function of the step."""
        return {
            "step": step,
            "tokens": step * self.settings.batch.tokens,
            "rng": {"rule": "seeded per micro-batch from (train.seed, step, index)", "seed": self.settings.train.seed},
            "config": config.to_dict(self.settings),
            "data_fingerprint": self.data_fingerprint,
            "torch": torch.__version__,
        }


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"
