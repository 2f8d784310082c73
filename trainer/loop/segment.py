"""Runs one segment of a run: from joining the ranks to the exit code, the same for every stage.

A segment is one machine's part of a run. A run that is started again with the same settings continues from its newest
complete checkpoint, on any number of ranks.

After a resume, a run computes:

    CPU:    the same bits as without the interruption, on CPUs of one kind with the same number of threads per rank;
    CUDA:   the same bits on GPUs of one kind if train.deterministic is true (the default), else equal up to rounding.

On CUDA, torch.use_deterministic_algorithms gives the guarantee. A training step uses no operation that torch refuses in
this mode (tests/test_determinism.py). The following is from torch's documentation and source, and was not measured.
Flash and memory-efficient attention have deterministic backward passes. cuDNN attention has none and is not used.
FlexAttention needs no atomics for the gradients of queries, keys and values. scatter_add and index_put sort their
indices. Inductor chooses reductions by rule instead of by timing.
"""

import functools
import logging
import os
import shlex
import time
from collections.abc import Callable, MutableMapping

import torch

from core import secrets, stop, storage
from core.cores import usable_cores
from core.data.vocabulary import FILE_NAME as VOCABULARY_FILE
from core.errors import ConfigError, LauncherError, one_line
from core.exit_codes import CAPPED, FAILED, NO_STORAGE, OK, PREEMPTED, tell_launcher
from core.run.cap import RESTARTS, restarts_too_dear
from core.run.course import kept_steps
from core.run.folder import RunFolder
from core.run.machine import machine_from_environment
from core.run.segment import Opening, SegmentLog, open_segment
from core.settings.spot import too_few_checkpoints
from core.settings.training import TrainingConfig, TrainLoopConfig
from trainer.checkpoint import layout
from trainer.checkpoint.early import EarlyFetch
from trainer.checkpoint.load import Restored, load_newest
from trainer.checkpoint.save import Saver
from trainer.distributed import process_group
from trainer.distributed.process_group import Ranks, on_main
from trainer.loop.anneal import NOT_ANNEALED, Annealer, describe_end
from trainer.loop.course import open_course
from trainer.loop.evaluation import TrainingEvaluator, measured_before
from trainer.loop.inputs import open_later_inputs
from trainer.loop.loop import Loop
from trainer.loop.outlook import Outlook
from trainer.loop.report import StepReporter
from trainer.loop.requests import SpotWatch, StopRequest, StopRequests
from trainer.model.kernels import use_attention
from trainer.optim.optimizer import BlockOptimizer
from trainer.optim.schedule import Schedule
from trainer.stages.stage import Stage

log = logging.getLogger("train")

MEET_SECONDS = 60.0
CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# With either of these values, cuBLAS computes the same bits each time. The first value is faster and takes 32 MB.
EXACT_WORKSPACES = (":4096:8", ":16:8")

StageClass = Callable[[TrainingConfig, Ranks], Stage]


def run_segment(stage_class: StageClass, settings: TrainingConfig, fetched: EarlyFetch | None = None) -> int:
    """Join the other ranks and train. Returns the exit code.

    `fetched` is the early fetch of the newest checkpoint, which began before torch was imported.
    """
    stop.listen()  # needed if the caller is not one of the main programs; a second call does nothing
    ranks = None
    try:
        ranks = process_group.start(settings.train.device)
        stop.on_leaving(functools.partial(process_group.say_left, ranks))
        return _run(stage_class, settings, ranks, fetched)
    except Exception as error:
        if ranks and process_group.has_left(ranks):
            log.warning("another rank was asked to stop and has left: %s", one_line(error))
            return _tell(PREEMPTED, ranks)
        if isinstance(error, process_group.PeerFailed):
            return FAILED
        error = determinism_refusal(error) or error
        if ranks and isinstance(error, LauncherError) and not process_group.is_first_to_say(str(error), ranks):
            time.sleep(process_group.SAYING_SECONDS)  # else torchrun could kill the rank that reports the error
            return FAILED
        raise error
    finally:
        process_group.stop()


