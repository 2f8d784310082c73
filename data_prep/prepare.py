"""Documents to token shards: parquet in, GPT-2 ids out, as many cores and machines as there are.

    python -m data_prep.prepare data_prep/configs/fineweb-edu-10bt.yaml --data.url=s3://BUCKET/fineweb-edu-10bt

Reads parquet files (local, s3://, gs://, hf://) and writes, below data.url, token shards, the vocabulary and,
last, manifest.json. Run it again after any interruption: finished parts are kept, and the bytes do not depend on
where it was cut off, nor on the number of workers or nodes.

A part of the source becomes whole shards of its own (`data_prep/part.py`), instead of filling shards across
parts. So nothing has to be carried from one part to the next, each token is uploaded once and never read again,
and finishing is only a matter of merging records. The price: the last shard of each part is shorter than the
others, which no reader minds.
"""

import logging
import os
import time

from core import config as settings
from core import manifest, storage, vocabulary
from core.console import progress, quantity, run_entry, set_up_logging
from core.errors import ConfigError, ObjectNotFound
from core.manifest import Manifest
from core.schema import PrepConfig
from core.vocabulary import Vocabulary
from data_prep import finalize, part, plan, source, workers
from data_prep.plan import Plan

log = logging.getLogger(__name__)

USAGE = """
python -m data_prep.prepare [CONFIG.yaml] [--key=value ...]

Turn documents into GPT-2 token shards and a manifest below data.url. Safe to run again: finished parts are kept.
On several machines give each --num-nodes and --node-rank (SkyPilot's variables are understood).
"""


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(settings.help_text(PrepConfig, USAGE))
        return 0
    set_up_logging()
    config = settings.load(PrepConfig, arguments, os.environ)
    log.info("settings:\n%s", settings.to_yaml(config).rstrip())
    made = prepare(config)
    if made:
        _print_summary(made, config.data.url)
    return 0


def prepare(config: PrepConfig) -> Manifest | None:
    """Do what is left to do. None when the rest is with other nodes. Raises ConfigError, DataError, StorageError."""
    todo = plan.make(config)
    if plan.claim(todo, config.data.url):
        log.info("%s is complete already, with the same source and settings: nothing to do", config.data.url)
        return manifest.read(config.data.url)
    source.check_columns(todo.files[0], config.source, config.filter)
    if config.phase != "finalize":
        _encode(config, todo)
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
    vocab_url = _store_vocabulary(config)
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
    started = time.monotonic()
    with progress("prepare", sum(each.end - each.start for each in left), "source bytes") as bar:
        made = workers.run(workers.Job(config, todo.sha256, vocab_url), left, count, bar.advance)
    seconds = time.monotonic() - started
    if left:
        log.info(
            "encoded %s tokens in %.1f s: %s tokens/s, %.1f MB/s of text",
            quantity(made.tokens),
            seconds,
            quantity(made.tokens / seconds),
            made.text_bytes / 1e6 / seconds,
        )


def _store_vocabulary(config: PrepConfig) -> str:
    """Put the vocabulary beside the shards, where every later stage finds it; returns its URI."""
    uri = storage.join(config.data.url, vocabulary.FILE_NAME)
    try:
        vocabulary.read(uri)
    except ObjectNotFound:
        storage.write_bytes(uri, _find_vocabulary(config).stored)
    return uri


def _find_vocabulary(config: PrepConfig) -> Vocabulary:
    if config.tokenizer.vocab_url:
        return vocabulary.read(config.tokenizer.vocab_url)
    import tiktoken

    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # whatever its HTTP library raises
        raise ConfigError(
            f"tokenizer.vocab_url is empty and tiktoken could not download GPT-2's vocabulary "
            f"({type(error).__name__}); set it (or VOCAB_URL) to a copy of vocab.bpe"
        ) from error
    return vocabulary.parse(vocabulary.rank_file(ranks), "tiktoken's gpt2")


def _print_summary(made: Manifest, url: str) -> None:
    stats = made.stats
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in stats["dropped"].items())
    print(f"documents  {stats['documents']:,}" + (f" (dropped: {dropped})" if dropped else ""))
    for name, split in made.splits.items():
        print(f"{name:<10} {split.tokens:,} tokens, {split.documents:,} documents, {len(split.shards)} shards")
    print(f"set        {url} (fingerprint {made.fingerprint[:12]})")
    print(f"check it   python -m data_prep.verify {url}")
    print(f"train      torchrun --nproc-per-node=N -m trainer.train CONFIG --data.url={url} --run.url=RUN_URL")


if __name__ == "__main__":
    run_entry(main)
