"""The run folder: whose run it is, and what a machine is told about itself.

RUN_URL/run.json    written once, by the first segment: the settings and the data that define this run
"""

import json
import logging
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core import storage
from core.errors import ConfigError, ObjectExists, RunError
from core.ledger import Machine

log = logging.getLogger(__name__)

NAME = "run.json"
VERSION = 1


def open_run(run_url: str, identity: Mapping[str, Any], config: Mapping[str, Any], data_fingerprint: str) -> bool:
    """Create the run, or check that the one at `run_url` has the same settings and data. True if created.

    `identity` holds the flat settings that define the result. Raises RunError naming what differs.
    """
    uri = storage.join(run_url, NAME)
    document = {
        "format": "run",
        "version": VERSION,
        "identity": dict(identity),
        "data_fingerprint": data_fingerprint,
        "config": dict(config),
    }
    try:
        storage.write_bytes(uri, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode(), exclusive=True)
        return True
    except ObjectExists:
        pass
    stored = read_run(run_url)
    remedy = "use the settings it was started with, or another run.url"
    for key in sorted({*stored["identity"], *identity}):
        there, here = stored["identity"].get(key), identity.get(key)
        if _plain(there) != _plain(here):
            raise RunError(f"{run_url}: holds a run with {key}={there!r}, this config has {key}={here!r}; {remedy}")
    if stored["data_fingerprint"] != data_fingerprint:
        raise RunError(
            f"{run_url}: this run was started on data {stored['data_fingerprint'][:12]}…, "
            f"data.url now holds {data_fingerprint[:12]}…; "
            "point data.url at the data it was started on, or use another run.url"
        )
    return False


def read_run(run_url: str) -> dict[str, Any]:
    """The stored run.json. Raises ObjectNotFound, RunError."""
    uri = storage.join(run_url, NAME)
    try:
        document = json.loads(storage.read_bytes(uri))
        if document["format"] != "run" or document["version"] != VERSION:
            raise ValueError(f"format {document['format']!r} version {document['version']!r}")
        document["identity"], document["config"], document["data_fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{uri}: is no run description of this release ({error}); use another run.url") from error
    return document


def machine_from_environment(
    gpu: str | None, gpus_per_node: int, environment: Mapping[str, str] = os.environ
) -> Machine:
    """What the launcher told us about this node, by variables (.env.example lists them).

    SkyPilot gives cloud, region and zone in SKYPILOT_CLUSTER_INFO; ours win over it. An absent price stays None.
    Raises ConfigError for a price or node count that is no number above zero.
    """
    try:
        cluster = json.loads(environment.get("SKYPILOT_CLUSTER_INFO") or "{}")
    except ValueError:
        cluster = {}
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


def program_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Python, platform, git revision, image and package versions, for the record.

    GIT_REVISION is set in the image, IMAGE_DIGEST by launch/container.sh; elsewhere the checkout itself is asked.
    """
    from importlib import metadata

    versions = {"python": platform.python_version(), "platform": platform.platform()}
    revision = os.environ.get("GIT_REVISION") or _revision_of_checkout()
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


def _revision_of_checkout() -> str | None:
    """Commit of the working tree, marked if files differ from it; None without git or outside of a checkout."""
    git = ["git", "-C", str(Path(__file__).parent.parent), "describe", "--always", "--abbrev=40", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def process_started_at() -> float:
    """When this process began (unix seconds), so that imports are booked too. Now, where the system cannot tell."""
    try:
        ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()


def segment_started_at() -> float | None:
    """SEGMENT_STARTED_AT (unix seconds): when the machine's paid time for this segment began, if the launcher knows."""
    text = os.environ.get("SEGMENT_STARTED_AT")
    try:
        return float(text) if text else None
    except ValueError:
        log.warning("environment variable SEGMENT_STARTED_AT is %r, not a unix time; ignored", text)
        return None


def positive(environment: Mapping[str, str], name: str) -> float | None:
    """The number in a variable, None if it is empty. Raises ConfigError unless it is above zero."""
    text = environment.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(
            f"environment variable {name} is {text!r}, must be a number above zero; leave it empty if it is not known"
        )
    return value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
