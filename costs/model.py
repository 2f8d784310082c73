"""Declares the values that a report adds to the ledger's values: outside time, storage, and origins of figures."""

from dataclasses import dataclass, field

from clouds.base import MachineRecord
from core.run.budget import Budget
from core.run.machine import Price
from core.run.model import Segment


@dataclass(frozen=True)
class OutsideTime:
    """Time of a machine in which no segment ran.

    `segment` is a segment that ran on this machine before or after that time, if there is one. `more_seconds` may have
    to be added, because no source knows when the cloud's bill begins or ends. `free` time is not billed.
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
        """The price of this machine in the ledger or, if the ledger has no price, in the launcher's record."""
        return (self.segment and self.segment.price) or self.record.price

    @property
    def usd(self) -> float | None:
        return self.price and (0.0 if self.free else self.price.usd(self.end - self.start))


@dataclass(frozen=True)
class Charge:
    """Dollars of a run other than for machine hours, spread over [start, end] (unix seconds).

    `segment` is None if no segment caused the charge.
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
    data_bytes: int | None = None  # bytes of the run's token set, which other runs may read too
    # Bytes of running or interrupted multipart uploads. The store bills them, but a listing does not show them.
    unfinished_uploads: int = 0


@dataclass(frozen=True)
class Stretch:
    """A stretch of one machine's time in which one phase took most of the time.

    Machines that were up at the same time have different numbers as their `lane`.
    """

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

    `missing` names the sources that apply to the run and gave no answer. `more_seconds` holds, by segment number, the
    seconds that may have to be added to the segment. `neighbours` are segments of other runs on the run's machines.
    `is_asked` is false if no source was asked. All dollars are multiplied by `factor`, for tax and discounts.
    """

    times: list[OutsideTime] = field(default_factory=list)
    charges: list[Charge] = field(default_factory=list)
    factor: float = 1.0
    more_seconds: dict[int, float] = field(default_factory=dict)
    neighbours: list[Segment] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    is_asked: bool = False
    # Dollars of the run at the prices in the ledger. Other dollars use the prices paid, if they are known.
    ledger_usd: float | None = None
    storage: StorageUse | None = None
    budget: Budget | None = None  # the run's newest budget, if `make run` launched the run
    origins: list[Origin] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
