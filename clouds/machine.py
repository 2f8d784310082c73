"""What this node is and what it costs, for the ledger: from SkyPilot, the cloud's metadata service and price records.

    os.environ.update(describe(os.environ, gpus()))

Nothing here is guessed: what nobody tells stays unset, and a price says where it is from. Torch-free.
"""

import functools
import json
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from clouds import aws, prices
from clouds.base import Unavailable
from core.metadata import Metadata, NoAnswer

log = logging.getLogger(__name__)

# Without persistence mode the driver starts all GPUs for each call.
NVIDIA_SMI_SECONDS = 60.0
# What stands for a figure, in brackets or not, on a GPU that is well.
NOT_REPORTED = {"N/A", "Not Supported", "Not Found", "Insufficient Permissions"}
NOT_REPORTED |= {"Requested functionality has been deprecated"}
# The metadata service may need a while after the boot. Without it a price is not known, and a cap not possible.
METADATA_SECONDS = 20.0
METADATA_PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi: None where the driver does not report a figure, `fault` where it reports an error."""

    name: str
    memory_mib: float | None
    driver: str
    uncorrected_ecc_errors: int | None
    failed_row_remaps: int | None
    fault: str | None = None


def gpus() -> list[Gpu]:
    """The GPUs that the driver knows, lost ones included; none where there is no driver.

    The exit code of nvidia-smi does not count: 14 is a warning, and 15 means that one GPU of several is lost.
    """
    fields = "name,memory.total,driver_version,ecc.errors.uncorrected.volatile.total,remapped_rows.failure"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=NVIDIA_SMI_SECONDS)
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


def describe(
    environment: Mapping[str, str],
    found: list[Gpu],
    metadata: Callable[[str], str | None] | None = None,
    spot_price: Callable[[str, str, str], float | None] | None = None,
) -> dict[str, str]:
    """The variables of core.run.machine.machine_from_environment. What is set already wins."""
    try:
        cluster = json.loads(environment.get("SKYPILOT_CLUSTER_INFO") or "{}")
    except ValueError:
        cluster = {}
    cloud = environment.get("CLOUD") or cluster.get("cloud") or ""
    facts: dict[str, str | None] = {"CLOUD": cloud, "REGION": cluster.get("region"), "ZONE": cluster.get("zone")}
    if cloud.lower() == "aws":
        together = time.monotonic() + METADATA_SECONDS
        ask = metadata or functools.partial(instance_metadata, service=Metadata(environment), deadline=together)
        life_cycle = ask("instance-life-cycle")
        facts |= {
            "REGION": ask("placement/region") or facts["REGION"],
            "ZONE": ask("placement/availability-zone") or facts["ZONE"],
            "INSTANCE_TYPE": ask("instance-type"),
            "USE_SPOT": None if life_cycle is None else str(life_cycle == "spot").lower(),
        }
    elif cloud.lower() == "lambda":
        facts |= {"INSTANCE_TYPE": _only({offer.instance_type for offer in _lambda_offers(found)}), "USE_SPOT": "false"}
    facts |= {name: environment[name] for name in facts if environment.get(name)}
    if not environment.get("USD_PER_HOUR"):
        usd, source = _price_per_node(facts, found, spot_price or current_spot_price)
        if usd:
            nodes = int(environment.get("SKYPILOT_NUM_NODES") or 1)
            facts |= {"USD_PER_HOUR": f"{usd * nodes:.6g}", "PRICE_SOURCE": source}
    return {name: str(value) for name, value in facts.items() if value}


def instance_metadata(path: str, service: Metadata | None = None, deadline: float | None = None) -> str | None:
    """One value of AWS's metadata service, or None. Waits for an answer until `deadline` (monotonic)."""
    service = service or Metadata(os.environ)
    deadline = time.monotonic() + METADATA_SECONDS if deadline is None else deadline
    while not service.disabled:
        try:
            return (service.get(path) or "").strip() or None
        except NoAnswer as error:
            if time.monotonic() + METADATA_PAUSE_SECONDS > deadline:
                log.warning("this machine's %s is not known: %s", path, error)
                return None
            time.sleep(METADATA_PAUSE_SECONDS)
    return None


def current_spot_price(zone: str, instance_type: str, region: str) -> float | None:
    """The spot price in force now, if this machine's role may ask for it (ec2:DescribeSpotPriceHistory)."""
    now = time.time()
    try:
        history = aws.spot_history(zone, instance_type, region, now, now)
    except Unavailable as problem:
        log.info("spot price: AWS does not tell (%s)", problem)
        return None
    return max(history)[1] if history else None


def _price_per_node(facts: Mapping[str, str | None], found: list[Gpu], spot_price) -> tuple[float | None, str]:
    cloud, region, instance_type = ((facts.get(name) or "").lower() for name in ("CLOUD", "REGION", "INSTANCE_TYPE"))
    if cloud == "lambda":
        # Lambda has one price for a type, whatever the region; the snapshot holds only some regions.
        offers = [o for o in _lambda_offers(found) if instance_type in ("", o.instance_type)]
        return _only({offer.usd_on_demand for offer in offers}), prices.SNAPSHOT
    if not instance_type or facts.get("USE_SPOT") is None:
        return None, ""
    if facts["USE_SPOT"] == "false":
        return prices.on_demand_price(cloud, region, instance_type), prices.SNAPSHOT
    usd = spot_price(facts.get("ZONE") or "", instance_type, region)
    if usd:
        return usd, aws.PRICE_SOURCE
    offers = [o for o in prices.snapshot().offers if (o.instance_type, o.region) == (instance_type, region)]
    spread = prices.spot_range(offers)
    return spread[1] if spread else None, f"median over the zones of {region}, {prices.SNAPSHOT}"


def _lambda_offers(found: list[Gpu]) -> list[prices.Offer]:
    """Lambda's nodes do not say their type: the offers that have as many GPUs of this kind."""
    offers = [offer for offer in prices.snapshot().offers if offer.cloud == "lambda"]
    healthy = [gpu for gpu in found if not gpu.fault]
    return [o for o in offers if o.accelerators == len(found) and all(is_a(gpu, o) for gpu in healthy[:1])]


def is_a(gpu: Gpu, offer: prices.Offer) -> bool:
    """Whether a GPU is what the offer calls its accelerator: "NVIDIA A100-SXM4-80GB" is an A100-80GB, no A100."""
    kind, eighty, _ = (offer.accelerator or "?").partition("-80GB")
    if kind == "A100" and gpu.memory_mib is not None and bool(eighty) != (gpu.memory_mib > 60_000):
        return False
    return re.search(rf"\b{re.escape(kind)}\b", gpu.name) is not None  # an A10 is no A100


def _only(values: set):
    """The one value, or None if there are several or none."""
    return next(iter(values)) if len(values) == 1 else None


def _gpu(name: str, memory: str, driver: str, ecc: str, remaps: str) -> Gpu:
    faults: list[str] = []
    figures = [_figure(cell, faults) for cell in (memory, ecc, remaps)]
    if name.startswith("["):
        faults.insert(0, name)
    mib, errors, failures = figures
    counts = [None if count is None else int(count) for count in (errors, failures)]
    return Gpu(name, mib, driver, *counts, faults[0] if faults else None)


def _figure(cell: str, faults: list[str]) -> float | None:
    """A number; `No` or `Yes`, of row remaps, as 0 or 1; None for `[N/A]`. What is no figure goes to `faults`."""
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
