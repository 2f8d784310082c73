"""Runs the optimizer steps of one segment. Each round has five parts: fetch, exchange, save, evaluate, step.

Between two steps the ranks exchange failures to read a batch and requests to stop or to save. Then all ranks act alike,
so that no rank waits alone in a collective. A step is saved before it is evaluated, because the evaluation could fail.
A request to stop also ends an evaluation or a wait for data. Before its first step is done, a segment has nothing to
save, so a request to stop ends the process immediately.

The host launches a step and reads its losses and norms only after it has launched the next step, so a GPU always has
work. Before a checkpoint, an evaluation and the end, the host reads the numbers of the newest step without launching
another. If a number of a step is not finite, neither this step nor the step launched after it changes a weight.
"""

import contextlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from core import stop
from core.errors import LauncherError, StorageError, TrainingError
from core.figures import duration
from core.run.folder import RunFolder, continued_elsewhere
from core.run.segment import SegmentLog
from trainer.checkpoint.save import Saver
from trainer.data.loader import skipping
from trainer.data.order import derive_key
from trainer.distributed.process_group import (
    Abandoned,
    PeerFailed,
    Ranks,
    gather_numbers,
    gather_on_device,
    meet,
    on_main,
)
from trainer.loop.anneal import Annealer, as_numbers, from_numbers
from trainer.loop.evaluation import TrainingEvaluator
from trainer.loop.health import DeviceClock, SlowRanks, StepNorms, slow_rank_sentence
from trainer.loop.numbers import Gate, StepNumbers
from trainer.loop.overfit import check_overfit, is_overfitted
from trainer.loop.profile import StepProfiler
from trainer.loop.report import StepReporter
from trainer.loop.requests import KINDS, StopRequest, StopRequests
from trainer.model.gpt import GPT
from trainer.model.precision import autocast, use_fp8
from trainer.optim.optimizer import BlockOptimizer
from trainer.optim.reduce import TreeReducer, clip
from trainer.stages.stage import MicroBatches, Stage

log = logging.getLogger("train")

# Seconds that a single attempt to store may take. They are added to the time limit for storing the last step.
TRY_SECONDS = 300.0
OTHER_RANK = "reported by rank"


