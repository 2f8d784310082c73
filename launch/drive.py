"""Carries out one stage of a run with a budget: launches the stage's task as often as needed until the stage is done.

The bucket shows the finished work, and SkyPilot shows the running jobs. This module keeps no other state.
"""

import sys
import time
from collections.abc import Sequence

from clouds import skypilot
from core.errors import ConfigError, RunError, one_line
from core.exit_codes import FAILED
from core.figures import dollars
from core.run import budget as budgets
from core.run.budget import Budget
from core.run.folder import RunFolder
from core.run.reader import spent_usd_at_most
from core.task import read_task
from launch import managed
from launch.stages import LEAST_USD, TRAINING, Stage, last_segment, with_cap
from launch.submit import NO_CHECK, submit
from launch.undo import CLOCK_SECONDS

POLL_SECONDS = 30.0
# This command stops if so many launches of a stage in a row make no progress.
MOST_WITHOUT_PROGRESS = 3
# This command stops if SkyPilot does not answer so many questions in a row.
MOST_UNANSWERED = 40
STOPPED = 130
SIGNALLED = 128  # an exit code above this number means that a signal ended the command


class Driver:
    """Carries out the stages of one run. Of the command's `arguments`, only NO_CHECK is used."""

    def __init__(self, folder: RunFolder, budget: Budget, arguments: Sequence[str]):
        self._folder, self._budget = folder, budget
        self._options = [each for each in arguments if each == NO_CHECK]
        self._launched: list[tuple[str, int, float]] = []  # for each launch by this command: stage, progress, unix time
        self.failed: list[str] = []  # names of failed stages that later stages do not need

    def carry_out(self, stage: Stage) -> int:
        """Returns 0 once the stage is done, else the exit code of a failed launch.

        Raises RunError if the stage has failed or makes no progress. If later stages do not need this stage, it may
        fail, or be left out because the money is spent. In both cases, 0 is returned and `failed` contains the stage's
        name.
        """
        try:
            code = self._carry_out(stage)
        except RunError as error:
            if stage.is_needed:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = FAILED
        if code and code < SIGNALLED and not stage.is_needed:
            self.failed.append(stage.name)
            return 0
        return code

    def _carry_out(self, stage: Stage) -> int:
        said, unanswered = "", 0
        try:
            while not stage.is_done():
                try:
                    where, unanswered = self._up(stage), 0
                except ConfigError as error:
                    unanswered += 1
                    if unanswered == MOST_UNANSWERED:
                        raise
                    where = f"SkyPilot does not answer ({one_line(error, 160)})"
                if where:
                    now = f"{stage.name}: {where}, {self._state(stage)}"
                    if now != said:
                        print(now, flush=True)
                    said = now
                    pause()
                    continue
                if not stage.is_needed and stage.cap() < LEAST_USD:
                    left = dollars(max(0.0, stage.cap()))
                    print(f"{stage.name}: left out, ${left} of the money is left", flush=True)
                    return FAILED
                if code := self._launch(stage):
                    return code
        except KeyboardInterrupt:
            print(
                f"\n{stage.name} goes on without this command; the same command follows it again, `make down` ends it",
                flush=True,
            )
            return STOPPED
        print(f"{stage.name}: done, {self._state(stage)}", flush=True)
        return 0

    def _launch(self, stage: Stage) -> int:
        """Launch a stage that is neither done nor running. Returns the exit code of the launch."""
        mine = [each for each in self._launched if each[0] == stage.name]
        progress = stage.progress()
        if mine:
            self._check_not_stopped(stage, mine[-1][2])
            _check_end(stage, mine[-1][2])
        if len([each for each in mine if each[1] == progress]) >= MOST_WITHOUT_PROGRESS:
            raise RunError(
                f"{self._folder}: {MOST_WITHOUT_PROGRESS} launches of the {stage.name} got it no further than "
                f"{progress:,} {stage.work}; see {_logs(stage)}; the same command tries again"
            )
        settings = with_cap(stage)
        again = f", launch {len(mine) + 1}" if mine else ""
        print(f"{stage.name}: {stage.task}, at most ${settings['MAX_USD']}{again}", flush=True)
        record = budgets.launching(self._folder, self._budget.number, stage.name, progress)
        self._launched.append((stage.name, progress, record.began_at))
        return submit(stage.task, [*stage.options, *self._options], settings)

    def _up(self, stage: Stage) -> str:
        """The job or cluster that runs a stage, according to SkyPilot. "" if no job or cluster runs it.

        Raises ConfigError if SkyPilot does not answer. Raises RunError if another run uses the stage's cluster.
        """
        settings = stage.settings()
        task = read_task(managed.chosen(stage.task, settings), settings)
        if not task.managed:
            return _cluster(task.name, task.envs["RUN"])
        known = [each for each in budgets.launches(self._folder, self._budget.number) if each.stage == stage.name]
        if not known:
            return ""
        for job in skypilot.jobs():
            is_later = float(job.get("submitted_at") or 0.0) >= known[0].began_at - CLOCK_SECONDS
            if job.get("job_name") == task.name and is_later and not skypilot.has_ended(job):
                return f"managed job {job['job_id']} {job['status']}"
        return ""

    def _check_not_stopped(self, stage: Stage, since: float) -> None:
        """Raises RunError if a user has ended the stage's newest job or machine, for example by `make down`."""
        settings = stage.settings()
        task = read_task(managed.chosen(stage.task, settings), settings)
        if task.managed:
            jobs = [job for job in skypilot.jobs(ended=True) if job.get("job_name") == task.name]
            jobs = [job for job in jobs if float(job.get("submitted_at") or 0.0) >= since - CLOCK_SECONDS]
            is_stopped = bool(jobs) and str(jobs[0]["status"]).startswith("CANCEL")
        else:
            # Only managed jobs use spot machines. A program on any other machine is asked to stop only if a user ends
            # the machine.
            segment = last_segment(stage.ledger, since)
            is_stopped = ((segment and segment.end) or {}).get("reason") == "preempted"
        if is_stopped:
            raise RunError(
                f"{stage.ledger}: the {stage.name} was asked to stop, so it is not launched again; what it has stored "
                "is kept, and the same command continues it"
            )

    def _state(self, stage: Stage) -> str:
        usd = spent_usd_at_most(self._folder.url)
        spent = "?" if usd is None else dollars(usd)
        return f"{stage.progress():,} {stage.work}, ${spent} of ${dollars(self._budget.usd)}"


def pause() -> None:
    """Pause between two questions to SkyPilot."""
    time.sleep(POLL_SECONDS)


def _cluster(name: str, run: str) -> str:
    for cluster in skypilot.clusters():
        if cluster["name"] == name:
            other = skypilot.variables_of(cluster).get("RUN")
            if other and other != run:
                raise RunError(
                    f"cluster {name} works for RUN={other}; wait until it has ended, or end it by `make down`"
                )
            return f"cluster {name} {cluster['status']}"
    return ""


def _check_end(stage: Stage, since: float) -> None:
    """Raises RunError if the newest machine of a stage has failed, because another machine would fail too."""
    segment = last_segment(stage.ledger, since)
    end = (segment and segment.end) or {}
    if end.get("reason") == "failed" or (end.get("reason") == "cap" and stage.name != TRAINING):
        error = " ".join(str(end.get("error") or "").split())[:300]
        raise RunError(
            f"{stage.ledger}: the {stage.name} has ended ({end['reason']}{': ' * bool(error)}{error}); see "
            f"{_logs(stage)}; the same command tries again"
        )


def _logs(stage: Stage) -> str:
    return f"`make logs FROM=bucket RUN={stage.settings()['RUN']}`"