def _run(stage_class: StageClass, settings: TrainingConfig, ranks: Ranks, fetched: EarlyFetch | None) -> int:
    # 1. From here on, a signal is a request to stop. The watch of the machine's provider and of the cap starts below.
    requests = StopRequests(hurry=stop.ask)
    stop.inform(requests.on_signal)

    def is_leaving() -> bool:
        return requests.stop is not None

    # 2. Torch: precision, threads, deterministic kernels.
    set_up_torch(settings.train, ranks)

    # 3. The stage reads its data and determines batch size and sequence length. The inputs of later evaluations are
    # checked too, before anything is written.
    stage = stage_class(settings, ranks)
    settings = stage.settings
    hellaswag_rows = open_later_inputs(stage, ranks)
    changes = on_main(lambda: open_course(stage), ranks)
    stage.schedule = Schedule(settings.optimizer, settings.train.steps, changes)

    # 4. The run and its next segment: run.json, the ledger, metrics, and the dollars spent so far.
    segment = open_log(stage, ranks)
    stop.on_leaving(functools.partial(_close_unsaved, segment, requests))
    spot = SpotWatch(requests, os.environ) if ranks.local_rank == 0 else None
    saver = reporter = annealer = None
    try:
        spent = on_main(lambda: _spent(segment, settings), ranks)
        if spent:  # earlier segments have spent the cap, so this segment ends before its machine costs more
            saved = on_main(lambda: max(layout.complete_steps(settings.run.url), default=0), ranks)
            is_over = saved >= stage.steps  # a launcher that loses the machine of a finished run starts another one
            return _leave_together(_close(stage, segment, saved, None if is_over else StopRequest("cap", spent)), ranks)

        # 5. Fill the model and the optimizer from the newest checkpoint, if any. They hold the same bits on every rank.
        model = stage.build()
        model.to_empty(device=ranks.device)
        optimizer = BlockOptimizer(model, settings.optimizer, ranks.rank, ranks.world)
        with segment.phase("restore"):
            restored = load_newest(settings.run.url, optimizer, ranks, fetched)
            first_step = restored.step if restored else 0
            optimizer.set_step(first_step)
            stage.fill(model, restored)
        _mark_restored(segment, restored)
        log.info("%s\n%s", stage.describe(model), optimizer.describe())
        log.info("%s", describe_determinism(settings.train, ranks, stage.lengths_vary))

        # 6. Micro-batches are read in the background while the rest is set up.
        batches = stage.batches(first_step)
        batches.is_leaving = is_leaving

        # 7. Checkpoints, reports and evaluations.
        saver = Saver(
            settings.run.url,
            segment.number,
            ranks,
            settings.checkpoint,
            segment.ledger,
            segment.flush,
            optimizer.blocks,
            first_step,
            kept=lambda: kept_steps(stage.schedule.changes),
        )
        reporter = StepReporter(stage, ranks, segment, first_step)
        evaluator = TrainingEvaluator(stage, ranks, model, segment, reporter, hellaswag_rows, is_leaving)

        annealer = Annealer(stage, segment, saver, requests, evaluator, first_step)
        if ranks.is_main:
            reporter.outlook = outlook = Outlook(stage, annealer.expected, first_step)
            annealer.is_target_reached = lambda: outlook.target_reached

        # 8. Train: trainer/loop/loop.py.
        loop = Loop(
            stage=stage,
            ranks=ranks,
            model=model,
            optimizer=optimizer,
            batches=batches,
            saver=saver,
            segment=segment,
            requests=requests,
            evaluator=evaluator,
            reporter=reporter,
            annealer=annealer,
            last_loss=restored.state.get("loss") if restored else None,
        )
        measured = {}
        if first_step > 0 and not loop.is_last(first_step) and evaluator.due(first_step):
            measured = on_main(lambda: measured_before(segment, restored), ranks)
        evaluator.recall(restored.state.get("best") if restored else None, first_step, measured)
        reached, request = loop.run(first_step, measured)

        # 9. Wait for the checkpoint in flight, close the segment with its reason, and end on all ranks together.
        saver.wait()
        if request and request.kind == "storage":
            stored = on_main(lambda: saver.last_step, ranks)
            code = _close_without_store(stage, segment, reached, stored, request)
        else:
            code = _close(stage, segment, reached, request, reporter.outlook)
        _leave_together(code, ranks)
        batches.close()
        return code
    except BaseException as error:
        if saver:
            saver.wait()  # wait, because a checkpoint in flight can still be completed
        ended = "preempted" if stop.is_certain() else "failed"
        segment.close("interrupted" if isinstance(error, KeyboardInterrupt) else ended, None, error=one_line(error))
        raise
    finally:
        if reporter:
            reporter.close()
        for watch in (spot, annealer):
            if watch:
                watch.close()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()


