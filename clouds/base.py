"""Declares Cloud, the interface of a cloud provider, and the values that its methods return.

A provider is a subclass of `Cloud` in a file of this folder, with an entry in CLOUDS of clouds/providers.py. A provider
overrides only the methods of services that it has. The other methods return an empty result. If a service does not
answer, its method raises Unavailable, or an error of the library that the method uses.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.run.machine import Machine, Price
from core.task import TaskSpec

# Each task in sky/ gives its machines this label, so that the machines can be found in a provider's list.
LABEL = ("project", "pretrain-launcher")


class Unavailable(Exception):
    """A provider cannot answer. The message is the reason, which becomes part of a longer sentence."""


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi. A figure is None if the driver does not report it.

    `fault` is an error that the driver reports.
    """

    name: str
    memory_mib: float | None
    driver: str
    uncorrected_ecc_errors: int | None
    failed_row_remaps: int | None
    fault: str | None = None


@dataclass(frozen=True)
class MachineFacts:
    """One node, as SkyPilot, the provider and the driver describe it. None means unknown."""

    cloud: str | None = None
    region: str | None = None
    zone: str | None = None
    instance_type: str | None = None
    spot: bool | None = None
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True)
class Offer:
    """One instance type in one zone.

    Prices are in dollars per hour, on demand and on spot. A price is None if there is no such offer.
    """

    cloud: str
    region: str
    zone: str | None
    instance_type: str
    accelerator: str | None
    accelerators: int
    vcpus: float | None
    memory_gb: float | None
    arch: str | None
    usd_on_demand: float | None
    usd_spot: float | None


@dataclass(frozen=True)
class Finding:
    """A line of `make check`. Its mark is `ok`, `!` (a warning), `x` (a launch would fail) or `?` (no answer)."""

    mark: str
    what: str

    def __str__(self) -> str:
        return f"{self.mark:>2}  {self.what}"


@dataclass(frozen=True)
class Ownership:
    """Finds the owner of a machine by the name of its SkyPilot cluster: NAME-HASH, where HASH is the user's.

    `tasks` are the names of this project's tasks. `user` is this user's hash, or "" if it is unknown. `ours` and
    `others` are clusters of this user that SkyPilot lists, by their names on the cloud: `ours` belong to this project,
    `others` to other projects.
    """

    tasks: tuple[str, ...] = ()
    user: str = ""
    ours: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()

    def is_by_this_user(self, cluster: str) -> bool:
        return cluster in self.ours or bool(self.user and cluster.endswith(f"-{self.user}"))

    def is_named_as_ours(self, cluster: str) -> bool:
        """Whether a name is one that SkyPilot gives to clusters or managed jobs of this project's tasks."""
        names = "|".join(map(re.escape, self.tasks))
        return bool(names and re.fullmatch(rf"({names})(-\d+)?-[0-9a-f]{{8}}", cluster))

    def is_mine(self, cluster: str, labelled: bool) -> bool:
        """Whether this user started a cluster for this project."""
        known = cluster in self.ours or labelled or self.is_named_as_ours(cluster) or is_controller(cluster)
        return cluster not in self.others and known and self.is_by_this_user(cluster)


def is_controller(cluster: str) -> bool:
    """Whether a cluster is SkyPilot's controller of managed jobs, of which each user has one."""
    return cluster.startswith("sky-jobs-controller-")


@dataclass(frozen=True)
class Leftover:
    """A machine or volume that is running, or may still be billed.

    `cluster` is the name of its SkyPilot cluster on the cloud. `mine` means that this user started it for this project,
    `labelled` that it has this project's label. The function `end` ends it without SkyPilot. `end` is None if only
    SkyPilot can end it.
    """

    what: str
    mine: bool = False
    labelled: bool = False
    cluster: str = ""
    end: Callable[[], object] | None = None

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class Inventory:
    """The machines and volumes that a source lists.

    `unasked` has a sentence for each part of the source that could not be asked.
    """

    found: tuple[Leftover, ...] = ()
    unasked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Interruption:
    """A provider's notice about this machine. `leave` is true if the provider will take the machine away.

    If `leave` is false, only the risk of a preemption has grown.
    """

    leave: bool
    detail: str


