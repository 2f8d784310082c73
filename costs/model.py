"""Represents what other sources know of a run, as plain values that a report adds to the ledger."""

from dataclasses import dataclass, field

from clouds.base import MachineRecord
from core.run.machine import Price
from core.run.model import Segment


@dataclass(frozen=True)
class OutsideTime:
    """Time of a machine outside of segments. It belongs to `segment`, None for a machine without segments."""

    phase: str
    start: float
    end: float
    uptime: MachineRecord
    segment: Segment | None = None

    @property
    def price(self) -> Price | None:
        """The machine's price by the ledger, or else by the launcher."""
        return (self.segment and self.segment.price) or self.uptime.price


@dataclass(frozen=True)
class StorageRates:
    """List prices of a store, in dollars."""

    name: str
    usd_per_gb_month: float
    usd_per_million_writes: float
    usd_per_million_reads: float
    usd_per_gb_egress: float
    source: str


@dataclass(frozen=True)
class StorageUse:
    """Number and bytes of the objects below the run folder."""

    objects: int
    bytes: int
    checkpoint_bytes: int
    rates: StorageRates | None = None
    unfinished_uploads: int = 0  # running or interrupted; their parts are billed but not listed


@dataclass(frozen=True)
class Origin:
    """The source of a figure, or the reason why it is missing."""

    figure: str
    source: str


@dataclass
class Outside:
    """All that other sources add to a run: time of machines outside of segments, storage, origins of figures, notes."""

    times: list[OutsideTime] = field(default_factory=list)
    storage: StorageUse | None = None
    origins: list[Origin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
