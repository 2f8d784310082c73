"""Documents to token shards: parquet in, GPT-2 ids out, as many cores and machines as there are.

    python -m data_prep.prepare data_prep/configs/fineweb-edu-10bt.yaml --data.url=s3://BUCKET/fineweb-edu-10bt

Reads a data set of the Hugging Face Hub by its name (source.dataset), or files (source.url): parquet, JSON, CSV, text,
Arrow, WebDataset. Writes, below data.url, token shards, the vocabulary and, last, manifest.json; with RUN_URL set also
a ledger for the cost report. How: data_prep/build.py, data_prep/sources/kinds.py.
"""

from core import stop

if __name__ == "__main__":
    stop.listen()  # before the imports that take a while

import logging
import os

from core.console import run_entry, set_up_logging
from core.settings import loader as settings
from core.settings.preparation import PrepConfig
from data_prep import starter

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
    if config.workers != 1:
        starter.start()
    # Slow imports, which the workers' server makes meanwhile on another core.
    from data_prep import build, record, summary

    with record.opened(config) as switch:
        made = build.prepare(config, switch)
    if made:
        summary.show(made, config.data.url)
    return 0


if __name__ == "__main__":
    run_entry(main)
