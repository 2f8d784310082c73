"""Limits the time that a launch waits for a machine (MAX_WAIT, in minutes).

Prints once a minute which machines the launch tries to get.

    wait = Wait(task, minutes, cluster="pretrain-8xa100")
    ended = undo.run(command, wait.goes_on)        ends the launch when the time is over
    wait.for_job()                                 the same for a managed job, which is queued immediately

Waiting is free, because machines are paid for only once they are up.
"""

import time

from clouds import skypilot
from core.errors import ConfigError
from core.figures import duration
from core.task import MachineRequest, TaskSpec

SAY_SECONDS = 60.0
POLL_SECONDS = 5.0
# SkyPilot's names for the status of a managed job that has no machine yet.
WAITING = ("PENDING", "SUBMITTED", "STARTING", "RECOVERING", "LAUNCHING")


class Wait:
    """The wait of one launch for its machines."""

    def __init__(self, task: TaskSpec, minutes: float, cluster: str):
        self._task, self._cluster = task, cluster
        self._began_at = time.time()
        self._began = self._said = time.monotonic()
        self._limit = 60 * minutes
        self._has_machine = False

    def goes_on(self) -> bool:
        """Whether the launch may go on: it has a machine, or time is left to wait.

        Prints once a minute which machines the launch tries to get.
        """
        if self._has_machine:
            return True
        now = time.monotonic()
        is_over = now - self._began >= self._limit
        if is_over or now - self._said >= SAY_SECONDS:
            self._said = now
            self._has_machine = self._is_up()
            if self._has_machine:
                return True
            print(self._line(is_over), flush=True)
        return not is_over

    def for_job(self) -> bool:
        """Wait until the newest job of the task has a machine or has ended.

        Returns False if MAX_WAIT was over before that.
        """
        while True:
            jobs = [job for job in skypilot.jobs(ended=True) if job.get("job_name") == self._task.name]
            mine = [job for job in jobs if float(job.get("submitted_at") or 0.0) >= self._began_at - 2]
            if not mine or not str(mine[0].get("status")).startswith(WAITING):
                return True
            now = time.monotonic()
            is_over = now - self._began >= self._limit
            if is_over or now - self._said >= SAY_SECONDS:
                self._said = now
                print(self._line(is_over), flush=True)
            if is_over:
                return False
            time.sleep(min(POLL_SECONDS, max(0.1, self._limit - (now - self._began))))

    def _is_up(self) -> bool:
        try:
            found = [each for each in skypilot.clusters() if each["name"] == self._cluster]
        except ConfigError:  # SkyPilot is busy; the next question may get an answer
            return False
        return any(each.get("status") == "UP" for each in found)

    def _line(self, is_over: bool) -> str:
        waited = duration(time.monotonic() - self._began)
        tried = ", ".join(dict.fromkeys(place(request) for request in self._task.requests))
        if is_over:
            return (
                f"no machine within MAX_WAIT ({waited}); tried {tried}; the launch ends, and no machine was paid for: "
                "try again later, with other machines (GPUS=…, INFRA=…), or with a larger MAX_WAIT"
            )
        return f"no machine yet after {waited} of {duration(self._limit)} (MAX_WAIT): trying {tried}"


def place(request: MachineRequest) -> str:
    """A kind of machine in words: `A100:8 on spot at aws/us-east-1`."""
    kind = f"{request.accelerator}:{request.accelerators}" if request.accelerator else request.instance_type or "a CPU"
    where = "/".join(part for part in (request.cloud, request.region, request.zone) if part) or "any cloud"
    return f"{kind}{' on spot' if request.spot else ''} at {where}"
