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
    todo = plan.make(config)
    complete = plan.claim(todo, config.data.url)
    if complete:
        log.info("%s is complete already, with the same source and settings: nothing to do", config.data.url)
        _print_summary(manifest.read(config.data.url), config, None)
        return 0
    source.check_columns(todo.files[0], config.source, config.filter)
    started = time.monotonic()
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
        return 0
    made = finalize.finalize(config, todo)
    _print_summary(made, config, time.monotonic() - started)
    return 0


def _encode(config: PrepConfig, todo: Plan) -> None:
    """Do what is not done of this node's parts."""
    data_url = config.data.url
    vocab_url = _store_vocabulary(config)
    done = part.done_parts(data_url)
    mine = todo.parts[config.node_rank :: config.num_nodes]
    left = [part for part in mine if part.name not in done]
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
    with progress("prepare", sum(part.end - part.start for part in left), "source bytes") as bar:
        workers.run(workers.Job(config, todo.sha256, vocab_url), left, count, lambda read, made: bar.advance(read))


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


def _print_summary(made: Manifest, config: PrepConfig, seconds: float | None) -> None:
    stats, url = made.stats, config.data.url
    dropped = ", ".join(f"{number} {reason}" for reason, number in stats["dropped"].items())
    print(f"documents  {stats['documents']:,}" + (f" (dropped: {dropped})" if dropped else ""))
    for name, split in made.splits.items():
        print(f"{name:<10} {split.tokens:,} tokens, {split.documents:,} documents, {len(split.shards)} shards")
    if seconds:
        print(
            f"speed      {quantity(stats['tokens'] / seconds)} tokens/s, "
            f"{stats['text_bytes'] / 1e6 / seconds:.1f} MB of text/s, {seconds:.1f} s with what was left to do"
        )
    print(f"set        {url} (fingerprint {made.fingerprint[:12]})")
    print(f"check it   python -m data_prep.verify {url}")
    print(f"train      torchrun --nproc-per-node=N -m trainer.train CONFIG --data.url={url} --run.url=RUN_URL")


if __name__ == "__main__":
    run_entry(main)
