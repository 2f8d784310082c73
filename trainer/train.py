"""Pretrain: stream token shards, train with DDP, keep checkpoints, metrics and the ledger in object storage.

    torchrun --nproc-per-node=8 -m trainer.train trainer/configs/gpt2-124m.yaml --run.url=s3://bucket/runs/first

Reads data.url (manifest and shards, by data_prep). Writes below run.url: run.json, checkpoints/, metrics/, ledger/.
Started again with the same settings it continues from the newest complete checkpoint, on any number of ranks.
Exit codes: 0 only when the run reached its last step, 33 when it was asked to stop and saved, else 1.
"""

import functools
import logging
import os
from pathlib import Path

from core import config, manifest, storage
from core.console import CAPPED, FAILED, OK, PREEMPTED, run_entry, set_up_logging
from core.errors import ObjectNotFound
from core.schema import TrainConfig

log = logging.getLogger("train")
USAGE = "torchrun --nproc-per-node=N -m trainer.train CONFIG.yaml [--section.key=value ...]"


def main(arguments: list[str]) -> int:
    set_up_logging(speaks=os.environ.get("RANK", "0") == "0")
    if {"-h", "--help"} & set(arguments):
        print(config.help_text(TrainConfig, USAGE))
        return OK
    arguments = ["--train.overfit=true" if each == "--overfit" else each for each in arguments]
    settings = config.load(TrainConfig, arguments, os.environ)
    # torch takes seconds to import: a wrong setting should not have to wait for it.
    from trainer import distributed

    try:
        ranks = distributed.start(settings.train.device)
        return run(settings, ranks)
    except distributed.PeerFailed:
        return FAILED
    finally:
        distributed.stop()


def tell_launcher(code: int, is_main: bool) -> None:
    """torchrun exits with 1 whatever its workers say, so the code is also left in EXIT_CODE_FILE, if that is set."""
    path = os.environ.get("EXIT_CODE_FILE")
    if path and is_main:
        Path(path).write_text(f"{code}\n")