def open_log(stage: Stage, ranks: Ranks) -> SegmentLog:
    """Rank 0 opens the run and its next segment. Other ranks get a log that writes nothing.

    Raises RunError or ConfigError on rank 0, PeerFailed on the others.
    """
    opened: list[SegmentLog] = []

    def open_on_main() -> int:
        settings = stage.settings
        if machine_from_environment(None, 0).spot and (problem := too_few_checkpoints(settings)):
            raise ConfigError(problem)
        gpu = torch.cuda.get_device_name() if ranks.device.type == "cuda" else None
        opening = Opening(
            stage=stage.name,
            config=stage.config,
            identity=stage.identity,
            fingerprint=stage.fingerprint,
            packages=("torch", "numpy", "obstore"),
            program={"ranks": ranks.world},
            gpu=gpu,
            gpus_per_node=ranks.local_world if gpu else 0,
            max_usd=settings.run.max_usd,
            max_hours=settings.run.max_hours,
            shutdown_seconds=settings.run.shutdown_reserve_seconds,
            has_metrics=True,
        )
        segment = open_segment(RunFolder(settings.run.url), opening)
        opened.append(segment)
        if segment.is_new_run:
            keep_vocabulary(stage)
        what = "new run at" if segment.is_new_run else "continuing"
        log.info("%s %s, segment %d", what, settings.run.url, segment.number)
        return segment.number

    number = on_main(open_on_main, ranks)
    return opened[0] if opened else SegmentLog(number=number)


def _spent(segment: SegmentLog, settings: TrainingConfig) -> str:
    """On rank 0: a sentence about the dollar limit that earlier segments have reached, or "" if none is reached."""
    if segment.cap.reached(0.0, 0.0):
        return segment.cap.describe()
    return restarts_too_dear(RunFolder(settings.run.url), settings.run.max_restart_usd, without=segment.number)


def keep_vocabulary(stage: Stage) -> None:
    """Store the vocabulary with the run, so that its weights can be used without its data. A failure is only logged."""
    try:
        storage.write_bytes(storage.join(stage.settings.run.url, VOCABULARY_FILE), stage.read_vocabulary().stored)
    except LauncherError as error:
        log.info("the run keeps no copy of the vocabulary: %s", error)


def _mark_restored(segment: SegmentLog, restored: Restored | None) -> None:
    """Record the step at which this segment starts."""
    step = restored.step if restored else 0
    skipped = [{"name": name, "why": why} for name, why in restored.skipped] if restored else []
    segment.mark("restored", step=step, skipped=skipped)
    log.info("resumed from step %d" if restored else "starting at step %d", step)


# --- the end of a segment ---------------------------------------------------------------------------------------


def _close(
    stage: Stage, segment: SegmentLog, reached: int, request: StopRequest | None, outlook: Outlook | None = None
) -> int:
    """Close the segment with the reason why it ends at step `reached`. Returns the exit code."""
    annealed = describe_end(stage.schedule, reached, stage.settings.run.url)
    if request is None:
        stop.settle(OK)
        segment.close("finished", reached)
        if segment.ledger:
            for line in filter(None, (annealed, outlook.compared(segment.cap.spent_usd()) if outlook else "")):
                log.info("%s", line)
        url = shlex.quote(stage.settings.run.url)
        log.info("finished; next: python cost_report.py %s, or python -m trainer.chat %s", url, url)
        return OK
    segment.mark("notice", kind=request.kind, detail=request.detail)
    if request.kind == "cap":
        stop.settle(CAPPED)
        segment.mark("cap", limit_usd=stage.settings.run.max_usd, spent_usd=segment.cap and segment.cap.spent_usd())
        segment.close("cap", reached)
        log.warning(
            "stopped by the cap at step %d of %d, which is saved: %s%s; to continue, raise %s and repeat the command",
            reached,
            stage.steps,
            request.detail,
            f"; {annealed}" if annealed and NOT_ANNEALED not in request.detail else "",
            RESTARTS if RESTARTS in request.detail else segment.cap.variable() if segment.cap else "MAX_USD",
        )
        return CAPPED
    segment.close("preempted", reached)
    log.warning("left at step %d of %d (%s: %s)", reached, stage.steps, request.kind, request.detail)
    return PREEMPTED


