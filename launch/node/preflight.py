"""Checks within about ten seconds that a node is the requested machine and healthy, before training starts.

    report = run(os.environ, machine.gpus())

Checks the GPUs (number, kind, error counters), the clock, the disk and the bucket. In parallel, a torch program
(trainer/distributed/preflight.py) checks that CUDA initialises and measures an all-reduce over all GPUs. A `problem` is
a fault of this machine, which is then replaced. If another machine would have the same fault, ConfigError is raised
instead. A `note` is only reported. The reports are stored below RUN_URL/preflight/.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path

from clouds import catalog, providers
from clouds.base import Gpu
from core import stop, storage, web
from core.commands import run_within
from core.figures import counted
from core.run.folder import RunFolder
from core.stores import aws
from launch.node import network

log = logging.getLogger(__name__)

# Xid codes of hardware faults; other codes may be faults of programs (NVIDIA's Xid catalog). The codes mean, in this
# order: double-bit ECC, row remapping failed, NVLink, fallen off the bus, uncontained ECC, GSP time-outs.
FATAL_XIDS = {48, 64, 74, 79, 95, 119, 120}
# PCIe 4.0 x16 moves at most 31.5 GB/s, so a faster all-reduce used NVLink.
MIN_NVLINK_GB_PER_S = 40.0
# Largest allowed difference of the clock in seconds. S3 refuses requests if the clock is 15 minutes off. The ledgers of
# several machines need clocks that agree better than that.
MAX_SKEW_SECONDS = 300.0
PROBE_BYTES = 16 << 20
# Time limit of the all-reduce in seconds. It includes the first read of torch's 5 GB of libraries from disk. A GPU that
# is not ready by then will not answer at all.
ALL_REDUCE_SECONDS = 180.0
CLOCK_SECONDS = 10.0


@dataclass
class PreflightReport:
    """The findings of a preflight. `problems` are sentences. A figure that was not measured is None."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float | None] = field(default_factory=dict)
    driver: str | None = None
    libcuda: str | None = None  # the file of the CUDA driver library, and its version
    seconds: float = 0.0

    def to_dict(self) -> dict:
        return {"time": time.time(), **asdict(self)}


def run(environment: Mapping[str, str], found: Sequence[Gpu]) -> PreflightReport:
    """Run all checks. Checks that do not disturb each other run in parallel. Raises ConfigError, StorageError."""
    started = time.monotonic()
    rehearsal = environment.get("DEVICE") == "cpu"
    healthy = [gpu for gpu in found if not gpu.fault]
    report = PreflightReport(problems=gpu_problems(environment, found), driver=healthy[0].driver if healthy else None)
    with ThreadPoolExecutor() as pool:
        together = pool.submit(all_reduce, environment, rehearsal) if not report.problems else None
        bucket = pool.submit(bucket_speed, environment["RUN_URL"])
        skew = pool.submit(clock_skew_seconds, environment)
        report.figures["disk_write_mb_per_s"] = disk_speed()
        report.figures["disk_free_gb"] = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
        report.figures |= bucket.result()
        report.figures["clock_skew_seconds"] = skew.result()
        if together:
            answer = together.result()
            if isinstance(answer, str):
                report.problems.append(answer)
            else:
                report.libcuda = answer.pop("libcuda", None)
                report.figures |= answer
    judge(report, environment, found, rehearsal)
    report.seconds = time.monotonic() - started
    log.info("preflight, %.1f s: %s", report.seconds, summary(report))
    return report


def gpu_problems(environment: Mapping[str, str], found: Sequence[Gpu]) -> list[str]:
    """One sentence for each fault of the GPUs that the driver or the kernel reports."""
    problems = []
    asked = int(environment.get("SKYPILOT_NUM_GPUS_PER_NODE") or 0)
    if len(found) < asked:
        problems.append(f"{asked} GPUs were asked for, the driver sees {len(found)}")
    offer = next((o for o in providers.snapshot().offers if o.instance_type == environment.get("INSTANCE_TYPE")), None)
    for gpu in [gpu for gpu in found if not gpu.fault][:1]:
        if offer and offer.accelerator and not catalog.has_accelerator(offer, gpu):
            problems.append(f"a {offer.instance_type} has {offer.accelerator}, the driver sees {gpu.name}")
    for number, gpu in enumerate(found):
        if gpu.fault:
            problems.append(f"GPU {number} does not answer, nvidia-smi says: {gpu.fault}")
        if gpu.uncorrected_ecc_errors:
            problems.append(f"GPU {number} has {gpu.uncorrected_ecc_errors} uncorrectable memory errors since its boot")
        if gpu.failed_row_remaps:
            problems.append(f"GPU {number} could not remap a faulty memory row")
    for line in environment.get("NODE_XIDS", "").splitlines():
        match = re.search(r"Xid \([^)]*\): (\d+)", line)
        if match and int(match.group(1)) in FATAL_XIDS:
            problems.append(f"the kernel reports a GPU fault: {line.strip()}")
    return problems


