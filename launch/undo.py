"""Runs a launch and undoes it after an interruption.

If an interrupted launch were not undone, SkyPilot's server would finish it and rent a machine.

    ended = run(["sky", "launch", ...])
    undo(launch, ended.signal)          cancels the launch, ends its machines, and prints what is still up

Ctrl-C, SIGTERM and a closed terminal (SIGHUP) count as interruptions. During the undoing, a second Ctrl-C or SIGTERM
ends this program immediately.
"""

import contextlib
import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from clouds import skypilot
from core.errors import ConfigError
from launch import left

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_SECONDS = 0.2
# Seconds that the sky client has to end after a signal. It has nothing to save.
CLIENT_SECONDS = 5.0
# Time limit of one sky command, which may wait for a server that is busy with the launch.
COMMAND_SECONDS = 300.0
# Tolerance for clocks, because SkyPilot's records hold whole seconds.
CLOCK_SECONDS = 2.0
END = "`make down` ends it"


@dataclass(frozen=True)
class Launch:
    """A launch of this program. `began_at` is unix time. `cluster` is not used for a managed job."""

    task: str
    managed: bool
    began_at: float
    cluster: str

    def is_request(self, name: str, cluster: str | None) -> bool:
        """Whether a request on SkyPilot's server may belong to this launch.

        For a managed job, the request contains the name of the controller's cluster.
        """
        return name == "jobs.launch" if self.managed else name == "launch" and cluster == self.cluster

    def began(self, record: dict[str, Any], key: str) -> bool:
        """Whether a record is from the time of this launch or later."""
        return float(record.get(key) or 0.0) >= self.began_at - CLOCK_SECONDS


@dataclass(frozen=True)
class Ended:
    """The end of a command: its exit code, and the signal that interrupted it.

    The signal is 0 if the command was not interrupted.
    """

    code: int
    signal: int = 0


def run(command: list[str], goes_on: Callable[[], bool] = lambda: True) -> Ended:
    """Run a command until it ends or one of SIGNALS arrives. After such a signal, SIGNALS are ignored.

    `goes_on` is called periodically. If it returns false, the command ends as after SIGTERM.

    The command gets a separate session, so that Ctrl-C and a closed terminal reach only this program.
    """
    received: list[int] = []
    # A signal that is ignored, as under nohup, stays ignored.
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in heard}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    while not received:
        try:
            code = process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if not received and not goes_on():
                received.append(signal.SIGTERM)
            continue
        for number, handler in before.items():
            signal.signal(number, handler)
        return Ended(code)
    for number in heard:
        signal.signal(number, signal.SIG_IGN)
    _end_client(process)
    return Ended(128 + received[0], received[0])


def _end_client(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(CLIENT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def undo(launch: Launch, number: int) -> int:
    """Cancel SkyPilot's requests for this launch and end its cluster or job.

    Returns the signal's exit code (128 + n).
    """
    if number == signal.SIGHUP:
        _leave_terminal()
    _say(f"\n{signal.Signals(number).name}: the launch is being cancelled; a second signal stops the cancelling")
    try:
        with _interruptible():
            for step in (_cancel_requests, _end_begun):
                try:
                    step(launch)
                except (ConfigError, subprocess.SubprocessError) as error:
                    _say(f"?  {left.brief(error)}")
            show_rest(launch)
    except KeyboardInterrupt:
        _say(f"not undone: a machine of {launch.task} may be up or on its way; {END}")
    return 128 + number


def _leave_terminal() -> None:
    """Discard all further output to the terminal. It has closed, so writing to it would fail."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within this context, SIGINT and SIGTERM raise KeyboardInterrupt.

    SIGHUP does not, because a closed terminal may send it twice.
    """

    def on_signal(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def _cancel_requests(launch: Launch) -> None:
    """Cancel the requests on SkyPilot's server that belong to this launch."""
    requests = [
        each
        for each in skypilot.listed(["api", "status", "--verbose"])
        if launch.is_request(str(each.get("name")).removeprefix("sky."), each.get("cluster_name"))
        and launch.began(each, "created_at")
    ]
    if requests:
        _sky(["api", "cancel", "--yes", *(each["request_id"] for each in requests)])


def _end_begun(launch: Launch) -> None:
    """End the cluster or the job that this launch has begun. A cluster that existed before this launch is not ended."""
    if launch.managed:
        jobs = [job for job in skypilot.jobs() if job.get("job_name") == launch.task]
        if begun := [str(job["job_id"]) for job in jobs if launch.began(job, "submitted_at")]:
            _sky(["jobs", "cancel", "--yes", *begun])
        return
    for cluster in skypilot.clusters():
        if cluster["name"] == launch.cluster:
            if launch.began(cluster, "launched_at"):
                _sky(["down", "--yes", launch.cluster])
            else:
                _say(f"cluster {launch.cluster} was up before this launch and stays; {END}")


def show_rest(launch: Launch) -> None:
    """After a failed or cancelled launch, print what is up and the command that ends it."""
    survey = left.look()
    if survey.exit_code == left.NOTHING:
        _say(f"nothing of {launch.task} is up: every source says so")
        return
    for line in survey.lines():
        _say(line)
    if survey.found:
        _say(f"{len(survey.found)} up and maybe billed; {END}")
    else:
        _say("nothing was found, but not everything could be asked: `make down` asks again")


def _sky(arguments: list[str]) -> None:
    _say(f"$ sky {' '.join(arguments)}")
    command = [skypilot.find_sky(), *arguments]
    # The terminal sends Ctrl-C to a process group. In another group, the command survives a second Ctrl-C.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=COMMAND_SECONDS, start_new_session=True)
    if done.returncode:
        raise ConfigError(f"`sky {' '.join(arguments)}` ended with {done.returncode}")


def _say(text: str) -> None:
    print(text, flush=True)
