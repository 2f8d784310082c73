"""What providers tell about machines, in plain values, and how they say that they cannot."""

from dataclasses import dataclass
from typing import ClassVar

from core.run.machine import Price


class Unavailable(Exception):
    """A provider cannot answer; the message says why, as a part of a sentence."""


@dataclass(frozen=True)
class MachineRecord:
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
