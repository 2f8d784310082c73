"""SkyPilot's records and catalog. The only module that imports SkyPilot, and only when it is asked something.

The project's folder `sky/` (task YAMLs) lies beside this code: where SkyPilot is not installed, `import sky` finds
that folder and succeeds. What was imported is therefore checked.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Mapping
from typing import Any

from clouds.base import MachineRecord, Unavailable

ORIGIN = "SkyPilot cluster records"
DAYS = 365


def package() -> Any:
    """The SkyPilot package. Raises Unavailable."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # its database migrations speak at every import
    try:
        module = importlib.import_module("sky")
    except ImportError as error:
        raise Unavailable(f"SkyPilot is not installed ({error})") from None
    if not hasattr(module, "__version__"):
        del sys.modules["sky"]  # our folder of YAML, as a namespace package
        raise Unavailable("SkyPilot is not installed")
    return module


def catalog_rows(cloud: str) -> list[dict[str, Any]]:
    """Rows of SkyPilot's catalog of a cloud, as it keeps them on this machine. Raises Unavailable."""
    package()
    from sky.catalog import common

    try:
        return common.read_catalog(f"{cloud}/vms.csv").to_dict("records")
    except Exception as error:  # network, a damaged file: SkyPilot raises whatever its libraries do
        raise Unavailable(f"SkyPilot has no catalog of {cloud} ({type(error).__name__})") from error


def uptimes() -> list[MachineRecord]:
    """All clusters that SkyPilot remembers, those of managed jobs among them, asked for once. Raises Unavailable."""
    records, refusal = _cost_records()
    if refusal:
        raise Unavailable(refusal)
    return [uptime for record in records for uptime in from_record(record)]


@functools.cache
def _cost_records() -> tuple[list[Mapping[str, Any]], str]:
    try:
        sky = package()
        return sky.get(sky.cost_report(days=DAYS)), ""
    except Unavailable as error:
        return [], str(error)
    except Exception as error:  # no API server, no network: whatever its client raises
        return [], f"SkyPilot's API server did not answer ({type(error).__name__})"


def jobs() -> list[Mapping[str, Any]]:
    """SkyPilot's managed jobs: id, name, status, recoveries. Raises Unavailable."""
    sky = package()
    try:
        return list(sky.get(sky.jobs.queue_v2(refresh=False, all_users=False))[0])
    except Exception as error:  # no controller, no API server
        raise Unavailable(f"SkyPilot has no list of managed jobs ({type(error).__name__})") from error


def from_record(record: Mapping[str, Any]) -> list[MachineRecord]:
    """One stretch per usage interval of a record of `sky.cost_report`.

    Intervals open at the launch attempt and close when SkyPilot notices that the machine is gone. A record whose
    cluster never got nodes is of a launch that failed; SkyPilot's own report charges for it.
    """
    resources = record.get("resources")
    nodes = record.get("num_nodes") or 1
    price = _usd_per_hour(resources)
    # Nodes are named once they exist; records of releases before that column give no evidence either way.
    failed = "node_names" in record and not record["node_names"] and _ended(record)
    job = _job_of(str(record.get("name") or ""))
    return [
        MachineRecord(
            cluster=str(record.get("name")),
            start=float(start),
            end=None if end is None else float(end),
            origin=ORIGIN,
            was_up=not failed,
            nodes=nodes,
            usd_per_hour=None if price is None else price * nodes,
            price_source=None if price is None else "SkyPilot catalog, today's price",
            cloud=_lower(_of(resources, "cloud") or record.get("cloud")),
            region=_of(resources, "region") or record.get("region"),
            zone=_of(resources, "zone"),
            instance_type=_of(resources, "instance_type"),
            spot=_of(resources, "use_spot"),
            job=job,
        )
        for start, end in record.get("usage_intervals") or []
    ]


def _ended(record: Mapping[str, Any]) -> bool:
    status = record.get("status")
    return status is None or str(status) in ("TERMINATED", "None")


def _usd_per_hour(resources: Any) -> float | None:
    """List price of one node. SkyPilot counts a lookup that fails as zero dollars; here it is not known."""
    try:
        price = float(resources.get_cost(3600))
    except Exception:  # the type left the catalog, or the record has no resources
        return None
    return price if price > 0 else None


def _job_of(cluster: str) -> str | None:
    """Clusters of managed jobs are named <job>-<id>."""
    name, _, number = cluster.rpartition("-")
    return number if name and number.isdigit() else None


def _of(resources: Any, name: str) -> Any:
    return getattr(resources, name, None)


def _lower(value: Any) -> str | None:
    return None if value is None else str(value).lower()