@dataclass(frozen=True)
class MachineRecord:
    """One machine or cluster, from launch to shutdown, as a launcher or a provider recorded it.

    `end` is None while the machine is up. `was_up` is false if the launch failed before there was a machine. `exact` is
    true if the times are from the provider. A launcher's times are not exact, because it notices a shutdown late.
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
    run: str | None = None
    idle_seconds: float | None = None
    disk_gb: float | None = None

    @property
    def price(self) -> Price | None:
        return None if self.usd_per_hour is None else Price(self.usd_per_hour, self.price_source or "?")


@dataclass(frozen=True)
class Billing:
    """A provider's rules for the bill of a machine: whole units of `unit_seconds`, at least `least_seconds`.

    The bill begins at the launch or, if `from_ready` is true, when the machine is ready.
    """

    unit_seconds: float = 1.0
    least_seconds: float = 0.0
    from_ready: bool = False


@dataclass(frozen=True)
class Instance:
    """A machine in a provider's own list.

    `end` is None while the machine runs, or if the provider does not report its end.
    """

    cluster: str
    start: float
    end: float | None
    running: bool
    origin: str


@dataclass(frozen=True)
class SpotHistory:
    """The history of the spot price of one node.

    A change is a pair: the unix time from which the price holds, and the price in dollars per hour.
    """

    changes: tuple[tuple[float, float], ...]
    source: str

    def mean(self, start: float, end: float) -> float:
        """The mean price in dollars per hour over [start, end], weighted by time.

        Raises Unavailable if the history begins after `start`.
        """
        changes = sorted(self.changes)
        if not changes or changes[0][0] > start or end <= start:
            raise Unavailable("the price history does not reach back to the start")
        total = 0.0
        for (since, price), until in zip(changes, [when for when, _ in changes[1:]] + [end], strict=True):
            total += price * max(0.0, min(until, end) - max(since, start))
        return total / (end - start)


@dataclass(frozen=True)
class Bill:
    """A provider's bill for everything with a certain tag, in dollars by service."""

    source: str
    by_service: Mapping[str, float]


class Cloud:
    """A provider of machines. `name` is its name in SkyPilot, in lower case."""

    name = ""
    # The file of the user's keys, which SkyPilot copies to nodes; "" if SkyPilot copies no such file.
    key_file = ""
    # The identity that a node gets on its cloud if the project does not name a role; "" if the cloud has no roles.
    default_role = ""
    billing = Billing()

    def offers(self) -> tuple[Offer, ...]:
        """Instance types with the prices of the snapshot in clouds/catalog."""
        return ()

    def facts(self, known: MachineFacts, environment: Mapping[str, str]) -> MachineFacts:
        """`known`, completed by the provider's facts about this machine."""
        return known

    def price(self, facts: MachineFacts) -> Price | None:
        """The price of this node, without the other nodes of its cluster. None if it is unknown."""
        return None

    def interruptions(self, environment: Mapping[str, str]) -> Callable[[], Interruption | None] | None:
        """A function that asks for the newest notice about this machine.

        It raises Unavailable if the provider does not answer.
        """
        return None

    def quota_findings(self, task: TaskSpec) -> Iterable[Finding]:
        """Compares the account's quotas with the machines of a task."""
        return ()

    def capacity_findings(self, task: TaskSpec) -> Iterable[Finding]:
        """Looks for regions that have the machines of a task now."""
        return ()

    def transfer_findings(self, task: TaskSpec, bucket_url: str, data_bytes: int) -> Iterable[Finding]:
        """The costs of the traffic if the machines of a task read the data from a bucket of this provider."""
        return ()

    def opens_buckets(self, service: str) -> bool:
        """Whether a machine can open buckets of a storage service by its role, without keys."""
        return False

    def is_configured(self) -> bool:
        """Whether this computer has credentials for the provider.

        If the credentials are broken, raises the error of the provider's library.
        """
        return False

    def copies_key_file(self, environment: Mapping[str, str]) -> bool:
        """Whether this computer has the file of keys that SkyPilot copies to nodes."""
        return bool(self.key_file) and Path(self.key_file).expanduser().exists()

    def leftovers(self, whose: Ownership) -> Inventory:
        """Machines and volumes of all users that may belong to this project.

        Called only if the provider is configured.
        """
        return Inventory()

    def instances(self, clusters: Sequence[str], region: str) -> list[Instance]:
        """Machines of these SkyPilot clusters that are running or ended recently."""
        return []

    def paid_spot(self, machine: Machine, start: float, end: float) -> SpotHistory | None:
        """Spot prices of a machine's type and zone from `start` to `end` (unix seconds)."""
        return None

    def bill(self, tag: str, value: str, start: float, end: float) -> Bill | None:
        """The bill of whole days from `start` to `end` (unix seconds) under a cost allocation tag."""
        return None

    def traffic_usd_per_gb(self, url: str, cloud: str | None, region: str | None) -> tuple[float, float] | None:
        """Two prices in dollars per GB: for reading from a bucket of this provider, and for writing to the bucket.

        None for a bucket of another provider. Raises Unavailable if the bucket's region is not known.
        """
        return None

    def unfinished_uploads(self, url: str) -> int | None:
        """The number of unfinished multipart uploads below a URL. None if they cannot be counted."""
        return None