def judge(report: PreflightReport, environment: Mapping[str, str], found: Sequence[Gpu], rehearsal: bool) -> None:
    """Compare the figures of a report with their limits, and add problems and notes to it."""
    speed = report.figures.get("all_reduce_gb_per_s")
    linked = any(name in gpu.name for gpu in found for name in ("SXM", "HBM3"))
    if speed and linked and not rehearsal and network.ranks_per_node(environment) > 1 and speed < MIN_NVLINK_GB_PER_S:
        report.problems.append(
            f"the GPUs all-reduce {speed:.0f} GB/s, less than the {MIN_NVLINK_GB_PER_S:.0f} that NVLink gives"
        )
    skew = report.figures.get("clock_skew_seconds")
    if skew is not None and abs(skew) > MAX_SKEW_SECONDS:
        report.problems.append(f"the clock is {skew:+.0f} s off the bucket's")
    for name, least in (("disk_write_mb_per_s", 50.0), ("bucket_read_mb_per_s", 20.0), ("disk_free_gb", 30.0)):
        value = report.figures.get(name)
        if value is not None and value < least:
            report.notes.append(f"{name} is {value:.0f}, less than {least:.0f}: expect waits")


def all_reduce(environment: Mapping[str, str], rehearsal: bool) -> dict | str:
    """Runs trainer/distributed/preflight.py on all GPUs of this node.

    Returns its figures, or one sentence about its failure.
    """
    ranks = network.ranks_per_node(environment)
    who = f"{counted(ranks, 'process')} on the CPU" if rehearsal else counted(ranks, "GPU")
    # torchrun's option --standalone would resolve the host name, which may fail in a container.
    launcher = ["-m", "trainer.distributed.torchrun", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1"]
    command = [sys.executable, *launcher, f"--master-port={network.free_port()}", "-m", "trainer.distributed.preflight"]
    # PARENT_PID makes the program end when this process ends (core.stop).
    variables = {**os.environ, **environment, "PARENT_PID": str(os.getpid())}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command += ["cpu" if rehearsal else "cuda", str(answer)]
        try:
            done = run_within(command, ALL_REDUCE_SECONDS, variables)
        except subprocess.TimeoutExpired:
            return f"{who} did not finish a small all-reduce within {ALL_REDUCE_SECONDS:.0f} s"
        stop.hold_if_leaving()
        found = json.loads(answer.read_text()) if answer.exists() else None
        if found and "problem" in found:
            return found["problem"]
        if done.returncode or found is None:
            log.error("%s", done.stderr[-4000:])
            return f"{who} could not all-reduce; the lines above say why"
        return found


def bucket_speed(run_url: str) -> dict[str, float]:
    """MB/s of writing and reading one probe object. Raises StorageError."""
    uri = storage.join(RunFolder(run_url).preflight, f"probe-{os.urandom(8).hex()}")
    data = os.urandom(PROBE_BYTES)
    started = time.monotonic()
    storage.write_bytes(uri, data)
    written = time.monotonic()
    storage.read_bytes(uri)
    read = time.monotonic()
    storage.delete(uri)
    megabytes = PROBE_BYTES / 1e6
    return {
        "bucket_write_mb_per_s": megabytes / (written - started),
        "bucket_read_mb_per_s": megabytes / (read - written),
    }


def disk_speed() -> float:
    """MB/s of synchronous writes to the disk of the shard cache."""
    data = os.urandom(PROBE_BYTES)
    with tempfile.NamedTemporaryFile() as file:
        started = time.monotonic()
        for _ in range(4):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return 4 * PROBE_BYTES / 1e6 / (time.monotonic() - started)


def clock_skew_seconds(environment: Mapping[str, str]) -> float | None:
    """The difference between this machine's clock and the object store's clock, accurate to a second.

    It is computed from the Date header of an answer. The result is None if no answer arrives, or if the answer has no
    such header.
    """
    endpoint = aws.endpoint_of(environment)
    try:
        header = web.fetch(endpoint or "https://s3.amazonaws.com", CLOCK_SECONDS)[0]["Date"]
    except urllib.error.HTTPError as error:  # the answer to a refused request has a Date header too
        header = error.headers["Date"]
    except (OSError, ValueError):
        return None
    try:
        return time.time() - parsedate_to_datetime(header).timestamp() if header else None
    except ValueError:  # the header is not a date
        return None


def summary(report: PreflightReport) -> str:
    """All findings in one line."""
    figures = [
        f"{name.replace('_', ' ')} {'?' if value is None else format(value, '.3g')}"
        for name, value in report.figures.items()
    ]
    cuda = [f"driver {report.driver}"] if report.driver else []
    cuda += [f"libcuda {report.libcuda}"] if report.libcuda else []
    return "; ".join([*report.problems, *report.notes, *cuda, *figures])
