"""Records an evaluation while it runs: partial results, time, and money.

    with EvaluationLog(folder, settings, ranks) as log:
        with log.phase("eval"), PartialResults(f"{folder}/partial/perplexity-01ab", ranks, log.check_cap) as partial:
            partial.found        # the results of all earlier attempts, by key
            partial.add({"17": [-12.5, False]})

RUN_URL/evaluations has the layout of a run folder, with run.json and a ledger of segments of the stage "evaluate". A
new segment in the ledger of the training would stop the machine that trains the run.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from core import pulse, stop, storage
from core.errors import CapReached
from core.run import journal
from core.run.folder import RunFolder
from core.run.journal import Journal
from core.run.segment import Opening, SegmentLog, open_segment
from core.settings import loader
from core.settings.evaluation import EvaluateConfig
from trainer.distributed.process_group import Ranks, gather_objects, on_main

log = logging.getLogger("evaluate")


class EvaluationLog:
    """The open segment of an evaluation, on all ranks. Only rank 0 writes it."""

    def __init__(self, folder: str, settings: EvaluateConfig, ranks: Ranks):
        self._segment = SegmentLog()
        self._folder, self._max_usd = folder, settings.max_usd
        # The cap as a deadline (Unix time in s), which every rank can check without asking rank 0.
        self._deadline = on_main(lambda: self._open(settings, ranks), ranks)

    def _open(self, settings: EvaluateConfig, ranks: Ranks) -> float:
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
        self._segment = open_segment(RunFolder(self._folder), opening)
        stop.on_leaving(lambda: self._segment.close("preempted"))
        return self._segment.cap.latest()

    def check_cap(self) -> None:
        """Raises CapReached if one more batch could cost more than the cap allows."""
        if time.time() >= self._deadline:
            raise CapReached(
                f"{self._folder}: evaluations have cost nearly the ${self._max_usd:g} of max_usd; their results and "
                "partial results are stored: continue with a larger MAX_USD and the same command"
            )

    def phase(self, name: str):
        return self._segment.phase(name)

    def __enter__(self) -> "EvaluationLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._segment.__exit__(kind, error, trace)
        ledger = self._segment.ledger
        if error is None and ledger and (spent := ledger.spent_usd()) is not None:
            log.info("spent $%.2f", spent)


class PartialResults:
    """Stores the results of an unfinished task. The next attempt continues from these results.

    Each rank appends to its own journal (core.run.journal). If the process is killed, at most a few seconds of results
    are lost.
    """

    def __init__(self, folder: str, ranks: Ranks, check: Callable[[], None]):
        """`check` is called after each addition. It may raise an error to stop the task."""
        self.folder = folder
        self.check = check
        self._ranks = ranks
        self.found: dict[str, Any]
        self.found, attempt = on_main(lambda: (_read(folder), time.time_ns()), ranks)
        self._journal = Journal(storage.join(folder, f"{attempt}-rank-{ranks.rank:05d}"))
        stop.on_leaving(self._journal.close)

    def add(self, values: dict[str, Any]) -> None:
        """Stores JSON values that this rank has computed, by key."""
        self._journal.add({"values": values})
        pulse.beat()
        self.check()

    def discard(self) -> None:
        """Deletes the partial results once the result is stored. Call it on all ranks, after the `with` block."""
        gather_objects(None, self._ranks)  # waits until every rank has closed its journal
        on_main(self._delete, self._ranks)

    def _delete(self) -> None:
        for info in storage.list_objects(self.folder):
            storage.delete(info.uri)

    def __enter__(self) -> "PartialResults":
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()


def _read(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attempt in storage.list_names(folder):
        events, _ = journal.read(storage.join(folder, attempt))  # unreadable results are computed again
        for event in events:
            found |= event["values"]
    return found
