"""The training loop: exchange, checkpoint, evaluate, step.

At each step boundary the ranks first tell each other what they know (a failed batch, a request to stop), then all
do the same: save what the last step made, evaluate it, and go on or leave. So no rank is left alone in a
collective, and a checkpoint always comes before the evaluation that could fail. A request to stop also ends an
evaluation and a wait for data. Before the first step is done there is nothing to save: the process leaves at once.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from core import stop
from core.errors import LauncherError, TrainingError
from core.run.cap import SpendingCap
from core.settings.training import TrainLoopConfig
from trainer.checkpoint.save import Saver
from trainer.data.order import derive_key, micro_batch_numbers
from trainer.distributed.process_group import Abandoned, PeerFailed, Ranks, gather_numbers, on_main
from trainer.loop.evaluation import Looks
from trainer.loop.norms import StepNorms
from trainer.loop.peers import SlowPeers
from trainer.loop.record import Record
from trainer.loop.report import Report
from trainer.loop.requests import Notice, Requests
from trainer.model.gpt import GPT
from trainer.model.precision import autocast, use_fp8
from trainer.optim.optimizer import UnitOptimizer
from trainer.optim.reduce import TreeReducer
from trainer.optim.schedule import rate_factor
from trainer.stages.stage import MicroBatches, Stage

log = logging.getLogger("train")

KINDS = ("signal", "spot", "cap")  # why ranks leave, as they tell each other


@dataclass
class Loop:
    """Runs the optimizer steps of one segment."""

    stage: Stage
    ranks: Ranks
    model: GPT
    optimizer: UnitOptimizer
    batches: MicroBatches
    saver: Saver
    record: Record
    requests: Requests
    cap: SpendingCap | None
    looks: Looks
    report: Report
    last_loss: float | None = None  # of the step that was restored, where its checkpoint has it

    def __post_init__(self):
        self.settings = self.stage.settings
        self.accumulation = self.stage.accumulation
        self.precision = self.stage.precision
        on_gpu = self.ranks.device.type == "cuda"
        self.compiled = self.settings.train.compile and on_gpu
        if self.precision == "fp8":
            use_fp8(self.model.h)
        if self.compiled:
            self.model.compile_blocks()
        self.ddp = DistributedDataParallel(self.stage.objective(self.model), gradient_as_bucket_view=True)
        dealt = self.stage.round_robin
        self.reducer = TreeReducer(self.ddp, self.accumulation, self.settings.train.grad_reduce_dtype, dealt)
        self.numbers = micro_batch_numbers(self.ranks.rank, self.ranks.world, self.accumulation, dealt)
        self.slow_peers = SlowPeers(self.ranks.world)
        self.only_batch: list[Any] = []
        self.step_seconds = 0.0
        self.after_first_step: Callable[[], None] | None = None

    def run(self, first_step: int, measured: Collection[str] = ()) -> tuple[int, Notice | None]:
        """Train up to the last step or until asked to leave. Returns the step reached, which is saved, and why.

        `measured` are the kinds of metrics that there are of `first_step`; of what is due there the rest is measured.
        """
        step = first_step
        if step == 0 and self.stage.measures_start:
            with contextlib.suppress(Abandoned):  # the exchange below says why
                self.looks.measure(step)
        elif step > 0 and not self.is_last(step):
            self.looks(step, measured)
        while True:
            self.record.switch("data_wait")
            started = time.monotonic()
            is_last = self.is_last(step)
            fetched = [] if is_last else self._fetch()
            notice, save = self._exchange(step, fetched)
            waited = time.monotonic() - started
            if step > first_step:
                self._save(step, save, last=notice is not None or is_last)
            elif is_last:
                log.info("the run has reached its last step, %d, before", step)
            if is_last:
                self._check_overfit(step)
                if not self.looks(step, is_last=True):
                    return step, self._why_to_leave(step)
                return step, None
            if notice:
                return step, notice
            if step > first_step and not self.looks(step):
                return step, self._leave_evaluation(step)
            self.record.switch("compile" if self.compiled and step == first_step else "train")
            if step == first_step:
                self.reducer.settle(lambda batch=fetched[0]: self._loss(batch))
            self._step(step + 1, fetched, waited)
            step += 1
            if step == first_step + 1:
                stop.allow(stop.own_seconds(), self._last_words)
                self.record.first_step(step, self.step_seconds - waited)
                if self.after_first_step:
                    threading.Thread(target=self.after_first_step, name="after first step", daemon=True).start()

    def is_last(self, step: int) -> bool:
        """Whether the run ends after `step`, on all ranks alike."""
        return step == self.settings.train.steps or is_overfitted(self.settings.train, self.last_loss)

    def _fetch(self) -> list[Any] | LauncherError:
        """This rank's micro-batches of the next step, or why there are none; none when it is to leave."""
        if self.only_batch:
            return self.only_batch
        try:
            fetched = [next(self.batches) for _ in range(self.accumulation)]
        except Abandoned:
            return []
        except LauncherError as error:
            return error
        if self.settings.train.overfit:
            self.only_batch = fetched
        return fetched

    def _exchange(self, step: int, fetched: list[Any] | LauncherError) -> tuple[Notice | None, bool]:
        """All ranks learn what any of them knows: (why to leave, whether to save). Raises if a rank failed.

        Data that cannot be read does not keep the ranks from saving before they leave.
        """
        failure = self.saver.taken_over
        no_data = fetched if isinstance(fetched, LauncherError) else None
        save = False
        if self.ranks.is_main:
            if self.cap.reached(self.step_seconds, self.saver.seconds()):
                self.requests.ask_to_leave("cap", self.cap.describe())
            save = self.saver.cadence.due(step, self.step_seconds) and not self.saver.busy
        wish = self.requests.take_save()
        if wish:
            log.warning("saving now: %s", wish)
        leave = self.requests.leave
        kind = KINDS.index(leave.kind) + 1 if leave else 0
        mine = [failure is not None, no_data is not None, kind, stop.is_hurried(), save or wish is not None]
        failed, without_data, kinds, hurried, saves = gather_numbers(mine, self.ranks).T
        if failed.any() or (without_data.any() and not kinds.any()):
            raise failure or no_data or PeerFailed()
        if kinds.any():
            asked = int(kinds.argmax())
            leave = leave or Notice(KINDS[int(kinds[asked]) - 1], f"told by rank {asked}")
            self.requests.ask_to_leave(leave.kind, leave.detail)
            if hurried.any():
                stop.ask(leave.detail)
            return leave, True
        return None, bool(saves.any())

    def _why_to_leave(self, step: int) -> Notice:
        """When a rank has given up an evaluation because it is to leave."""
        notice, _ = self._exchange(step, [])
        assert notice is not None
        return notice

    def _leave_evaluation(self, step: int) -> Notice:
        """Save what was being evaluated, unless that is done already. Returns why to leave."""
        notice = self._why_to_leave(step)
        with self.record.phase("checkpoint"):
            if not on_main(lambda: self.saver.has(step), self.ranks):
                self.saver.begin(step, self._state(step))
            self.saver.finish(step)
        log.info("step %d is saved", step)
        return notice

    def _last_words(self) -> str:
        """When the time to leave is over."""
        newest = self.saver.last_step
        stored = f"the newest stored step is {newest}" if newest else "no step is stored"
        return f"the time to save is over: {stored}, and what was done since is lost; the same command goes on there"

    def _save(self, step: int, due: bool, last: bool) -> None:
        """Begin a checkpoint if one is due; the last one of a segment is waited for."""
        if not (due or last):
            return
        with self.record.phase("checkpoint"):
            self.saver.begin(step, self._state(step))
            if last:
                self.saver.finish(step)
                log.info("step %d is saved", step)

    def _step(self, step: int, micro_batches: list[Any], waited_seconds: float) -> None:
        """One optimizer step. Raises TrainingError before the weights change if a number is not finite."""
        settings = self.settings
        train = settings.train
        started = time.monotonic()
        micro_batches_in_all = self.accumulation * self.ranks.world
        norms = StepNorms(self.model) if train.norms_every and step % train.norms_every == 0 else None
        losses = []
        clock = ForwardClock(self.ranks.device)
        self.reducer.reset()
        for index, (number, micro_batch_size) in enumerate(zip(self.numbers, micro_batches, strict=True)):
            # Whatever is random in a forward pass depends on the micro-batch, not on who computes it.
            torch.manual_seed(derive_key(train.seed, step, number))
            with self.reducer.context(index):
                with clock:
                    loss = self._loss(micro_batch_size)
                (loss / micro_batches_in_all).backward()
            losses.append(loss.detach())
            self.reducer.micro_batch_done(index)
        clip = settings.optimizer.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        mine = torch.stack(losses).double().cpu()
        everyones = gather_numbers(torch.cat([mine, torch.tensor([clock.seconds()], dtype=mine.dtype)]), self.ranks)
        losses_of_ranks, forward_seconds = everyones[:, :-1], everyones[:, -1]
        self._check_finite(step, losses_of_ranks, float(norm))
        factor = rate_factor(step, train.steps, settings.optimizer)
        gradient_norms = norms.gradients() if norms else {}
        self.optimizer.step(factor)
        self.record.step_done(step)
        seconds = time.monotonic() - started + waited_seconds
        self.step_seconds = seconds
        # An exact sum, so that its bits do not depend on who computed which.
        self.last_loss = math.fsum(losses_of_ranks.flatten().tolist()) / losses_of_ranks.numel()
        self.report.step(step, self.last_loss, factor * settings.optimizer.lr, float(norm), seconds, waited_seconds)
        if norms:
            self.report.metric("norms", {"step": step, "gradients": gradient_norms, **norms.finish()})
        for rank, times in self.slow_peers.look(forward_seconds.tolist()) if self.ranks.world > 1 else []:
            self.record.mark("slow_rank", rank=rank, times=times)
            log.warning(
                "rank %d computes %.2f times as long as the median rank, and all wait for it: its GPU may throttle or "
                "be damaged; look at nvidia-smi -q -d PERFORMANCE on its node, or take another machine",
                rank,
                times,
            )

    def _loss(self, micro_batch_size: Any) -> torch.Tensor:
        with autocast(self.ranks.device, self.precision):
            return self.ddp(micro_batch_size)

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

    def _check_overfit(self, step: int) -> None:
        train = self.settings.train
        if not train.overfit or self.last_loss is None:
            return
        bound = f"train.overfit_max_loss = {train.overfit_max_loss:g}"
        if not is_overfitted(self.settings.train, self.last_loss):
            raise TrainingError(
                f"step {step}: with one micro-batch repeated the loss is {self.last_loss:.4f}, not below {bound}; "
                "if it was still falling raise train.steps, else look at optimizer.lr and at what was changed in the "
                "model"
            )
        log.info("step %d: the micro-batch is learned by heart, its loss %.4f is below %s", step, self.last_loss, bound)

    def _state(self, step: int) -> dict:
        """What a checkpoint holds besides tensors. Random numbers need no state: they are a function of the step."""
        # Whether a run that learns one micro-batch has ended depends on it.
        loss = {"loss": self.last_loss} if self.settings.train.overfit else {}
        return {
            "step": step,
            **loss,
            "tokens": step * self.settings.batch.tokens_per_step,
            "rng": {"rule": "seeded per micro-batch from (train.seed, step, index)", "seed": self.settings.train.seed},
            "config": self.stage.config,
            "data_fingerprint": self.stage.fingerprint,
            "torch": torch.__version__,
            **self.stage.state(),
        }


def is_overfitted(train: TrainLoopConfig, loss: float | None) -> bool:
    """Whether a run with `train.overfit` has reached its goal with this loss."""
    return train.overfit and loss is not None and loss < train.overfit_max_loss


class ForwardClock:
    """Adds up the time of forward passes, without making the CPU wait for a GPU."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list = []

    def __enter__(self) -> None:
        self._marks.append(self._mark())

    def __exit__(self, *_: object) -> None:
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """Call after the device has finished what was measured."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self._on_gpu:
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3
        return sum(end - begin for begin, end in pairs)

    def _mark(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
