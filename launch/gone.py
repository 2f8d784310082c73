"""Records when a run's machines were gone, once their cloud shows it, in RUN_URL/machines/ATTEMPT/gone.json.

`make status` and `make down` call this module. Each launch calls it before the check of the cap. AWS lists an ended
machine for about an hour; Lambda does not list ended machines. The cap reserves time for the shutdown of a machine: the
longest shutdown that was recorded for this run on the same cloud (core/run/paid.py).
"""

from clouds.base import Instance, Unavailable
from clouds.providers import cloud_named
from core.run import paid
from core.run.folder import RunFolder

CLOCK_SECONDS = 5.0


def record(run_url: str) -> list[str]:
    """Record the ends of machines that the clouds list, unless recorded. Returns a line for each recorded end.

    Raises StorageError.
    """
    folder = RunFolder(run_url)
    lines = []
    for attempt, machine in paid.machines(folder).items():
        if machine.gone_at is None and machine.ended_at is not None and machine.cluster:
            gone_at = _gone_at(machine)
            if gone_at is not None:
                paid.gone(folder, attempt, gone_at)
                lines.append(f"{machine.cluster}: gone {gone_at - machine.ended_at:.0f} s after its program ended")
    return lines


def _gone_at(machine: paid.Paid) -> float | None:
    """The time when the cloud's machine was gone, or None if the cloud does not list it or does not answer."""
    cloud = cloud_named(machine.cloud)
    try:
        listed = cloud.instances([machine.cluster], machine.region or "") if cloud else []
    except Unavailable:
        return None
    return max((each.end for each in listed if each.end is not None and _is(each, machine)), default=None)


def _is(instance: Instance, machine: paid.Paid) -> bool:
    """Whether an instance in the cloud's list is this machine.

    The instance must belong to the machine's cluster. It must have been requested before the machine's boot, and still
    been up when the machine's program ended.
    """
    if instance.cluster != machine.cluster or instance.end is None or machine.ended_at is None:
        return False
    return instance.start <= machine.started_at + CLOCK_SECONDS and instance.end >= machine.ended_at - CLOCK_SECONDS