def run(settings: TrainConfig, ranks) -> int:
    """One segment, from opening the run to its end."""
    import torch

    from core import sets
    from core.run import read_run
    from core.vocabulary import read as read_vocabulary
    from trainer import compile_cache, fit, plan, precision
    from trainer.checkpoint.load import load_newest
    from trainer.checkpoint.save import Saver
    from trainer.data.cache import ShardCache
    from trainer.data.loader import Batches, TokenSource
    from trainer.distributed import on_main
    from trainer.evals.hellaswag import NAME as HELLASWAG
    from trainer.evals.hellaswag import HellaSwag
    from trainer.evals.looks import Looks
    from trainer.evals.loss import ValidationLoss
    from trainer.loop import Loop
    from trainer.model.gpt import GPT
    from trainer.optim.units import UnitOptimizer
    from trainer.record import Record
    from trainer.report import Report
    from trainer.watch.notice import Requests
    from trainer.watch.spot import SpotWatch

    requests = Requests()
    restore_handlers = requests.listen_to_signals()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        requests.listen_to_parent()
    set_up_torch(settings, ranks)

    # 1. The data and the run: checked before anything is written.
    data = on_main(functools.partial(manifest.read, settings.data.url), ranks)
    plan.check_vocabulary(settings, data)
    numbers = precision.resolve(settings.train.precision, ranks.device)
    earlier = on_main(functools.partial(stored_micro_batch, read_run, settings.run.url), ranks)
    settings = fit.with_micro_batch(settings, earlier, ranks)
    accumulation = plan.accumulation_of(settings, ranks.world)
    record = Record(settings, data.fingerprint, ranks)
    spot = SpotWatch(requests, os.environ) if ranks.local_rank == 0 else None
    saver = report = None
    try:
        # 2. Model and optimizer, from the newest checkpoint or the seed: the same bits on every rank.
        with torch.device("meta"):
            model = GPT(settings.model, settings.train.recompute)
        model.to_empty(device=ranks.device)
        optimizer = UnitOptimizer(model, settings.optimizer, ranks.rank, ranks.world)
        with record.phase("restore"):
            restored = load_newest(settings.run.url, optimizer, ranks)
            first_step = restored.step if restored else 0
            optimizer.set_step(first_step)
            if not restored:
                model.initialise(settings.train.seed)
        record.restored(restored)
        log.info("%s", plan.describe(settings, model, data, accumulation, ranks))

        # 3. Batches start to arrive while the rest is made ready.
        cache_dir = Path(settings.data.cache_dir or default_cache_dir())
        limit_bytes = settings.data.cache_gb * 1e9
        train_cache = ShardCache(settings.data.url, data, "train", cache_dir, limit_bytes)
        length, seed = settings.model.context, settings.train.seed
        batches = Batches(
            TokenSource(train_cache, length, seed, settings.data.shuffle_shards),
            0 if settings.train.overfit else first_step,
            batch=settings.batch.tokens // settings.model.context,
            micro_batch=settings.batch.micro_batch,
            rank=ranks.rank,
            world=ranks.world,
            prefetch=settings.data.prefetch,
            device=ranks.device,
            fetches=ranks.local_rank == 0,
            skip=settings.train.skip_batches,
        )

        def validation() -> ValidationLoss | None:
            if not data.splits["val"].tokens:
                log.warning("%s has no validation tokens, so there is no validation loss", settings.data.url)
                return None
            cache = ShardCache(settings.data.url, data, "val", cache_dir, limit_bytes)
            return ValidationLoss(cache, length, settings.train.eval_tokens, settings.batch.micro_batch, ranks, numbers)

        vocabulary = storage.join(settings.data.url, data.tokenizer.vocab_file)
        encoding = functools.cache(lambda: read_vocabulary(vocabulary).encoding())

        def hellaswag() -> HellaSwag | None:
            items = on_main(functools.partial(sets.read_if_there, settings.data.url, HELLASWAG), ranks)
            if items is None:
                return None
            return HellaSwag(items[: settings.train.hellaswag_items], encoding(), ranks, numbers)

        # 4. Train.
        saver = Saver(
            settings.run.url,
            record.segment,
            ranks,
            settings.checkpoint,
            record.ledger,
            record.flush,
            optimizer.blocks,
        )
        report = Report(settings, ranks, record)
        loop = Loop(
            settings=settings,
            ranks=ranks,
            model=model,
            optimizer=optimizer,
            accumulation=accumulation,
            batches=batches,
            saver=saver,
            record=record,
            requests=requests,
            cap=record.cap,
            looks=Looks(settings, ranks, model, record, report, validation, hellaswag, encoding),
            report=report,
            precision=numbers,
            data_fingerprint=data.fingerprint,
        )
        if loop.compiled and settings.train.compile_cache:
            kernels = compile_cache.uri_of(
                settings.run.url, settings.model, settings.batch.micro_batch, torch.cuda.get_device_name()
            )
            with record.phase("compile"):
                compile_cache.load(kernels)
            loop.after_first_step = functools.partial(compile_cache.save, kernels) if ranks.is_main else None
        reached, notice = loop.run(first_step)
        saver.wait()
        batches.close()
        code = leave(settings, record, reached, notice)
        # While signals are still caught: another rank that is already gone makes torchrun end this one.
        tell_launcher(code, ranks.is_main)
        return code
    except BaseException as error:
        if saver:
            saver.wait()  # what is on its way to storage is still good
        record.close(
            "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", None, error=describe_error(error)
        )
        raise
    finally:
        if report:
            report.close()
        restore_handlers()
        if spot:
            spot.close()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()


def stored_micro_batch(read_run, run_url: str) -> int | None:
    """The micro-batch size that this run's first segment settled on, if there was one."""
    try:
        return read_run(run_url)["config"]["batch"]["micro_batch"]
    except ObjectNotFound:
        return None


def leave(settings: TrainConfig, record, reached: int, notice) -> int:
    """Close the books and say how to go on. Returns the exit code."""
    if notice is None:
        record.close("finished", reached)
        return OK
    record.mark("notice", kind=notice.kind, detail=notice.detail)
    if notice.kind == "cap":
        record.mark("cap", limit_usd=settings.run.max_usd, spent_usd=record.cap.spent_usd() if record.cap else None)
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


def set_up_torch(settings: TrainConfig, ranks) -> None:
    import torch

    torch.set_float32_matmul_precision("high")  # TF32 where something stays in fp32
    if settings.train.deterministic:
        # cuBLAS reads this when it starts; without it torch refuses its products in deterministic mode.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if ranks.device.type == "cpu":
        torch.set_num_threads(settings.train.cpu_threads or max(1, (os.cpu_count() or 1) // ranks.local_world))


def default_cache_dir() -> str:
    import getpass
    import tempfile

    return str(Path(tempfile.gettempdir()) / f"token-shards-{getpass.getuser()}")


def describe_error(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


if __name__ == "__main__":
    run_entry(main)
