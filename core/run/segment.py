"""Opens a segment of a run and writes its ledger and metrics. Training, evaluation, preparation and synthesis use it.

with open_segment(folder, "evaluate", config) as segment:
    with segment.phase("eval"):
        ...
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from core import secrets, stop
from core.errors import CapReached, one_line
from core.run import paid
from core.run.cap import Bounds, OthersWatch, SpendingCap, spent_by_earlier_segments
from core.run.folder import RunFolder, open_run
from core.run.journal import Journal
from core.run.ledger import Ledger
from core.run.log import StoredLog
from core.run.machine import (
    Machine,
    machine_from_environment,
    process_started_at,
    program_versions,
    segment_started_at,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """Arguments of `open_segment`. If `identity` is None, no run.json is written or checked."""

    stage: str
    config: Mapping[str, Any]
    identity: Mapping[str, Any] | None = None
    fingerprint: str = ""
    packages: tuple[str, ...] = ("numpy",)
    program: Mapping[str, Any] | None = None
    gpu: str | None = None
    gpus_per_node: int = 0
    max_usd: float = 0.0
    max_hours: float = 0.0
    shutdown_seconds: float = 0.0
    is_per_node: bool = False  # each node opens a segment with its share of the price
    has_metrics: bool = False


class SegmentLog:
    """An open segment: its ledger, metrics and cap. Only one rank has a ledger.

    On the other ranks, the methods do nothing.
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        metrics: Journal | None = None,
        cap: SpendingCap | None = None,
        number: int = 0,
        is_new_run: bool = False,
        watch: OthersWatch | None = None,
        log_lines: StoredLog | None = None,
    ):
        self.ledger = ledger
        self.metrics = metrics
        self.cap = cap
        self.number = ledger.segment if ledger else number
        self.is_new_run = is_new_run
        self._watch = watch
        self._log_lines = log_lines

    def phase(self, name: str):
        return self.ledger.phase(name) if self.ledger else contextlib.nullcontext()

    def switch(self, name: str) -> None:
        if self.ledger:
            self.ledger.switch(name)

    def mark(self, name: str, **fields: Any) -> None:
        if self.ledger:
            self.ledger.mark(name, **fields)

    def now(self) -> float:
        """The current unix time, by the ledger's clock if there is a ledger."""
        return self.ledger.now() if self.ledger else time.time()

    def step_done(self, step: int) -> None:
        if self.ledger:
            self.ledger.step_done(step)

    def metric(self, kind: str, values: Mapping[str, Any]) -> None:
        if self.metrics:
            self.metrics.add({"kind": kind, "time": self.ledger.now(), **values})

    def outage(self) -> tuple[float, str]:
        """The seconds since the store began to refuse events, and the newest error of the store."""
        journals = [self.metrics, self.ledger and self.ledger.journal]
        return max(((each.failing_seconds, each.failure) for each in journals if each), default=(0.0, ""))

    def flush(self) -> bool:
        """Store all events so far. Returns whether this succeeded.

        The trainer marks a checkpoint as complete only afterwards, so that time and metrics of its steps are not
        missing.
        """
        return (not self.metrics or self.metrics.flush()) and (not self.ledger or self.ledger.flush())

    def close(self, reason: str, step: int | None = None, **details: Any) -> None:
        """Store everything. A second call does nothing. If the store fails, the failure is only logged."""
        if self._watch:
            self._watch.close()
        if self.metrics:
            self.metrics.close()
        if self.ledger:
            # `details` may hold the error message of another library, which may contain a key.
            plain = {key: secrets.scrub(each) if isinstance(each, str) else each for key, each in details.items()}
            self.ledger.close(reason, step, **plain)
        if self._log_lines:
            self._log_lines.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self.close(reason_for(error), **({} if error is None else {"error": one_line(error)}))


def open_segment(folder: RunFolder, opening: Opening, environment: Mapping[str, str] = os.environ) -> SegmentLog:
    """Check the run, claim the next segment, start its ledger and metrics.

    As a context manager, the segment closes with the reason why the block ended. stop.leave ends the process without
    leaving the block, so also register `close` with stop.on_leaving. Raises RunError if the folder holds another run.
    Raises ConfigError if a cap cannot be kept because a price is unknown.
    """
    is_new = opening.identity is not None and open_run(folder, opening.identity, opening.config, opening.fingerprint)
    machine = machine_from_environment(opening.gpu, opening.gpus_per_node, environment)
    if opening.is_per_node:
        machine = one_node_of(machine)
    program = program_versions(opening.packages) | {"stage": opening.stage} | dict(opening.program or {})
    if opening.max_usd:
        program["max_usd"] = f"{opening.max_usd:g}"
    if config := next((each for each in sys.argv[1:] if each.endswith((".yaml", ".yml"))), None):
        program["config"] = config
    bounds = Bounds(opening.max_usd, opening.max_hours)
    before = spent_by_earlier_segments(folder, machine, bounds, segment_started_at())
    ledger = Ledger(folder, machine, program, segment_started_at(), process_started_at())
    measured = paid.reserve_seconds(folder, machine.cloud) if bounds != Bounds() else 0.0
    cap = SpendingCap(ledger, bounds, max(opening.shutdown_seconds, measured), before)
    metrics = Journal(folder.segment(ledger.segment).metrics) if opening.has_metrics else None
    watch = OthersWatch(cap, folder.url, ledger.segment) if bounds != Bounds() else None
    name = f"by-hand-{ledger.segment:06d}"
    log_lines = StoredLog.begin(folder, name, environment) if opening.has_metrics else None
    return SegmentLog(ledger, metrics, cap, is_new_run=is_new, watch=watch, log_lines=log_lines)


def one_node_of(machine: Machine) -> Machine:
    """One node of `machine` with its share of the price.

    Programs use this if the nodes of a machine start and end independently.
    """
    price = machine.usd_per_hour
    return replace(machine, nodes=1, usd_per_hour=price and price / machine.nodes)


def reason_for(error: BaseException | None) -> str:
    """The reason of a segment's end, from the error that ended it: finished, cap, interrupted, preempted or failed."""
    if error is None:
        return "finished"
    if isinstance(error, CapReached):
        return "cap"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "preempted" if stop.is_certain() else "failed"
