"""What a run is to the report: plain values that costs.read fills from storage and costs.breakdown computes on."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from core.ledger import Machine

# A stretch of timeline is kept apart this long; longer segments are kept coarser, so that months stay small.
FINE_SLICE_SECONDS = 10.0
COARSE_SLICE_SECONDS = 60.0
FINE_FOR_SECONDS = 3600.0
# No heartbeat for this long: the machine is gone. Heartbeats come every few seconds, store outages last minutes.
SILENT_SECONDS = 180.0


@dataclass
class Slice:
    """A stretch of a segment's timeline: seconds by phase. What they leave of its length has no phase."""

    start: float
    end: float
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass
class Steps:
    """Optimizer steps of a segment in order: number, train seconds, data-wait seconds. Arrays, as there are many."""

    number: array = field(default_factory=lambda: array("q"))
    train: array = field(default_factory=lambda: array("d"))
    wait: array = field(default_factory=lambda: array("d"))


@dataclass
class Curve:
    """Training metrics of a segment, thinned to one point per slice: parallel lists. None where not known."""

    step: list[int] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    tokens: list[float | None] = field(default_factory=list)
    loss: list[float | None] = field(default_factory=list)
    tokens_per_second: list[float | None] = field(default_factory=list)
    mfu: list[float | None] = field(default_factory=list)


@dataclass
class Segment:
    """One machine's stretch of a run, as far as its ledger and metrics tell.

    `machine.usd_per_hour` is None unless it is a usable price. `problems` are sentences for the reader.
    """

    number: int
    machine: Machine = field(default_factory=Machine)
    started_at: float | None = None
    program: Mapping[str, Any] = field(default_factory=dict)
    launcher: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    slices: list[Slice] = field(default_factory=list)
    steps: Steps = field(default_factory=Steps)
    marks: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    curve: Curve = field(default_factory=Curve)
    evals: list[dict[str, Any]] = field(default_factory=list)
    hellaswag: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ended_at(self) -> float | None:
        """When its timeline ends: the last heartbeat, whether or not an end event followed."""
        return self.slices[-1].end if self.slices else self.started_at

    @property
    def restored_step(self) -> int | None:
        """The step it continued from (0: fresh start), or None if it did not get that far."""
        steps = [
            mark["step"] for mark in self.marks if mark["name"] == "restored" and isinstance(mark.get("step"), int)
        ]
        return steps[-1] if steps else None

    @property
    def gpus(self) -> int:
        return self.machine.gpus_per_node * self.machine.nodes

    def is_live(self, now: float) -> bool:
        """Whether it may still be running: no end event, and a heartbeat not long ago."""
        return self.end is None and self.ended_at is not None and abs(now - self.ended_at) < SILENT_SECONDS


@dataclass(frozen=True)
class Uptime:
    """One machine (or cluster), from launch to shutdown; `end` is None while it is up.

    `was_up` is false when the record itself shows that no machine was ever had: a launch that failed. `exact` is
    true for the cloud's own times, false for those of a launcher, which notices late.
    `usd_per_hour` is for all nodes together.
    """

    cluster: str
    start: float
    end: float | None
    origin: str
    was_up: bool = True
    exact: bool = False
    nodes: int = 1
    usd_per_hour: float | None = None
    price_source: str | None = None
    cloud: str | None = None
    region: str | None = None
    zone: str | None = None
    instance_type: str | None = None
    spot: bool | None = None
    job: str | None = None


@dataclass(frozen=True)
class Instance:
    """A machine as the cloud itself lists it; `end` is None while it runs, or when the cloud does not say."""

    ORIGIN: ClassVar[str] = "EC2's list of instances"

    cluster: str
    start: float
    end: float | None
    running: bool


@dataclass(frozen=True)
class Stretch:
    """Time of a machine outside its segments. `segment` is the one it belongs to, None for a machine without."""

    phase: str
    start: float
    end: float
    uptime: Uptime
    segment: Segment | None = None


@dataclass(frozen=True)
class StorageRates:
    """What a store charges, in dollars."""

    name: str
    usd_per_gb_month: float
    usd_per_million_writes: float
    usd_per_million_reads: float
    usd_per_gb_egress: float
    source: str


@dataclass(frozen=True)
class StorageUse:
    """What the objects below the run folder take."""

    objects: int
    bytes: int
    checkpoint_bytes: int
    rates: StorageRates | None = None


@dataclass(frozen=True)
class Origin:
    """Where a figure is from, or why it is not there."""

    figure: str
    source: str


@dataclass
class Run:
    """A run folder. `config` is what run.json holds, empty when there is none.

    `around` is what others' records add to the segments' time (costs.uptime), `storage` what its objects take.
    """

    url: str
    segments: list[Segment] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    stage: str | None = None
    around: list[Stretch] = field(default_factory=list)
    storage: StorageUse | None = None
    origins: list[Origin] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
