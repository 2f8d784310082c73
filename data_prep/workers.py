"""Many parts on all cores: one process per worker, each doing whole parts, started from a clean server process.

Processes and not threads, because hashing ids and slicing documents holds Python's lock; and a fork of a process
that already runs storage threads could hang. A worker ends when its parent does, even if that was killed.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from core import vocabulary
from core.errors import DataError
from core.schema import PrepConfig
from data_prep import part as parts
from data_prep.encode import Check, open_engine
from data_prep.part import Record, Work
from data_prep.plan import Part

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """What every worker needs to begin."""

    config: PrepConfig
    plan_sha256: str
    vocab_url: str


def run(job: Job, todo: Sequence[Part], workers: int, advance: Callable[[int, int], None]) -> list[Record]:
    """Do the parts; `advance` is told of source bytes read and tokens made. Raises the first error of a part.

    After an error no further part is begun; what is recorded stays.
    """
    workers = min(workers, len(todo))
    if workers <= 1:
        work = _open(job, lambda count: advance(count, 0), lambda count: advance(0, count))
        return [parts.prepare(part, work) for part in todo]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.workers", "awkward", "gigatoken", "s3fs"])
    read, made = context.Value("q", 0), context.Value("q", 0)
    seen = [0, 0]

    def tell() -> None:
        now = [read.value, made.value]
        advance(now[0] - seen[0], now[1] - seen[1])
        seen[:] = now

    with ProcessPoolExecutor(workers, context, _begin, (job, read, made)) as pool:
        try:
            futures: set[Future[Record]] = {pool.submit(_do, part) for part in todo}
            running, records = futures, []
            while running:
                done, running = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                records += [future.result() for future in done]
                tell()
            return records
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, most likely for lack of memory; "
                "finished parts are kept: run the same command again with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# --- in the worker process -------------------------------------------------------------------------------------

_work: Work


def _begin(job: Job, read, made) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def adder(counter) -> Callable[[int], None]:
        def add(count: int) -> None:
            with counter.get_lock():
                counter.value += count

        return add

    _work = _open(job, adder(read), adder(made))


def _do(part: Part) -> Record:
    return parts.prepare(part, _work)


def _open(job: Job, fetched: Callable[[int], None], encoded: Callable[[int], None]) -> Work:
    words = vocabulary.read(job.vocab_url)
    engine = open_engine(job.config.tokenizer.engine, words)
    check = Check(words) if engine.name != "tiktoken" else None
    return Work(job.config, job.plan_sha256, engine, check, fetched, encoded)


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    time.sleep(0.1)
    os._exit(1)
