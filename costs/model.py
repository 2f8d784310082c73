"""What others know of a run beside its own folder: plain values that a report adds to the ledger."""

from dataclasses import dataclass, field
from typing import ClassVar

from core.run.machine import Price
from core.run.model import Segment


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

    @property
    def price(self) -> Price | None:
        return None if self.usd_per_hour is None else Price(self.usd_per_hour, self.price_source or "?")


@dataclass(frozen=True)
class Instance:
    """A machine as the cloud itself lists it; `end` is None while it runs, or when the cloud does not say."""

    ORIGIN: ClassVar[str] = "EC2's list of instances"

    cluster: str
    start: float
    end: float | None
    running: bool


@dataclass(frozen=True)
class OutsideTime:
    """Time of a machine outside its segments. `segment` is the one it belongs to, None for a machine without."""

    phase: str
    start: float
    end: float
    uptime: Uptime
    segment: Segment | None = None

    @property
    def price(self) -> Price | None:
        """One machine has one price: the ledger's, or the launcher's where the ledger has none."""
        return (self.segment and self.segment.price) or self.uptime.price


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
class Outside:
    """All that other sources add to a run: time of its machines outside the segments, what its objects take, where each
    figure is from, and sentences for the reader."""

    times: list[OutsideTime] = field(default_factory=list)
    storage: StorageUse | None = None
    origins: list[Origin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
