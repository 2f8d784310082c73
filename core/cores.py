"""Counts the CPU cores that this process may use. A container or `taskset` may allow fewer than the machine has."""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = CGROUP) -> int:
    """The number of cores that this process may use, at least 1.

    It is the smaller of two limits: the cores of the process's affinity (Slurm, `docker --cpuset-cpus`), and the quota
    of its control group (Kubernetes, `docker --cpus`), rounded up.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota(cgroup))))


def _quota(cgroup: Path) -> float:
    """The quota of the control group, in seconds of CPU time per second; infinity if there is no limit.

    In a container, the folder `cgroup` shows the container's own control group.
    """
    try:
        if (cgroup / "cpu.max").exists():  # version 2
            allowed, period = (cgroup / "cpu.max").read_text().split()
        else:
            allowed, period = ((cgroup / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(allowed) / int(period) if int(allowed) > 0 else math.inf
    except (OSError, ValueError):  # there is no control group, or its quota is "max"
        return math.inf