@dataclass
class Loop:
    """`run` trains from a restored step to the last step, or until a request to stop."""

    stage: Stage
    ranks: Ranks
    model: GPT
    optimizer: BlockOptimizer
    batches: MicroBatches
    saver: Saver
    segment: SegmentLog
    requests: StopRequests
    evaluator: TrainingEvaluator
    reporter: StepReporter
    annealer: Annealer
    last_loss: float | None = None  # loss of the restored step, if the checkpoint holds the loss
    first_step: int = 0  # the restored step, at which this segment starts

    def __post_init__(self):
        self.settings = self.stage.settings
        self.accumulation = self.stage.accumulation
        self.compiled = self.settings.train.compile and self.ranks.device.type == "cuda"
        if self.stage.precision == "fp8":
            use_fp8(self.model.h)
        if self.compiled:
            self.model.compile_blocks()
        share = 1 / (self.accumulation * self.ranks.world)
        self.ddp = DistributedDataParallel(self.stage.objective(self.model, share), gradient_as_bucket_view=True)
        self.reducer = TreeReducer(
            self.ddp, self.accumulation, self.settings.train.grad_reduce_dtype, self.stage.round_robin
        )
        self.slow_ranks = SlowRanks(self.ranks.world)
        self.repeated: list[Any] = []  # with train.overfit: the micro-batch that every step repeats
        self.gate = Gate(self.ranks.device)
        profiled = self.settings.train.profile
        self.profiler = StepProfiler(profiled, self.settings.run.url, self.segment.number, self.ranks)
        self.unread: StepNumbers | None = None  # the step that was launched last
        self.step_seconds = self.work_seconds = 0.0  # of the step reported last, with and without the wait before it
        self.forward_seconds = 0.0

    def run(self, first_step: int, measured: Collection[str] = ()) -> tuple[int, StopRequest | None]:
        """Returns the step that was reached, which is saved, and the request that ended the run, if any.

        `measured` holds the kinds of evaluation that `first_step` already has. Other kinds that are due run first.
        """
        self.first_step = step = first_step
        if step == 0:
            with contextlib.suppress(Abandoned):  # the exchange below returns the request to stop
                self.evaluator.start()
        elif step > 0 and not self.is_last(step):
            self.evaluator.evaluate(step, measured)
        self._keep_best(step, is_saved=step > 0)
        while True:
            # 1. Fetch this rank's micro-batches of the next step.
            self.segment.switch("data_wait")
            is_last = self.is_last(step)
            waited = DeviceClock(self.ranks.device)
            with waited:
                micro_batches = [] if is_last else self._fetch()
                # 2. Exchange between the ranks: failures, requests to stop, and whether to save.
                request, save = self._exchange(step, micro_batches)
            # 3. Save the previous step if it is due. Wait for the last checkpoint of a segment.
            if request or save or is_last or self.evaluator.due(step):
                with self.segment.phase("train"):
                    self._read()
            if request and request.kind == "storage":
                if step > first_step:
                    self._save_at_last(step, request)
                return step, request
            if step > first_step:
                self._save(step, save, last=request is not None or is_last)
            elif is_last:
                log.info("the run had already reached its last step, %d", step)
            # 4. End here, or evaluate the previous step.
            if is_last:
                check_overfit(step, self.settings.train, self.last_loss)
                if not self.evaluator.evaluate(step, is_last=True):
                    return step, self._stop_request(step)
                return step, None
            if request:
                return step, request
            if step > first_step and not self.evaluator.evaluate(step):
                return step, self._leave_evaluation(step)
            self._keep_best(step, is_saved=save or step == first_step)
            # 5. Take the next step: forward and backward passes, reduction, update.
            self.segment.switch("compile" if self.compiled and step == first_step else "train")
            if step == first_step:
                self.reducer.settle(lambda batch=micro_batches[0]: self._loss(batch))
            self.profiler.before(step + 1)
            self._step(step + 1, micro_batches, waited)
            step += 1
            if self.profiler.ends_with(step):
                self._read()
                self.profiler.finish(step)
            if step == first_step + 1:
                self._read()
                # From now on there is a step to save, so the process gets time to save after a request to stop.
                stop.allow(stop.own_seconds(), self._last_words)
                self._mark_first_step(step, self.work_seconds)
            elif self.settings.train.overfit:
                self._read()  # when overfitting, the loss decides whether this was the last step

    def _step(self, step: int, micro_batches: list[Any], waited: DeviceClock) -> None:
        """Launch a step, then read the numbers of the step before it. Raises TrainingError as `_report` does."""
        before, self.unread = self.unread, self._launch(step, micro_batches, waited)
        if before:
            self._report(before)

    def _launch(self, step: int, micro_batches: list[Any], waited: DeviceClock) -> StepNumbers:
        """Launch one optimizer step without waiting for it. The weights change only if all numbers are finite."""
        train, optimizer, device = self.settings.train, self.settings.optimizer, self.ranks.device
        forward, whole = DeviceClock(device), DeviceClock(device)
        with whole:
            norms = StepNorms(self.model) if train.norms_every and step % train.norms_every == 0 else None

            # 1. Forward and backward pass of each micro-batch. The last backward pass also exchanges the gradients.
            losses = []
            self.reducer.reset()
            for index, (number, micro_batch) in enumerate(zip(self.batches.numbers, micro_batches, strict=True)):
                # Dropout depends on the number of the micro-batch, not on the rank that computes it.
                torch.manual_seed(derive_key(train.seed, step, number))
                with self.reducer.context(index):
                    with forward:
                        loss = self._loss(micro_batch)
                    loss.backward()
                losses.append(loss.detach())
                self.reducer.micro_batch_done(index)

            # 2. Clip the gradients, and check on the device that losses and gradients of all ranks are finite.
            norm = clip(self.reducer.parameters, optimizer.grad_clip)
            numbers = gather_on_device(torch.stack([*losses, norm]), self.ranks)
            found_inf = self.gate.check(numbers)

            # 3. Update the weights.
            if norms:
                norms.gradients()
            factor = self.stage.schedule.factor(step)
            self.optimizer.step(factor, found_inf)
            if norms:
                norms.finish()
        return StepNumbers(step, factor, numbers, forward, waited, whole, norms)

    def _read(self) -> None:
        """Wait for the step that was launched last, and report it."""
        if self.unread:
            unread, self.unread = self.unread, None
            self._report(unread)

    def _report(self, done: StepNumbers) -> None:
        """Wait for a step and report it. Raises TrainingError if a number was not finite."""
        done.wait()
        self._check_finite(done)
        self.segment.step_done(done.step)
        self.last_loss = done.loss()
        self.step_seconds, self.work_seconds, self.forward_seconds = done.all_seconds()
        rate = done.factor * self.settings.optimizer.lr
        self.reporter.step(done.step, self.last_loss, rate, done.norm(), self.step_seconds, done.waited_seconds())
        if done.norms:
            self.reporter.metric("norms", {"step": done.step, **done.norms.read()})

    def _report_slow_ranks(self, forward_seconds: list[float]) -> None:
        """Record each rank that stays slow. All ranks have the same numbers, and only rank 0 logs them."""
        for rank, times in self.slow_ranks.check(forward_seconds):
            self.segment.mark("slow_rank", rank=rank, times=times)
            if self.ranks.is_main:
                log.warning("%s", slow_rank_sentence(rank, times, self.ranks.device.type == "cuda"))

    def _loss(self, micro_batch: Any) -> torch.Tensor:
        with autocast(self.ranks.device, self.stage.precision):
            return self.ddp(micro_batch)

    # --- between two steps --------------------------------------------------------------------------------------

    def is_last(self, step: int) -> bool:
        """Whether the run ends after `step`; the same on all ranks."""
        return step == self.stage.steps or is_overfitted(self.settings.train, self.last_loss)

    def _fetch(self) -> list[Any] | LauncherError:
        """This rank's micro-batches of the next step, or an error of reading. After a request to stop: []."""
        if self.repeated:
            return self.repeated
        try:
            fetched = [next(self.batches) for _ in range(self.accumulation)]
        except Abandoned:
            return []
        except LauncherError as error:
            return error
        if self.settings.train.overfit:
            self.repeated = fetched
        return fetched

    def _exchange(self, step: int, fetched: list[Any] | LauncherError) -> tuple[StopRequest | None, bool]:
        """Exchange requests and failures between all ranks. Returns the request to stop, if any, and whether to save.

        Raises an error if a rank failed. If one rank cannot read its data and another was asked to stop, all ranks save
        and stop. A change of course that rank 0 has decided and stored applies to the next step on all ranks.
        """
        change = self.annealer.decide(step) if self.ranks.is_main else None
        failure = self.saver.taken_over or self.saver.stuck or self.annealer.failure
        no_data = fetched if isinstance(fetched, LauncherError) else None
        save = False
        outage = 60 * self.settings.checkpoint.outage_minutes  # 0 sets no limit
        if outage and isinstance(no_data, StorageError) and step > self.first_step:
            self.requests.request_stop("storage", f"rank {self.ranks.rank} gets no tokens: {no_data}")
        if self.ranks.is_main:
            if outage:
                self._check_outage(outage)
            cap = self.segment.cap
            # On a GPU, two steps end before the next exchange: the step in progress, and the step launched next.
            seconds = self.step_seconds * (2 if self.ranks.device.type == "cuda" else 1)
            if cap.reached(seconds, self.saver.seconds()):
                self.requests.request_stop("cap", cap.describe())
            save = self.saver.cadence.due(step, seconds) and not self.saver.busy
        reason_to_save = self.requests.take_save()
        if reason_to_save:
            log.warning("saving now: %s", reason_to_save)
        request = self.requests.stop
        kind = KINDS.index(request.kind) + 1 if request else 0
        mine = [failure is not None, no_data is not None, kind, stop.is_hurried(), save or reason_to_save is not None]
        everyones = gather_numbers([*mine, self.forward_seconds, *as_numbers(change)], self.ranks)
        failed, without_data, kinds, hurried, saves, forward_seconds, *changed = everyones.T
        decided = change or from_numbers(step, [each[0].item() for each in changed])
        if decided:
            self.stage.schedule.add(decided)
        if failed.any() or (without_data.any() and not kinds.any()):
            raise failure or no_data or PeerFailed()
        if kinds.any():
            # The ranks may have received different requests. All of them choose the kind that is first in KINDS.
            kind = KINDS[int(kinds[kinds > 0].min()) - 1]
            asked = int((kinds == KINDS.index(kind) + 1).nonzero()[0, 0])
            if request is None or request.kind != kind:
                request = StopRequest(kind, f"{OTHER_RANK} {asked}")
            self.requests.request_stop(request.kind, request.detail)
            if hurried.any():
                stop.ask(request.detail)
            return request, True
        if self.ranks.world > 1 and self.forward_seconds:
            self._report_slow_ranks(forward_seconds.tolist())
        self.forward_seconds = 0.0  # reported
        return None, bool(saves.any()) or decided is not None

    def _stop_request(self, step: int) -> StopRequest:
        """The request to stop that ended an evaluation on some rank."""
        request, _ = self._exchange(step, [])
        assert request
        return request

    def _leave_evaluation(self, step: int) -> StopRequest:
        """Save the step whose evaluation was cut off, unless it is saved. Returns the request to stop."""
        request = self._stop_request(step)
        if request.kind == "storage":
            self._save_at_last(step, request)
            return request
        with self.segment.phase("checkpoint"):
            if not on_main(lambda: self.saver.has(step), self.ranks):
                self.saver.begin(step, self._state(step))
            self.saver.finish(step)
        log.info("step %d is saved", step)
        return request

    def _save(self, step: int, due: bool, last: bool) -> None:
        """Begin a checkpoint if one is due. If it is the last checkpoint of the segment, wait until it is complete."""
        if not (due or last):
            return
        with self.segment.phase("checkpoint"):
            self.saver.begin(step, self._state(step))
            if last:
                self.saver.finish(step)
                log.info("step %d is saved", step)

    def _keep_best(self, step: int, is_saved: bool) -> None:
        """Keep the checkpoint of the step with the lowest validation loss so far. If this is `step`, save it first."""
        best = self.evaluator.best
        if best and self.settings.checkpoint.keep_best:
            self.saver.best_step = best[0]
            self._save(step, due=best[0] == step and not is_saved, last=False)

    def _save_at_last(self, step: int, request: StopRequest) -> None:
        """Try for a while to store the last step although the store fails. The segment's end reports the outcome."""
        seconds = 60 * self.settings.checkpoint.last_try_minutes
        if self.ranks.is_main or not request.detail.startswith(OTHER_RANK):
            log.error("%s; training stops, and saving step %d is tried for %s", request.detail, step, duration(seconds))
        with self.segment.phase("checkpoint"):
            self.saver.insist(step, self._state(step), seconds)
            # No collective is used here. It would time out, because the other ranks may store their parts long before
            # rank 0 does.
            meet(self.ranks, f"tried/{step}", seconds + TRY_SECONDS)

    def _check_outage(self, most_seconds: float) -> None:
        seconds, why = max(self.segment.outage(), (self.saver.failing_seconds(), str(self.saver.failure)))
        if seconds >= most_seconds:
            why = f"{self.settings.run.url} has taken nothing for {duration(seconds)} ({why})"
            self.requests.request_stop("storage", why)

    def _state(self, step: int) -> dict:
        """The state that a checkpoint stores besides tensors. Random numbers follow from the step and need no state."""
        # A resumed overfitting run needs the loss to know whether it has ended.
        loss = {"loss": self.last_loss} if self.settings.train.overfit else {}
        return {
            "step": step,
            **loss,
            **({"best": list(self.evaluator.best)} if self.evaluator.best else {}),
            "tokens": step * self.settings.batch.tokens_per_step,
            "rng": {"rule": "seeded per micro-batch from (train.seed, step, index)", "seed": self.settings.train.seed},
            "config": self.stage.config,
            "data_fingerprint": self.stage.fingerprint,
            "torch": torch.__version__,
            **self.stage.state(),
        }

    def _last_words(self) -> str:
        """The sentence for the log if the time to save runs out."""
        newest = self.saver.last_step
        stored = f"the newest stored step is {newest}" if newest else "no step is stored"
        return f"the time to save is over: {stored}, and the work since then is lost; the same command continues there"

    def _mark_first_step(self, step: int, step_seconds: float) -> None:
        """Record the time from the start of the process to the start of its first step."""
        ledger = self.segment.ledger
        if ledger:
            seconds = ledger.now() - ledger.process_started_at - step_seconds
            self.segment.mark("first_step", step=step, seconds=seconds, step_seconds=step_seconds)
            log.info("the first step began %.1f s after the start and took %.1f s", seconds, step_seconds)

    def _check_finite(self, done: StepNumbers) -> None:
        problem = done.problem()
        if not problem:
            return
        self.unread = None  # the step that was launched after this one has changed no weight either
        if not self.ranks.is_main:
            raise PeerFailed  # all ranks have the same numbers, and rank 0 reports them
        self.saver.wait()
        train = self.settings.train
        batch = "" if train.overfit else f"leave its batch out with {skipping(train.skip_steps, done.step)}, or "
        folder, newest = RunFolder(self.settings.run.url), self.saver.last_step
        branch = continued_elsewhere(folder, self.stage.identity) if newest else ""
        raise TrainingError(
            f"step {done.step}: {problem}; the weights were not changed. Start again to retry from "
            f"{f'step {newest}' if newest else 'the beginning'}; if this happens again, {batch}start a new run "
            f"(another run.url) with a lower optimizer.lr{branch}"
        )
