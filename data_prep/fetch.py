"""Ready-made token shards to a checked set of our own, without tokenizing.

    python -m data_prep.fetch data_prep/configs/fineweb-edu-10bt-ready.yaml --data.url=s3://BUCKET/fineweb-edu-10bt

Reads llm.c's .bin files, NumPy's .npy and plain uint16 .bin from the Hub, a bucket or a disk. Writes shards, the
vocabulary and, last, manifest.json. How: data_prep/ready.py.
"""

import logging
import os

from core.console import run_entry, set_up_logging
from core.settings import loader as settings
from core.settings.preparation import FetchConfig
from data_prep import ready, summary

log = logging.getLogger(__name__)

USAGE = """
python -m data_prep.fetch [CONFIG.yaml] [--key=value ...]

Copy token shards that others have made below data.url, checked, with our manifest. Safe to run again.
"""


def main(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        print(settings.help_text(FetchConfig, USAGE))
        return 0
    set_up_logging()
    config = settings.load(FetchConfig, arguments, os.environ)
    log.info("settings:\n%s", settings.to_yaml(config).rstrip())
    summary.show(ready.fetch(config), config.data.url)
    return 0


if __name__ == "__main__":
    run_entry(main)
