"""Describes this node and its price for the ledger. The sources are SkyPilot, the provider and price catalogs.

    os.environ.update(describe(os.environ, gpus()))

Nothing is guessed: the variable of an unknown fact stays unset, and each price is stored with its source.
"""

import dataclasses
import logging
import subprocess
from collections.abc import Mapping

from clouds.base import Gpu, MachineFacts
from clouds.providers import cloud_named
from core.commands import run_within
from core.run.machine import cluster_info

log = logging.getLogger(__name__)

# Time limit of nvidia-smi in seconds. Without persistence mode, nvidia-smi is slow, because the driver initialises all
# GPUs for each call.
NVIDIA_SMI_SECONDS = 60.0
# Words that nvidia-smi prints for a healthy GPU instead of a figure, with or without brackets.
NOT_REPORTED = {"N/A", "Not Supported", "Not Found", "Insufficient Permissions"}
NOT_REPORTED |= {"Requested functionality has been deprecated"}


def gpus() -> list[Gpu]:
    """The GPUs that the driver lists, including lost GPUs. The list is empty if there is no driver.

    The exit code of nvidia-smi is ignored: 14 is a warning, and 15 means that one GPU of several is lost.
    """
    fields = "name,memory.total,driver_version,ecc.errors.uncorrected.volatile.total,remapped_rows.failure"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = run_within(command, NVIDIA_SMI_SECONDS)
    except FileNotFoundError:
        return []
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("nvidia-smi: %s", error)
        return []
    found = []
    for line in filter(None, map(str.strip, done.stdout.splitlines() + done.stderr.splitlines())):
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == fields.count(",") + 1:
            found.append(_gpu(*cells))
        elif line.startswith("Unable to determine the device handle"):
            found.append(Gpu("?", None, "?", None, None, line))
        else:
            log.warning("nvidia-smi: %s", line)
    return found


def describe(environment: Mapping[str, str], found: list[Gpu]) -> dict[str, str]:
    """Values of the variables that core.run.machine.machine_from_environment reads.

    Values in `environment` have precedence.
    """
    cluster = cluster_info(environment)
    name = environment.get("CLOUD") or cluster.get("cloud")
    facts = MachineFacts(name, cluster.get("region"), cluster.get("zone"), gpus=tuple(found))
    cloud = cloud_named(name)
    facts = _corrected(cloud.facts(facts, environment) if cloud else facts, environment)
    variables = {
        "CLOUD": name,
        "REGION": facts.region,
        "ZONE": facts.zone,
        "INSTANCE_TYPE": facts.instance_type,
        "USE_SPOT": None if facts.spot is None else str(facts.spot).lower(),
    }
    if not environment.get("USD_PER_HOUR") and cloud and (price := cloud.price(facts)):
        nodes = int(environment.get("SKYPILOT_NUM_NODES") or 1)
        variables |= {"USD_PER_HOUR": f"{price.usd_per_hour * nodes:.6g}", "PRICE_SOURCE": price.source}
    return {key: value for key, value in variables.items() if value}


def _corrected(facts: MachineFacts, environment: Mapping[str, str]) -> MachineFacts:
    """`facts`, with the values that the user has set in `environment`."""
    spot = environment.get("USE_SPOT")
    return dataclasses.replace(
        facts,
        region=environment.get("REGION") or facts.region,
        zone=environment.get("ZONE") or facts.zone,
        instance_type=environment.get("INSTANCE_TYPE") or facts.instance_type,
        spot=spot.lower() in ("1", "true", "yes") if spot else facts.spot,
    )


def _gpu(name: str, memory: str, driver: str, ecc: str, remaps: str) -> Gpu:
    faults: list[str] = []
    figures = [_figure(cell, faults) for cell in (memory, ecc, remaps)]
    if name.startswith("["):
        faults.insert(0, name)
    mib, errors, failures = figures
    counts = [None if count is None else int(count) for count in (errors, failures)]
    return Gpu(name, mib, driver, *counts, faults[0] if faults else None)


def _figure(cell: str, faults: list[str]) -> float | None:
    """Converts a figure of nvidia-smi to a number. `No` and `Yes` become 0 and 1, `[N/A]` becomes None.

    Any other text is added to `faults`.
    """
    text = cell.strip("[]")
    if text in ("No", "Yes"):
        return float(text == "Yes")
    if text in NOT_REPORTED:
        return None
    try:
        return float(text)
    except ValueError:
        faults.append(cell)
        return None
