"""Describes the machine of a segment, its price and the program's versions, mostly from environment variables."""

import json
import logging
import math
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from core.environment import positive

log = logging.getLogger(__name__)

REPOSITORY = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Price:
    """US dollars per hour of all nodes together, and the source of that figure."""

    usd_per_hour: float
    source: str

    def usd(self, seconds: float) -> float:
        return seconds / 3600 * self.usd_per_hour

    def seconds(self, usd: float) -> float:
        """The machine time, in seconds, that `usd` dollars pay for."""
        return usd / self.usd_per_hour * 3600


@dataclass(frozen=True)
class Machine:
    """The machine of a segment. None means unknown, which a report prints as `?` and never counts as zero.

    `usd_per_hour` is the price of all `nodes` together, `price_source` the source of that figure.
    """

    cloud: str | None = None
    region: str | None = None
    zone: str | None = None
    instance_type: str | None = None
    gpu: str | None = None
    gpus_per_node: int = 0
    nodes: int = 1
    spot: bool | None = None
    usd_per_hour: float | None = None
    price_source: str | None = None
    host: str | None = None

    @cached_property
    def price(self) -> Price | None:
        """The price, or None if it is unknown."""
        if self.usd_per_hour is None or not 0 < self.usd_per_hour < math.inf:
            return None
        return Price(self.usd_per_hour, self.price_source or "ledger, without a source")


def machine_from_environment(
    gpu: str | None, gpus_per_node: int, environment: Mapping[str, str] = os.environ
) -> Machine:
    """The machine that the launcher's variables describe (docs/environment.md lists them).

    CLOUD, REGION and ZONE have precedence over SkyPilot's values in SKYPILOT_CLUSTER_INFO. A missing price stays None.
    Raises ConfigError if a given price or node count is not a number above zero.
    """
    cluster = cluster_info(environment)
    price = positive(environment, "USD_PER_HOUR")
    spot = environment.get("USE_SPOT")
    return Machine(
        cloud=environment.get("CLOUD") or cluster.get("cloud"),
        region=environment.get("REGION") or cluster.get("region"),
        zone=environment.get("ZONE") or cluster.get("zone"),
        instance_type=environment.get("INSTANCE_TYPE"),
        gpu=gpu,
        gpus_per_node=gpus_per_node,
        nodes=int(positive(environment, "SKYPILOT_NUM_NODES") or 1),
        spot=None if not spot else spot.lower() in ("1", "true", "yes"),
        usd_per_hour=price,
        price_source=(environment.get("PRICE_SOURCE") or "USD_PER_HOUR variable") if price else None,
        host=socket.gethostname(),
    )


def launcher_facts(environment: Mapping[str, str]) -> dict[str, str]:
    """SkyPilot's ids of this machine and its job, by which a cost report finds SkyPilot's records."""
    facts = {
        "task_id": environment.get("SKYPILOT_TASK_ID"),
        "managed_job_id": environment.get("SKYPILOT_MANAGED_JOB_ID"),
        "node_ips": environment.get("SKYPILOT_NODE_IPS"),
        "cluster": cluster_info(environment).get("cluster_name"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def program_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of Python, platform, git revision, image and `packages`.

    The image sets GIT_REVISION, and launch/node/container.sh sets IMAGE_DIGEST. If GIT_REVISION is not set, git is
    called.
    """
    from importlib import metadata  # imported here: it takes 20 ms, and not every command needs it

    versions = {"python": platform.python_version(), "platform": platform.platform()}
    revision = os.environ.get("GIT_REVISION") or checkout_revision()
    if revision:
        versions["git_revision"] = revision
    if os.environ.get("IMAGE_DIGEST"):
        versions["image"] = os.environ["IMAGE_DIGEST"]
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def process_started_at() -> float:
    """The unix time at which this process started, before its imports.

    If /proc does not show it, this is the current time.
    """
    try:
        ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()


def segment_started_at() -> float | None:
    """SEGMENT_STARTED_AT (unix s), the start of the segment's paid time, if the launcher sets it."""
    text = os.environ.get("SEGMENT_STARTED_AT")
    try:
        return float(text) if text else None
    except ValueError:
        log.warning("environment variable SEGMENT_STARTED_AT is %r, not a unix time; ignored", text)
        return None


def cluster_info(environment: Mapping[str, str]) -> Mapping[str, object]:
    """SkyPilot's description of the cluster: cluster_name, cloud, region, zone.

    It is empty if SkyPilot did not start this machine.
    """
    try:
        found = json.loads(environment.get("SKYPILOT_CLUSTER_INFO") or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, Mapping) else {}


def checkout_revision(repository: Path = REPOSITORY) -> str:
    """Commit of the working tree, followed by + if files were changed; "" without git or outside of a checkout.

    The result is also "" if this code was copied into another repository, whose commit does not identify this code.
    """
    described = ["describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        top = _git(repository, ["rev-parse", "--show-toplevel"])
        return _git(repository, described) if Path(top).samefile(repository) else ""
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(repository: Path, arguments: list[str]) -> str:
    # Git refuses a checkout that belongs to another user, as in a container that mounts it. The option allows this
    # checkout, whose code runs anyway.
    command = ["git", "-C", str(repository), "-c", f"safe.directory={repository}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
