"""Prepares a dataset: plans the parts, encodes the missing parts, writes the manifest.

An interrupted preparation continues with the missing parts. The result does not depend on interruptions or on the
number of workers and nodes.

Each part of the source becomes complete shards (data_prep/part.py). Parts are therefore independent, each token is
uploaded once and never read again, and the last step only merges records. The last shard of each part is therefore
shorter than the others, and readers support this. Shards of equal size would need a last step that downloads and
uploads 20 GB per ten billion tokens on one machine.
"""

import logging
import time
from collections.abc import Callable

from core.console import progress
from core.cores import usable_cores
from core.data import manifest
from core.data.manifest import Manifest
from core.data.vocabulary import store_vocabulary
from core.figures import quantity
from core.settings.preparation import PrepConfig
from data_prep import duplicates, finalize, limit, plan, workers
from data_prep.plan import PrepPlan
from data_prep.sources.files import Part

log = logging.getLogger(__name__)


def prepare(
    config: PrepConfig, switch: Callable[[str], None] = lambda phase: None, check: Callable[[], None] = lambda: None
) -> Manifest | None:
    """Prepares the missing parts. Returns None if other nodes still work on their parts.

    Calls `switch(phase)` at each change of phase. Calls `check` periodically. `check` may raise an error to end the
    preparation. Raises ConfigError, DataError, StorageError.
    """
    config, todo = plan.make(config)
    todo, complete = plan.claim(todo, config.data.url)
    if complete:
        log.info("%s is complete already, with the same source and settings", config.data.url)
        return manifest.read(config.data.url)
    if config.phase != "finalize":
        switch("prep")
        _encode(config, todo, check)
    switch("finalize")
    absent = limit.missing(todo, config.data.url)
    if config.phase == "encode" or (config.phase == "all" and config.num_nodes > 1 and absent):
        log.info(
            "node %d of %d is done; %d of %d parts are still missing; the last node writes the manifest",
            config.node_rank,
            config.num_nodes,
            len(absent),
            len(limit.needed(todo, config.data.url)),
        )
        return None
    return finalize.finalize(config, todo)


def _encode(config: PrepConfig, todo: PrepPlan, check: Callable[[], None]) -> None:
    """Prepares the missing parts of this node.

    A preparation with a limited number of tokens may turn out to need more parts. These are prepared too.
    """
    job = workers.PrepJob(config, todo, store_vocabulary(config.tokenizer.vocab_url, config.data.url))
    wanted = limit.needed(todo, config.data.url, at_first=config.num_nodes > 1)
    _encode_parts(job, wanted, wanted[config.node_rank :: config.num_nodes], check)
    done = plan.done_parts(config.data.url)
    if not todo.settings.get(limit.LIMIT) or any(part.name not in done for part in wanted):
        return  # only the node that finishes last goes on from here
    while more := limit.missing(todo, config.data.url):
        _encode_parts(job, limit.needed(todo, config.data.url), more, check)


def _encode_parts(job: workers.PrepJob, wanted: list[Part], mine: list[Part], check: Callable[[], None]) -> None:
    config, todo = job.config, job.plan
    data_url = config.data.url
    done = plan.done_parts(data_url)
    left = [each for each in mine if each.name not in done]
    count = config.workers or usable_cores()
    log.info(
        "source: %d files, %sB; %d parts%s, %d done before; %d workers",
        len(todo.files),
        quantity(todo.source_bytes),
        len(mine),
        f" of {len(wanted)} on this node" if config.num_nodes > 1 else "",
        len(mine) - len(left),
        min(count, max(1, len(left))),
    )
    if not left:
        return
    if config.filter.drop_duplicates:
        # A node that has hashed its parts also hashes the missing parts of other nodes, so that no node waits for
        # another.
        for share in (mine, wanted):
            known = duplicates.hashed(todo, data_url)
            todo_now = [each for each in share if each.name not in known]
            _run("hash", workers.hash_texts, job, todo_now, count, check)
        duplicates.find(todo, mine, data_url)
    started = time.monotonic()
    made = _run("prepare", workers.prepare, job, left, count, check)
    seconds = time.monotonic() - started
    log.info(
        "encoded %s tokens in %.1f s: %s tokens/s, %.1f MB/s of text",
        quantity(made.tokens),
        seconds,
        quantity(made.tokens / seconds),
        made.text_bytes / 1e6 / seconds,
    )


def _run(
    title: str, task: workers.Task, job: workers.PrepJob, todo: list[Part], count: int, check: Callable[[], None]
) -> workers.Done:
    with progress(title, sum(each.end - each.start for each in todo), "source bytes") as bar:

        def advance(amount: int) -> None:
            bar.advance(amount)
            check()

        return workers.run(task, job, todo, count, advance)
