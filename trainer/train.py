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
from core.console import FAILED, OK, PREEMPTED, run_entry, set_up_logging
from core.schema import TrainConfig

log = logging.getLogger("train")
USAGE = "torchrun --nproc-per-node=N -m trainer.train CONFIG.yaml [--section.key=value ...]"


def main(arguments: list[str]) -> int:
    set_up_logging(speaks=os.environ.get("RANK", "0") == "0")
    if {"-h", "--help"} & set(arguments):
        print(config.help_text(TrainConfig, USAGE))
        return OK
    settings = config.load(TrainConfig, arguments, os.environ)
    # torch takes seconds to import: a wrong setting should not have to wait for it.
    from trainer import distributed

    try:
        ranks = distributed.start(settings.train.device)
        code = run(settings, ranks)
        tell_launcher(code, ranks.is_main)
        return code
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

    from core.vocabulary import read as read_vocabulary
    from trainer.checkpoint.load import load_newest
    from trainer.checkpoint.save import Saver
    from trainer.data.loader import Batches, TokenSource
    from trainer.distributed import on_main
    from trainer.evals.loss import ValidationLoss
    from trainer.loop import Loop
    from trainer.model.gpt import GPT
    from trainer.optim import adamw
    from trainer.record import Record
    from trainer.state import TrainState
    from trainer.watch.notice import StopRequest

    stop = StopRequest()
    restore_handlers = stop.listen()
    set_up_torch(settings, ranks)

    # 1. The data and the run: checked before anything is written.
    data = on_main(functools.partial(manifest.read, settings.data.url), ranks)
    check_vocabulary(settings, data)
    accumulation = accumulation_of(settings, ranks.world)
    record = Record(settings, data.fingerprint, ranks)
    try:
        # 2. Model and optimizer, the same bits on every rank, then the newest checkpoint over them.
        model = GPT(settings.model)
        model.initialise(settings.train.seed)
        model.to(ranks.device)
        optimizer = adamw.make(model, settings.optimizer, ranks.device)
        state = TrainState(model, optimizer, ranks.rank, ranks.world)
        with record.phase("restore"):
            restored = load_newest(settings.run.url, state.tensors(), ranks)
            first_step = restored.step if restored else 0
            state.set_step(first_step)
        record.restored(restored)
        log.info("%s", describe(settings, model, data, accumulation, ranks))

        # 3. Batches start to arrive while the rest is made ready.
        cache_dir = Path(settings.data.cache_dir or default_cache_dir())
        sources = functools.partial(TokenSource, settings.data.url, data)
        train_tokens = sources(
            "train",
            cache_dir,
            settings.data.cache_gb * 1e9,
            settings.model.context,
            settings.train.seed,
            settings.data.shuffle_shards,
        )
        batches = Batches(
            train_tokens,
            first_step,
            batch=settings.batch.tokens // settings.model.context,
            micro_batch=settings.batch.micro_batch,
            rank=ranks.rank,
            world=ranks.world,
            prefetch=settings.data.prefetch,
            device=ranks.device,
            fetches=ranks.local_rank == 0,
        )
        val_tokens = sources("val", cache_dir, 0, settings.model.context, settings.train.seed, 1)
        validation = functools.cache(
            lambda: ValidationLoss(
                val_tokens.cache, data, settings.train.eval_tokens, settings.batch.micro_batch, ranks
            )
        )
        vocabulary = storage.join(settings.data.url, data.tokenizer.vocab_file)
        encoding = functools.cache(lambda: read_vocabulary(vocabulary).encoding())

        # 4. Train.
        saver = Saver(settings.run.url, record.segment, ranks, settings.checkpoint.keep, record.ledger, state.blocks)
        loop = Loop(
            settings=settings,
            ranks=ranks,
            model=model,
            optimizer=optimizer,
            accumulation=accumulation,
            batches=batches,
            saver=saver,
            record=record,
            stop=stop,
            validation=validation,
            encoding=encoding,
            data_fingerprint=data.fingerprint,
        )
        reached = loop.run(first_step)
        saver.wait()
        batches.close()
        finished = reached == settings.train.steps
        record.close("finished" if finished else "preempted", reached)
        return OK if finished else PREEMPTED
    except BaseException as error:
        record.close(
            "interrupted" if isinstance(error, KeyboardInterrupt) else "failed", None, error=describe_error(error)
        )
        raise
    finally:
        restore_handlers()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize()


def set_up_torch(settings: TrainConfig, ranks) -> None:
    import torch

    torch.set_float32_matmul_precision("high")  # TF32 where something stays in fp32
    if ranks.device.type == "cpu":
        torch.set_num_threads(settings.train.cpu_threads or max(1, (os.cpu_count() or 1) // ranks.local_world))


def check_vocabulary(settings: TrainConfig, data: manifest.Manifest) -> None:
    """The model must have a row for every token id of the data."""
    from core.errors import ConfigError

    tokenizer = data.tokenizer
    if tokenizer.name != "gpt2":
        raise ConfigError(
            f"{settings.data.url}: was made with tokenizer {tokenizer.name!r}, this model needs 'gpt2'; "
            "prepare the data with it"
        )
    if tokenizer.vocab_size > settings.model.vocab_rows:
        raise ConfigError(
            f"model.vocab_rows is {settings.model.vocab_rows}, fewer than the {tokenizer.vocab_size} tokens of "
            f"{settings.data.url}; "
            f"set it to {-(-tokenizer.vocab_size // 128) * 128}"
        )


def default_cache_dir() -> str:
    import getpass
    import tempfile

    return str(Path(tempfile.gettempdir()) / f"token-shards-{getpass.getuser()}")


def accumulation_of(settings: TrainConfig, world: int) -> int:
    """Micro-batches per rank and step. Raises ConfigError if they do not divide."""
    from core.errors import ConfigError

    micro_batches = settings.batch.tokens // (settings.batch.micro_batch * settings.model.context)
    if micro_batches % world:
        possible = next(count for count in range(world, 0, -1) if micro_batches % count == 0)
        raise ConfigError(
            f"batch.tokens = {settings.batch.tokens} makes {micro_batches} micro-batches of "
            f"{settings.batch.micro_batch} x {settings.model.context} tokens, which do not divide over {world} ranks; "
            f"start {possible} ranks, or lower batch.micro_batch"
        )
    return micro_batches // world


def describe(settings: TrainConfig, model, data: manifest.Manifest, accumulation: int, ranks) -> str:
    """The numbers that the run follows from, in order."""
    from core.console import quantity

    tokens = settings.batch.tokens * settings.train.steps
    available = data.splits["train"].tokens
    return "\n".join(
        [
            "settings:\n" + config.to_yaml(settings).rstrip(),
            f"model: {model.parameter_count():,} parameters, {quantity(model.flops_per_token())} FLOPs per token",
            f"data: {quantity(available)} training tokens, {data.splits['val'].tokens:,} validation tokens, "
            f"fingerprint {data.fingerprint[:12]}",
            f"batch: {settings.batch.tokens:,} tokens = {settings.batch.micro_batch} sequences x "
            f"{settings.model.context} tokens x {accumulation} micro-batches x "
            f"{ranks.world} ranks on {ranks.device.type}",
            f"length: {settings.train.steps:,} steps = {quantity(tokens)} tokens = {tokens / available:.2f} epochs",
        ]
    )


def describe_error(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


if __name__ == "__main__":
    run_entry(main)
