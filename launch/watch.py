"""Ends machines of this user that nothing else would end. It runs beside a launch (`make watch`) until Ctrl-C.

    python -m launch.watch

SkyPilot sets a machine's autostop only after it has set up the machine. If the launch dies earlier, a machine on Lambda
keeps running: no program of this project has started there, and Lambda bills a machine until its API ends it. A machine
on AWS without `make role` keeps running too. This program asks all sources (launch/left.py) every POLL_SECONDS. It ends
a machine of this project that has been up for SWITCH_MINUTES without autostop. While SkyPilot does not answer, it ends
nothing, because a job may be running. It then prints the command that ends everything.
"""

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from clouds.base import Leftover
from core import environment
from core.console import run_entry
from core.environment import positive
from core.errors import ConfigError
from launch import left
from launch.node import switch

POLL_SECONDS = 60.0


def main(arguments: list[str]) -> int:
    if arguments:
        raise ConfigError("usage: python -m launch.watch (make watch)")
    environment.adopt()
    minutes = positive(os.environ, "SWITCH_MINUTES") or switch.MINUTES
    print(
        f"machines of this project without autostop end after {minutes:g} minutes; Ctrl-C ends this watch", flush=True
    )
    watch = Watch(minutes * 60)
    while True:
        for line in watch.step(left.look(), time.monotonic()):
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
        time.sleep(POLL_SECONDS)


class Watch:
    """Remembers which machines have no autostop, by cluster name, and when each was first seen without autostop."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._since: dict[str, float] = {}
        self._silent = False

    def step(self, survey: left.Survey, now: float) -> Iterator[str]:
        """End the machines that are overdue at `now` (s, monotonic). Yields a sentence for each change."""
        if survey.clusters is None or survey.jobs is None:
            if not self._silent:
                yield "SkyPilot did not answer, so nothing is ended now; `make down` ends your machines"
            self._silent = True
            return
        self._silent = False
        open_ones = [each for each in survey.on_clouds if each.mine and each.end and not is_guarded(each, survey)]
        for cluster in self._since.keys() - {each.cluster for each in open_ones}:
            del self._since[cluster]
            yield f"{cluster}: has autostop now, or is gone"
        for machine in open_ones:
            if machine.cluster not in self._since:
                self._since[machine.cluster] = now
                yield f"{machine}: has no autostop yet; without one it is ended in {self._seconds / 60:g} minutes"
            elif now - self._since[machine.cluster] >= self._seconds:
                yield _end(machine)


def is_guarded(machine: Leftover, survey: left.Survey) -> bool:
    """Whether a machine ends without this program: by its cluster's autostop or by its managed job's controller."""
    clusters = [each for each in survey.clusters or () if each.get("cluster_name_on_cloud") == machine.cluster]
    return any(map(_has_autostop, clusters)) or left.job_of(machine.cluster, survey.jobs or ()) is not None


def _has_autostop(cluster: Mapping[str, Any]) -> bool:
    """Whether SkyPilot has set an autostop for this cluster. Before that, the value is -1.

    Machines of a managed job have no autostop; their controller ends them.
    """
    autostop = cluster.get("autostop")
    return isinstance(autostop, int) and autostop >= 0


def _end(machine: Leftover) -> str:
    try:
        machine.end()
    except Exception as error:  # credentials or network may cause any error
        return f"{machine}: could not be ended ({left.brief(error)}); it is tried again"
    return f"{machine}: had no autostop, and was ended"


if __name__ == "__main__":
    run_entry(main)
