"""Converts documents to token shards: source files in, GPT-2 ids out, on all cores and any number of machines.

    python -m data_prep.prepare data_prep/configs/fineweb-edu-10bt.yaml --data.url=s3://BUCKET/fineweb-edu-10bt

Reads a dataset of the Hugging Face Hub by its name (source.dataset), or files (source.url): parquet, JSON, CSV, text,
Arrow, WebDataset. Writes token shards, the vocabulary and, last, manifest.json below data.url. If RUN_URL is set, it
also writes a ledger for the cost report. data_prep/build.py describes the steps.
"""

from core import stop

if __name__ == "__main__":
    stop.listen()  # this call comes before the imports, which take seconds

import functools
import logging
import os

from core.console import run_entry, set_up_logging
from core.errors import CapReached
from core.exit_codes import CAPPED, OK, tell_launcher
from core.settings import loader as settings
from core.settings.preparation import PrepConfig
from data_prep import starter

log = logging.getLogger(__name__)

USAGE = """
python -m data_prep.prepare [CONFIG.yaml] [--key=value ...]

Convert documents to GPT-2 token shards and a manifest below data.url. Safe to run again: finished parts are kept.
On several machines give each --num-nodes and --node-rank (SkyPilot's variables are understood).
"""


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(settings.help_text(PrepConfig, USAGE))
        return OK
    set_up_logging()
    config = settings.load(PrepConfig, arguments, os.environ)
    log.info("%s", settings.describe(config, "--help has the others"))
    if config.workers != 1:
        starter.start()
    # These imports are slow. The fork server makes the same imports on another core at the same time.
    from data_prep import booking, build, hellaswag
    from data_prep.finalize import print_summary

    log_of_node = booking.open_log(
        "data_prep.prepare", config.node_rank, config.max_usd, config.shutdown_reserve_seconds
    )
    try:
        with log_of_node as segment:
            # HellaSwag is stored before the hours of work, because the Hub may refuse the download.
            if config.node_rank == 0:
                hellaswag.ensure(config.data.url, config.evaluation_sets)
            check = functools.partial(booking.check_cap, segment, config.data.url, config.max_usd)
            made = build.prepare(config, segment.switch, check)
    except CapReached as reached:
        log.warning("%s", reached)
        tell_launcher(CAPPED)
        return CAPPED
    if made:
        print_summary(made, config.data.url)
    return OK


if __name__ == "__main__":
    run_entry(main)
