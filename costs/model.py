"""Declares the values that a report adds to those of the ledger: outside time, storage, and origins of figures."""

from dataclasses import dataclass, field

from clouds.base import MachineRecord
from core.run.machine import Price
from core.run.model import Segment


@dataclass(frozen=True)
class OutsideTime:
    """Time of a machine in which no segment ran. `segment` is one that ran on this machine before or after, if any."""

    phase: str
    start: float
    end: float
    record: MachineRecord
    segment: Segment | None = None

    @property
    def price(self) -> Price | None:
        """The ledger's price of this machine, else the launcher's."""
        return (self.segment and self.segment.price) or self.record.price


@dataclass(frozen=True)
class StorageRates:
    """Prices of a store, in dollars."""

    name: str
    usd_per_gb_month: float
    usd_per_million_writes: float
    usd_per_million_reads: float
    usd_per_gb_egress: float
    source: str


@dataclass(frozen=True)
class StorageUse:
    """Storage of the objects below a run folder."""

    objects: int
    bytes: int
    checkpoint_bytes: int
    rates: StorageRates | None = None
    unfinished_uploads: int = 0  # multipart uploads, running or cut off: billed, but not in a listing


@dataclass(frozen=True)
class Origin:
    """The source of a figure, or the reason for its absence."""

    figure: str
    source: str


@dataclass
class Outside:
    """Everything that other sources add to a run, with the origin of each figure and notes for the reader."""

    times: list[OutsideTime] = field(default_factory=list)
    storage: StorageUse | None = None
    origins: list[Origin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
