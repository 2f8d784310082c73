"""From a source to a complete set: plan, share out, encode what is missing, finish.

Run again after any interruption: finished parts are kept, and the bytes do not depend on where it was cut off, nor
on the number of workers or nodes.

A part of the source becomes whole shards of its own (`data_prep/part.py`), instead of filling shards across parts.
So nothing has to be carried from one part to the next, each token is uploaded once and never read again, and
finishing is only a matter of merging records. The price: the last shard of each part is shorter than the others,
which no reader minds. The other way, parts as intermediate objects that a last step packs into equal shards, would
move 20 GB down and up again for ten billion tokens, and all of it through the machine that happens to finish.
"""

import logging
import os
import time

from core.console import progress
from core.data import manifest
from core.data.manifest import Manifest
from core.figures import quantity
from core.settings.preparation import PrepConfig
from data_prep import duplicates, finalize, part, plan, record, words, workers
from data_prep.plan import Plan
from data_prep.sources.files import Part

log = logging.getLogger(__name__)


def prepare(config: PrepConfig, switch: record.Switch = lambda phase: None) -> Manifest | None:
    """Do what is left to do; `switch` is told the phases. None when the rest is with other nodes.

    Raises ConfigError, DataError, StorageError.
    """
    config, todo = plan.make(config)
    todo, complete = plan.claim(todo, config.data.url)
    if complete:
        log.info("%s is complete already, with the same source and settings: nothing to do", config.data.url)
        return manifest.read(config.data.url)
    if config.phase != "finalize":
        switch("prep")
        _encode(config, todo)
    switch("finalize")
    absent = finalize.missing(todo, config.data.url)
    if config.phase == "encode" or (config.phase == "all" and config.num_nodes > 1 and absent):
        log.info(
            "node %d of %d is done; %d of %d parts are still with other nodes, the last one writes the manifest",
            config.node_rank,
            config.num_nodes,
            len(absent),
            len(todo.parts),
        )
        return None
    return finalize.finalize(config, todo)


def _encode(config: PrepConfig, todo: Plan) -> None:
    """Do what is not done of this node's parts."""
    data_url = config.data.url
    job = workers.Job(config, todo.sha256, words.store(config.tokenizer.vocab_url, data_url))
    done = part.done_parts(data_url)
    mine = todo.parts[config.node_rank :: config.num_nodes]
    left = [each for each in mine if each.name not in done]
    count = config.workers or os.cpu_count() or 1
    log.info(
        "source: %d files, %sB; %d parts%s, %d done before; %d workers",
        len(todo.files),
        quantity(todo.source_bytes),
        len(mine),
        f" of {len(todo.parts)} on this node" if config.num_nodes > 1 else "",
        len(mine) - len(left),
        min(count, max(1, len(left))),
    )
    if not left:
        return
    if config.filter.drop_duplicates:
        # A node that is ahead hashes what others have not: nobody waits, and a lost node holds nobody up.
        for share in (mine, todo.parts):
            known = duplicates.hashed(data_url)
            _run("hash", workers.hash_texts, job, [each for each in share if each.name not in known], count)
        duplicates.find(todo.parts, mine, data_url)
    started = time.monotonic()
    made = _run("prepare", workers.prepare, job, left, count)
    seconds = time.monotonic() - started
    log.info(
        "encoded %s tokens in %.1f s: %s tokens/s, %.1f MB/s of text",
        quantity(made.tokens),
        seconds,
        quantity(made.tokens / seconds),
        made.text_bytes / 1e6 / seconds,
    )


def _run(title: str, task: workers.Task, job: workers.Job, todo: list[Part], count: int) -> workers.Done:
    with progress(title, sum(each.end - each.start for each in todo), "source bytes") as bar:
        return workers.run(task, job, todo, count, bar.advance)
