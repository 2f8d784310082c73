"""What others know of a run beside its own folder: plain values that a report adds to the ledger."""

from dataclasses import dataclass, field

from clouds.base import MachineRecord
from core.run.machine import Price
from core.run.model import Segment


@dataclass(frozen=True)
class OutsideTime:
    """Time of a machine outside its segments. `segment` is the one it belongs to, None for a machine without."""

    phase: str
    start: float
    end: float
    record: MachineRecord
    segment: Segment | None = None

    @property
    def price(self) -> Price | None:
        """One machine has one price: the ledger's, or the launcher's where the ledger has none."""
        return (self.segment and self.segment.price) or self.record.price


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
    unfinished_uploads: int = 0  # running, or cut off: their parts are billed and are in no listing


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
