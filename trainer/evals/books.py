"""The segment of an evaluation: a run folder of its own beside its results, since a segment in the run's own ledger
would take the run over.

    RUN_URL/evaluations/run.json    what this folder is
    RUN_URL/evaluations/ledger/     segments of the stage "evaluate" (core.run.ledger)
"""

import logging
import time

import torch

from core import stop
from core.errors import CapReached
from core.run.folder import RunFolder
from core.run.segment import Opening, SegmentLog, open_segment
from core.settings import loader
from core.settings.evaluation import EvaluateConfig
from trainer.distributed.process_group import Ranks, on_main

log = logging.getLogger("evaluate")


class Books:
    """On all ranks; rank 0 writes."""

    def __init__(self, home: str, settings: EvaluateConfig, ranks: Ranks):
        self._segment = SegmentLog()
        self._home, self._max_usd = home, settings.max_usd
        # As a time, every rank can ask on its own.
        self._latest = on_main(lambda: self._open(home, settings, ranks), ranks)

    def _open(self, home: str, settings: EvaluateConfig, ranks: Ranks) -> float:
        gpu = torch.cuda.get_device_name() if ranks.device.type == "cuda" else None
        opening = Opening(
            stage="evaluate",
            config={"evaluate": loader.to_dict(settings)},
            identity={},
            packages=("torch", "numpy", "obstore"),
            program={"ranks": ranks.world},
            gpu=gpu,
            gpus_per_node=ranks.local_world if gpu else 0,
            max_usd=settings.max_usd,
            shutdown_seconds=settings.shutdown_reserve_seconds,
        )
        self._segment = open_segment(RunFolder(home), opening)
        stop.on_leaving(lambda: self._segment.close("preempted"))
        return self._segment.cap.latest()

    def check(self) -> None:
        """Raises CapReached once another batch could cost more than the cap leaves."""
        if time.time() >= self._latest:
            raise CapReached(
                f"{self._home}: evaluating has cost nearly the ${self._max_usd:g} of max_usd; "
                "what was found is kept: go on with a larger MAX_USD and the same command"
            )

    def phase(self, name: str):
        return self._segment.phase(name)

    def __enter__(self) -> "Books":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._segment.__exit__(kind, error, trace)
        ledger = self._segment.ledger
        if error is None and ledger and (spent := ledger.spent_usd()) is not None:
            log.info("spent $%.2f", spent)
