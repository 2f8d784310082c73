"""Checks the inputs that a run reads only later, for evaluations or at its end.

The check comes before the run writes anything. Otherwise a missing vocabulary, a damaged HellaSwag set or a lost shard
would end a run after paid hours.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from core.data import sets
from core.settings.training import TrainLoopConfig
from trainer.distributed.process_group import Ranks, on_main
from trainer.evals import hellaswag
from trainer.stages.stage import Stage

log = logging.getLogger("train")


def open_later_inputs(stage: Stage, ranks: Ranks) -> Sequence[Mapping[str, Any]]:
    """Open and check the inputs that are needed later, on all ranks together.

    Returns the HellaSwag items to score, if any. Raises LauncherError on rank 0, PeerFailed on the others.
    """
    train = stage.settings.train
    on_main(stage.check_stored, ranks)
    rows = on_main(functools.partial(_hellaswag_rows, stage.data_url, train), ranks)
    if rows or takes_samples(train):
        _ = stage.vocabulary  # this access reads the vocabulary, which the stage keeps
    return rows


def takes_samples(train: TrainLoopConfig) -> bool:
    return bool(train.sample_tokens and train.sample_prompts)


def _hellaswag_rows(data_url: str, train: TrainLoopConfig) -> Sequence[Mapping[str, Any]]:
    count, every = train.hellaswag_items, train.hellaswag_every
    rows = (sets.read_if_there(data_url, hellaswag.NAME) or ()) if data_url and count else ()
    if every and count and data_url and not rows:
        log.warning("HellaSwag is not scored: %s", sets.missing(data_url, hellaswag.NAME))
    hellaswag.check(rows[:count])
    return rows[:count]
