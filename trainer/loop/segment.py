"""One segment of a run: from opening the run to its end, the same for every stage of training.

A segment is one machine's stretch of a run. Started again with the same settings a run continues from its newest
complete checkpoint, on any number of ranks.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from core import stop
from core.errors import one_line
from core.exit_codes import CAPPED, FAILED, OK, PREEMPTED, tell_launcher
from core.settings.training import TrainingConfig
from trainer.checkpoint import layout
from trainer.checkpoint.early import EarlyFetch
from trainer.checkpoint.load import load_newest
from trainer.checkpoint.save import Saver
from trainer.distributed import process_group
from trainer.distributed.process_group import Ranks, on_main
from trainer.loop import compile_cache, determinism
from trainer.loop.evaluation import Looks
from trainer.loop.loop import Loop
from trainer.loop.record import Record, open_record
from trainer.loop.report import Report
from trainer.loop.requests import Notice, Requests
from trainer.loop.spot import SpotWatch
from trainer.optim.optimizer import UnitOptimizer
from trainer.stages.stage import Stage

log = logging.getLogger("train")

MEET_SECONDS = 60.0


def run_segment(
    make: Callable[[TrainingConfig, Ranks], Stage], settings: TrainingConfig, fetched: EarlyFetch | None = None
) -> int:
    """Join the other ranks, make the stage, run it. Returns the exit code.

    `fetched` holds the files of the newest checkpoint whose fetch began before torch was imported.
    """
    stop.listen()  # already done by our entries
    ranks = None
    try:
        ranks = process_group.start(settings.train.device)
        stop.on_leaving(functools.partial(process_group.say_left, ranks))
        return run(make, settings, ranks, fetched)
    except Exception as error:
        if ranks and process_group.has_left(ranks):
            log.warning("another rank was asked to stop and has left: %s", one_line(error))
            return tell(PREEMPTED, ranks)
        if isinstance(error, process_group.PeerFailed):
            return FAILED
        if refusal := determinism.refusal(error):
            raise refusal from error
        raise
    finally:
        process_group.stop()


def run(
    make: Callable[[TrainingConfig, Ranks], Stage], settings: TrainingConfig, ranks: Ranks, fetched: EarlyFetch | None
) -> int:
    requests = Requests(hurry=stop.ask)
    stop.inform(requests.heard)

    def is_leaving() -> bool:
        return requests.leave is not None

    set_up_torch(settings.train, ranks)
    determinism.set_up(settings.train, ranks.device)

    # 1. The data and the run: checked before anything is written.
    stage = make(settings, ranks)
    settings = stage.settings
    record = open_record(stage, ranks)
    stop.on_leaving(functools.partial(close_books, record, requests))
    spot = SpotWatch(requests, os.environ) if ranks.local_rank == 0 else None
    saver = report = None
    try:
        spent = on_main(lambda: record.cap.describe() if record.cap.reached(0.0, 0.0) else "", ranks)
        if spent:  # by the machines before: this one shall cost as little as it can
            saved = on_main(lambda: max(layout.complete_steps(settings.run.url), default=0), ranks)
            return leave_together(leave(settings, record, saved, Notice("cap", spent)), ranks)

        # 2. Model and optimizer, from the newest checkpoint or the start: the same bits on every rank.
        model = stage.build()
        model.to_empty(device=ranks.device)
        optimizer = UnitOptimizer(model, settings.optimizer, ranks.rank, ranks.world)
        with record.phase("restore"):
            restored = load_newest(settings.run.url, optimizer, ranks, fetched)
            first_step = restored.step if restored else 0
            optimizer.set_step(first_step)
            stage.fill(model, restored)
        record.restored(restored)
        log.info("%s", stage.describe(model))
        log.info("%s", determinism.describe(settings.train, ranks, stage.lengths_vary))

        # 3. Batches start to arrive while the rest is made ready.
        batches = stage.batches(first_step)
        batches.is_leaving = is_leaving

        # 4. Train.
        saver = Saver(
            settings.run.url,
            record.number,
            ranks,
            settings.checkpoint,
            record.ledger,
            record.flush,
            optimizer.blocks,
            first_step,
        )
        report = Report(stage, ranks, record)
        loop = Loop(
            stage=stage,
            ranks=ranks,
            model=model,
            optimizer=optimizer,
            batches=batches,
            saver=saver,
            record=record,
            requests=requests,
            cap=record.cap,
            looks=Looks(stage, ranks, model, record, report, is_leaving),
            report=report,
            last_loss=restored.state.get("loss") if restored else None,
        )
        measured: set[str] = set()
        if first_step > 0 and not loop.is_last(first_step) and loop.looks.due(first_step):
            measured = on_main(lambda: record.measured(restored), ranks)
        if loop.compiled and settings.train.compile_cache:
            kernels = compile_cache.uri_of(
                settings.run.url, stage.model, settings.batch.micro_batch_size, torch.cuda.get_device_name()
            )
            with record.phase("compile"):
                compile_cache.load(kernels)
            loop.after_first_step = functools.partial(compile_cache.save, kernels) if ranks.is_main else None
        reached, notice = loop.run(first_step, measured)
        saver.wait()
        code = leave_together(leave(settings, record, reached, notice), ranks)
        batches.close()
        return code
    except BaseException as error:
        if saver:
            saver.wait()  # what is on its way to storage is still good
        ended = "preempted" if stop.is_certain() else "failed"
        record.close("interrupted" if isinstance(error, KeyboardInterrupt) else ended, None, error=one_line(error))
        raise
    finally:
        if report:
            report.close()
        if spot:
            spot.close()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()


def leave_together(code: int, ranks: Ranks) -> int:
    """The exit code, once all ranks come to it: torchrun ends what is left 30 s after the first rank has failed."""
    tell(code, ranks)
    if code != OK:
        process_group.meet(ranks, "left", MEET_SECONDS)
    return code


def tell(code: int, ranks: Ranks) -> int:
    """The exit code, also for the launcher of each node."""
    if ranks.local_rank == 0:
        tell_launcher(code)
    return code


def close_books(record: Record, requests: Requests) -> None:
    """Where nothing was saved since the newest checkpoint, and nothing will be."""
    if requests.leave:
        record.mark("notice", kind=requests.leave.kind, detail=requests.leave.detail)
    record.close("preempted", None)


def leave(settings: TrainingConfig, record: Record, reached: int, notice) -> int:
    """Close the books and say how to go on. Returns the exit code."""
    if notice is None:
        stop.settle(OK)
        record.close("finished", reached)
        return OK
    record.mark("notice", kind=notice.kind, detail=notice.detail)
    if notice.kind == "cap":
        stop.settle(CAPPED)
        record.mark("cap", limit_usd=settings.run.max_usd, spent_usd=record.cap and record.cap.spent_usd())
        record.close("cap", reached)
        log.warning(
            "stopped by the cap at step %d of %d, which is saved: %s; go on with a larger MAX_USD and the same command",
            reached,
            settings.train.steps,
            notice.detail,
        )
        return CAPPED
    record.close("preempted", reached)
    log.warning("left at step %d of %d (%s: %s)", reached, settings.train.steps, notice.kind, notice.detail)
    return PREEMPTED


def set_up_torch(train: Any, ranks: Ranks) -> None:
    torch.set_float32_matmul_precision("high")  # TF32 where something stays in fp32
    if ranks.device.type == "cpu":
        torch.set_num_threads(train.cpu_threads or max(1, (os.cpu_count() or 1) // ranks.local_world))
