"""Declares the values that a report adds to those of the ledger: outside time, storage, and origins of figures."""

from dataclasses import dataclass, field

from clouds.base import MachineRecord
from core.run.budget import Budget
from core.run.machine import Price
from core.run.model import Segment


@dataclass(frozen=True)
class OutsideTime:
    """Time of a machine in which no segment ran. `segment` is one that ran on this machine before or after, if any.

    `more_seconds` may come on top, because no source knows the moment at which the cloud's bill begins or ends. Of
    `free` time the cloud's bill is zero.
    """

    phase: str
    start: float
    end: float
    record: MachineRecord
    segment: Segment | None = None
    more_seconds: float = 0.0
    free: bool = False

    @property
    def price(self) -> Price | None:
        """The ledger's price of this machine, else the launcher's."""
        return (self.segment and self.segment.price) or self.record.price

    @property
    def usd(self) -> float | None:
        return self.price and (0.0 if self.free else self.price.usd(self.end - self.start))


@dataclass(frozen=True)
class Charge:
    """Dollars of a run that no machine's hour holds, spread over [start, end] (unix seconds).

    `segment` is None for what no segment caused.
    """

    phase: str
    start: float
    end: float
    usd: float
    source: str
    segment: Segment | None = None


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
    data_bytes: int | None = None  # of the token set that the run reads, which other runs may read too
    unfinished_uploads: int = 0  # multipart uploads, running or cut off: billed, but not in a listing


@dataclass(frozen=True)
class Stretch:
    """Time of one machine in which one phase took most of it. `lane` counts machines that were up at the same time."""

    lane: int
    segment: str
    machine: str
    phase: str
    start: float
    end: float


@dataclass(frozen=True)
class Origin:
    """The source of a figure, or the reason for its absence."""

    figure: str
    source: str


@dataclass
class Outside:
    """Everything that other sources add to a run, with the origin of each figure and notes for the reader.

    `missing` names the sources that apply to the run and gave no answer. `more_seconds` are, by segment number, the
    seconds that may come on top of its ledger, and `neighbours` the segments of other runs on the run's machines. If no
    source was asked, `is_asked` is false. `factor` multiplies all dollars: tax and discounts.
    """

    times: list[OutsideTime] = field(default_factory=list)
    charges: list[Charge] = field(default_factory=list)
    factor: float = 1.0
    more_seconds: dict[int, float] = field(default_factory=dict)
    neighbours: list[Segment] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    is_asked: bool = False
    ledger_usd: float | None = None  # of the run, before prices paid replaced those of its ledger
    storage: StorageUse | None = None
    budget: Budget | None = None  # in force, of a run that `make run` launched
    origins: list[Origin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
