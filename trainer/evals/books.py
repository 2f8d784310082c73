"""What an evaluation costs: a ledger of its own beside its results, since whoever opens a segment in the run's own
ledger takes the run over.

    RUN_URL/evaluations/run.json    what this folder is
    RUN_URL/evaluations/ledger/     segments of the stage "evaluate" (core.ledger)
"""

import contextlib
import logging
import time

import torch

from core import config, stop
from core.errors import CapReached
from core.ledger import Ledger
from core.run import machine_from_environment, open_run, process_started_at, program_versions, segment_started_at
from trainer.distributed import Ranks, on_main
from trainer.evals.settings import EvaluateConfig
from trainer.watch.cap import SpendingCap, spent_by_earlier_segments

log = logging.getLogger("evaluate")
_REASONS = {None: "finished", KeyboardInterrupt: "interrupted", CapReached: "cap"}


class Books:
    """On all ranks; rank 0 writes."""

    def __init__(self, home: str, settings: EvaluateConfig, ranks: Ranks):
        self._ledger: Ledger | None = None
        self._home, self._max_usd = home, settings.max_usd
        # As a time, every rank can ask on its own.
        self._latest = on_main(lambda: self._open(home, settings, ranks), ranks)

    def _open(self, home: str, settings: EvaluateConfig, ranks: Ranks) -> float:
        open_run(home, {}, {"evaluate": config.to_dict(settings)}, "")
        gpu = torch.cuda.get_device_name() if ranks.device.type == "cuda" else None
        machine = machine_from_environment(gpu, ranks.local_world if gpu else 0)
        program = program_versions(("torch", "numpy", "s3fs")) | {"ranks": ranks.world, "stage": "evaluate"}
        before = spent_by_earlier_segments(home, machine, settings.max_usd)
        self._ledger = Ledger(home, machine, program, segment_started_at(), process_started_at())
        stop.on_leaving(lambda: self._ledger.close("preempted"))
        return SpendingCap(self._ledger, settings.max_usd, settings.shutdown_seconds, before).latest()

    def check(self) -> None:
        """Raises CapReached once another batch could cost more than the cap leaves."""
        if time.time() >= self._latest:
            raise CapReached(
                f"{self._home}: evaluating has cost nearly the ${self._max_usd:g} of max_usd; "
                "what was found is kept: go on with a larger MAX_USD and the same command"
            )

    def phase(self, name: str):
        return self._ledger.phase(name) if self._ledger else contextlib.nullcontext()

    def __enter__(self) -> "Books":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not self._ledger:
            return
        reason = _REASONS.get(kind, "preempted" if stop.is_certain() else "failed")
        said = {} if error is None else {"error": " ".join(f"{kind.__name__}: {error}".split())[:500]}
        self._ledger.close(reason, None, **said)
        if error is None and (spent := self._ledger.spent_usd()) is not None:
            log.info("spent $%.2f", spent)