def _close_without_store(stage: Stage, segment: SegmentLog, reached: int, stored: int, request: StopRequest) -> int:
    """Close a segment that ends at step `reached` because its store fails. `stored` is the newest stored step."""
    stop.settle(NO_STORAGE)
    segment.mark("notice", kind=request.kind, detail=secrets.scrub(request.detail))
    if stored == reached:
        lost = "that step is stored after all, and nothing is lost"
    else:
        newest = f"the newest stored step is {stored}" if stored else "no step is stored"
        lost = f"{newest}, and the work of {reached - stored} steps is lost"
    if segment.ledger:
        said = f"stopped at step {reached} of {stage.steps}, because {request.detail}; {lost}"
        log.error("%s; repair the store, then the same command continues from there", said)
    segment.close("storage", reached)
    return NO_STORAGE


def _close_unsaved(segment: SegmentLog, requests: StopRequests) -> None:
    """Close the segment of a process that must end without saving."""
    if requests.stop:
        segment.mark("notice", kind=requests.stop.kind, detail=requests.stop.detail)
    segment.close("preempted", None)


def _leave_together(code: int, ranks: Ranks) -> int:
    """Report the exit code and wait for the other ranks. torchrun would kill them 30 s after this rank has failed."""
    _tell(code, ranks)
    if code != OK:
        process_group.meet(ranks, "left", MEET_SECONDS)
    return code


def _tell(code: int, ranks: Ranks) -> int:
    """Report the exit code to the launcher, once per node. Returns it."""
    if ranks.local_rank == 0:
        tell_launcher(code)
    return code


# --- torch ------------------------------------------------------------------------------------------------------


def set_up_torch(train: TrainLoopConfig, ranks: Ranks) -> None:
    """Configure torch before the first kernel of the process. Raises ConfigError."""
    torch.set_float32_matmul_precision("high")  # use TF32 for the products that stay in float32
    if ranks.device.type == "cpu":
        torch.set_num_threads(train.cpu_threads or max(1, usable_cores() // ranks.local_world))
    set_up_determinism(train, ranks.device, os.environ)
    use_attention(train.attention, ranks.device, train.deterministic)


def set_up_determinism(train: TrainLoopConfig, device: torch.device, environment: MutableMapping[str, str]) -> None:
    """Choose deterministic kernels on CUDA. Raises ConfigError if a variable contradicts train.deterministic."""
    if device.type != "cuda" or not train.deterministic:
        return
    # cuBLAS reads this variable when it starts. If it is not set, torch refuses matrix products in deterministic mode.
    workspace = environment.setdefault(CUBLAS_WORKSPACE, EXACT_WORKSPACES[0])
    if workspace not in EXACT_WORKSPACES:
        raise ConfigError(
            f"environment variable {CUBLAS_WORKSPACE} is {workspace!r}, with which cuBLAS may round differently each "
            f"time, but train.deterministic is true; unset it, set it to {EXACT_WORKSPACES[0]}, or set "
            "train.deterministic=false"
        )
    torch.use_deterministic_algorithms(True)
    # torch would fill new tensors, which costs memory bandwidth. No tensor is read here before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False


def describe_determinism(train: TrainLoopConfig, ranks: Ranks, lengths_vary: bool) -> str:
    """A sentence for the log on how exact a resume is. `lengths_vary`: whether micro-batches differ in length."""
    if ranks.device.type != "cuda":
        where = f"on CPUs of this kind, with {torch.get_num_threads()} threads per rank"
    elif not train.deterministic:
        return "a resume is exact up to rounding: train.deterministic is false"
    elif lengths_vary and train.compile:
        return (
            "a resume is exact up to rounding: rows vary in length, and compiled kernels depend on the lengths seen "
            "earlier; set train.compile=false for the same bits"
        )
    else:
        where = "on GPUs of this kind, by deterministic kernels"
    same_ranks = (
        ", with the same number of ranks (train.grad_reduce_dtype is bf16)" if train.grad_reduce_dtype == "bf16" else ""
    )
    return f"a resume is exact to the bit {where}{same_ranks}"


def determinism_refusal(error: Exception) -> ConfigError | None:
    """A ConfigError with a remedy if `error` says that torch has no deterministic form of a kernel, else None."""
    if not isinstance(error, RuntimeError) or "does not have a deterministic implementation" not in str(error):
        return None
    kernel = str(error).partition(" does not have")[0]
    return ConfigError(
        f"train.deterministic is true, but torch has no deterministic form of {kernel}; set train.deterministic=false "
        "in a new run, whose resume is then exact up to rounding"
    )
