"""Runs tasks for many parts in worker processes, which are forked from a clean server process.

Threads would not help, because hashing ids and slicing documents hold the global interpreter lock. The workers are not
forked from this process, because it runs storage threads, and its forks could hang. A worker exits when its parent
process ends, even if SIGKILL ended the parent.
"""

import functools
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from core.console import set_up_logging
from core.data import vocabulary
from core.errors import DataError
from core.settings.preparation import PrepConfig
from data_prep import duplicates, starter
from data_prep import part as parts
from data_prep.encode import Check, open_engine
from data_prep.part import WorkerState
from data_prep.plan import PrepPlan
from data_prep.sources.files import Part

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Done:
    """The numbers of tokens and of bytes of text in one or several finished parts."""

    tokens: int = 0
    text_bytes: int = 0

    def __add__(self, other: "Done") -> "Done":
        return Done(self.tokens + other.tokens, self.text_bytes + other.text_bytes)


Task = Callable[[Part, WorkerState], Done]


@dataclass(frozen=True)
class PrepJob:
    """Arguments with which every worker starts."""

    config: PrepConfig
    plan: PrepPlan
    vocab_url: str


def run(task: Task, job: PrepJob, todo: Sequence[Part], workers: int, advance: Callable[[int], None]) -> Done:
    """Runs a task for each part. Calls `advance(count)` with the number of source bytes read.

    Raises the first error of a part. After an error, no further part starts; finished parts stay stored.
    """
    workers = min(workers, len(todo))
    if workers <= 1:
        state = _open(job, advance)
        return sum((task(part, state) for part in todo), Done())
    starter.start()
    context = multiprocessing.get_context("forkserver")
    read = context.Value("q", 0)
    reported = 0
    total = Done()
    # The workers get the environment of this process, because the server may have started before a variable was set.
    with ProcessPoolExecutor(workers, context, _begin, (job, dict(os.environ), read)) as pool:
        try:
            running: set[Future[Done]] = {pool.submit(_do, task, part) for part in todo}
            while running:
                done, running = wait(running, POLL_SECONDS, FIRST_COMPLETED)
                total = sum((future.result() for future in done), total)
                advance(read.value - reported)
                reported = read.value
            return total
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, most likely for lack of memory; "
                "finished parts are kept: run the same command again with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def prepare(part: Part, state: WorkerState) -> Done:
    """Task: prepares a part."""
    drops = (
        duplicates.drops_of(state.config.data.url, state.plan, part) if state.config.filter.drop_duplicates else None
    )
    record = parts.prepare(part, state, drops)
    return Done(record.tokens, record.text_bytes)


def hash_texts(part: Part, state: WorkerState) -> Done:
    """Task: hashes the texts of a part."""
    duplicates.hash_part(part, state)
    return Done()


# --- in the worker process -------------------------------------------------------------------------------------

_work: Callable[[], WorkerState]


def _begin(job: PrepJob, environment: dict[str, str], read) -> None:
    global _work
    os.environ.update(environment)
    set_up_logging(speaks=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def fetched(count: int) -> None:
        with read.get_lock():
            read.value += count

    # The worker's state is opened with the first part, so that an error while it is opened becomes an error of the
    # part.
    _work = functools.cache(lambda: _open(job, fetched))


def _do(task: Task, part: Part) -> Done:
    return task(part, _work())


def _open(job: PrepJob, fetched: Callable[[int], None]) -> WorkerState:
    words = vocabulary.read(job.vocab_url)
    engine = open_engine(job.config.tokenizer.engine, words)
    check = Check(words) if engine.name != "tiktoken" else None
    return WorkerState(job.config, job.plan, engine, check, fetched)


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
