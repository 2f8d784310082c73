"""Defines the cells of bench.interruptions (one interruption of a launch each) and the trial that runs a cell."""

import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bench.emulated import BUCKET, LAB, LAB_ROOT, POLL_SECONDS, PORT, SWITCH_MINUTES, Bench, kill, send

EVENTS = ("ctrl-c", "kill", "stop", "cut")
STAGES = ("request", "provision", "sync", "set-up", "build", "job")
# The order in which stages are measured. The time may not suffice for all stages, so the most important stages come
# first.
FIRST = ("provision", "sync", "job", "set-up", "build", "request")
LIMIT_SECONDS = SWITCH_MINUTES * 60 + 120
STAGE_SECONDS = 600.0
WATCH_SECONDS = 600.0
FOLLOW_SECONDS = 1200.0  # longest time to follow one cell, because SkyPilot may replace its machines again and again
# Shell commands that lengthen two stages, so that the interruption can hit them. The set-up sleeps for 15 s before the
# image is made, and again before each `docker build`.
SET_UP = """\
touch ~/stage-set-up
sleep 15
mkdir -p ~/slow
slow='[ "$1" != build ] || { touch ~/stage-build; sleep 15; }'
printf '#!/bin/sh\\n%s\\nexec /usr/local/bin/docker "$@"\\n' "$slow" > ~/slow/docker
chmod 755 ~/slow/docker
PATH=~/slow:$PATH
"""


@dataclass
class Cell:
    """One interruption of a launch, and its results. Seconds count from the interruption.

    A field is None if its event did not happen.
    """

    number: int
    event: str
    stage: str
    managed: bool
    cloud: str
    launcher: str = ""  # the launcher's state at the interruption, and its exit code
    minutes: float = SWITCH_MINUTES
    machines: int = 0
    # Seconds from a machine's start to its first job; SkyPilot sets autostop just before the job.
    gap: float | None = None
    gone_after: float | None = None
    silent_for: float | None = None  # seconds from the last sign of life, or from the machine's start, to its end
    ended_by: str = ""
    verdict: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.event}, {self.stage}, {'managed' if self.managed else 'on demand'}, {self.cloud}"


def cells() -> list[Cell]:
    """A cell for each event at each stage.

    The kind of launch and the cloud alternate, so that each pair of values of any two factors occurs.
    """
    found = []
    for i, event in enumerate(EVENTS):
        for j, stage in enumerate(STAGES):
            managed, cloud = bool((i + j) % 2), ("aws", "lambda")[(i // 2 + j) % 2]
            found.append(Cell(len(found) + 1, event, stage, managed, cloud))
    return found


class Trial:
    """Runs a cell."""

    def __init__(self, bench: Bench, cell: Cell):
        self.bench, self.cell = bench, cell
        self.hash = f"ce11{cell.number:04x}"
        self.home = bench.scratch / f"cell-{cell.number:02d}"
        self.environment = {"SKYPILOT_API_SERVER_LOCAL_PORT": str(PORT + cell.number)}
        self.seen: dict[str, dict[str, Any]] = {}  # the machines by id, each with `start`, `end` and `state`
        self.rules: set[str] = set()
        self.at = self.cut_at = 0.0
        self.launcher: subprocess.Popen | None = None

    def run(self) -> None:
        try:
            with self.bench.launching:
                self._start()
                reached = self._wait(self._has_reached, STAGE_SECONDS)
                self._interrupt(reached)
            self._follow()
        except Exception as error:  # the other cells still run
            self.cell.verdict, note = "not measured", f"{type(error).__name__}: {error}"
            self.cell.notes.append(note)
        finally:
            self._clean_up()

    def _start(self) -> None:
        if self.home.exists():
            shutil.rmtree(self.home)
        shutil.copytree(self.bench.home, self.home, symlinks=True)
        (self.home / ".sky/user_hash").write_text(self.hash)
        source = {"SOURCE_URL": f"s3://{BUCKET}/source/*.parquet", "VOCAB_URL": f"s3://{BUCKET}/source/vocab.bpe"}
        run = f"cell-{self.cell.number:02d}-{time.time():.0f}"
        settings = {"RUN": run, "DATA": run, "AWS_ENDPOINT_URL": self.bench.endpoint, **source, **self.environment}
        settings |= {
            "PREP_ARGS": "--data.val_fraction=0.05 --evaluation_sets=",
            "SWITCH_MINUTES": f"{SWITCH_MINUTES:g}",
        }
        # `sky api start` is tried three times, because it waits only a minute, which may not suffice on a busy machine.
        for _ in range(3):
            if self.bench.inside(self.home, "sky", "api", "start", **self.environment).returncode == 0:
                break
        submit = (self.bench.python, "-u", "-m", "launch.submit", self._task())
        self.output = (self.bench.scratch / f"cell-{self.cell.number:02d}.log").open("w")
        self.launcher = subprocess.Popen(
            self.bench.command(self.home, *submit, **settings),
            cwd=self.bench.project,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started_at = time.time()

    def _task(self) -> Path:
        """Writes a copy of sky/prep-data.yaml for one cloud, on demand or as a managed job.

        The copy has longer stages.
        """
        task = yaml.safe_load((self.bench.project / "sky/prep-data.yaml").read_text())
        kinds = {"aws": "c6i.2xlarge", "lambda": "cpu_4x_general"}
        resources = task["resources"]
        resources["any_of"] = [{"infra": self.cell.cloud, "instance_type": kinds[self.cell.cloud]}]
        if self.cell.managed:
            resources["job_recovery"] = {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 0}
        task["setup"] = SET_UP + task["setup"]
        task["run"] = "touch ~/stage-job\n" + task["run"]
        path = self.bench.project / f"cell-{self.cell.number:02d}.yaml"
        path.write_text(yaml.safe_dump(task, sort_keys=False))
        return path

    # --- the cloud

    def _look(self) -> bool:
        """Record the machines of the cell that the cloud lists. Returns whether one of them is running."""
        now, listed = time.time(), {}
        for each in self.bench.instances():
            if self.hash in f"{each['cluster']} {each['name']}" and each["state"] != "terminated":
                listed[each["id"]] = each
        for number, each in listed.items():
            machine = self.seen.setdefault(number, {"start": now, "end": None})
            machine |= {"state": each["state"], "alive": self._sign_of_life(number) or machine.get("alive")}
            machine["log"] = self._switch_log(number) or machine.get("log", "")
            mark = self._disk(number) / "home/ubuntu/stage-set-up"
            if self.cell.gap is None and mark.exists():
                self.cell.gap = round(mark.stat().st_mtime - machine["start"], 1)
            if self.cut_at:
                self._cut_off(each)
        for number, machine in self.seen.items():
            if number not in listed and machine["end"] is None:
                machine["end"] = now
        return bool(listed)

    def _disk(self, number: str) -> Path:
        return LAB_ROOT / "instances" / number / "upper"

    def _sign_of_life(self, number: str) -> float | None:
        try:
            return (self._disk(number) / "var/lib/pretrain-launcher/alive").stat().st_mtime
        except OSError:
            return None

    def _switch_log(self, number: str) -> str:
        try:
            return (self._disk(number) / "var/lib/pretrain-launcher/switch.log").read_text()
        except OSError:
            return ""

    def _cut_off(self, instance: dict[str, Any]) -> None:
        for address in {instance["private"], instance["public"]} - self.rules - {None}:
            rule = f"rule add to {address} ipproto tcp dport 22 blackhole priority {2000 + self.cell.number}"
            subprocess.run(["ip", "-n", "skylab", *rule.split()], check=True)
            self.rules.add(address)

    # --- the interruption

    def _has_reached(self) -> bool:
        if self.launcher and self.launcher.poll():
            raise RuntimeError(f"the launch ended with {self.launcher.returncode} before its interruption")
        self._look()
        stage = self.cell.stage
        if stage == "request":
            return time.time() - self.started_at > 2.0
        if stage == "provision":
            return bool(self.seen)
        mark = "sky_workdir" if stage == "sync" else f"stage-{stage}"
        return any((self._disk(number) / "home/ubuntu" / mark).exists() for number in self.seen)

    def _wait(self, holds: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _interrupt(self, reached: bool) -> None:
        assert self.launcher
        if not reached:
            raise RuntimeError(f"the stage was not reached in {STAGE_SECONDS:.0f} s")
        ended = self.launcher.poll()
        self.cell.launcher = "running" if ended is None else f"had ended with {ended}"
        self.at = time.time()
        if self.cell.event == "ctrl-c":
            if ended is None:
                self.launcher.send_signal(signal.SIGINT)
        elif self.cell.event == "cut":
            self.cut_at = self.at
            self._look()
        elif self.cell.event == "kill":
            kill(self.home)
        else:
            send(self.home, signal.SIGSTOP)
            send(self.home, signal.SIGSTOP)  # a second time, for processes that were started meanwhile

    def _follow(self) -> None:
        """Wait until every machine is gone, or until the limit has passed.

        If a machine still runs after the limit, do what a user would do who returns to the computer (`_come_back`).
        """
        assert self.launcher
        while True:
            is_up = self._look()
            since = max([self.at, *(max(m["start"], m.get("alive") or 0.0) for m in self.seen.values())])
            launching = self.launcher.poll() is None and self.cell.event in ("ctrl-c", "cut")
            quiet = time.time() - since
            if not is_up and (self.seen or quiet > 60) and not (launching and quiet < LIMIT_SECONDS):
                break
            if quiet > LIMIT_SECONDS or time.time() - self.at > FOLLOW_SECONDS:
                break
            time.sleep(1)
        if self.launcher.poll() is not None and self.cell.launcher == "running":
            self.cell.launcher = f"running, then ended with {self.launcher.returncode}"
        self._judge(is_up)
        if is_up:
            self._come_back()

    def _judge(self, is_up: bool) -> None:
        cell = self.cell
        cell.machines = len(self.seen)
        if not self.seen:
            cell.verdict, cell.ended_by = "no machine was rented", "-"
            return
        ends = [machine["end"] for machine in self.seen.values()]
        if is_up:
            states = ", ".join(sorted({m["state"] for m in self.seen.values() if m["end"] is None}))
            cell.verdict = f"up ({states}) after the limit"
            return
        cell.gone_after = round(max(ends) - self.at, 1)
        last = max(self.seen.values(), key=lambda machine: machine["end"])
        cell.silent_for = round(last["end"] - max(self.at, last["start"], last.get("alive") or 0.0), 1)
        cell.ended_by = self._ended_by()
        cell.verdict = "gone within the limit" if cell.silent_for <= LIMIT_SECONDS else "gone too late"

    def _ended_by(self) -> str:
        """The cause that ended the machines.

        The switch may end its machine before it has logged this. So a machine that was silent for the switch's time
        counts as ended by the switch.
        """
        for machine in self.seen.values():
            silent = machine["end"] - max(machine["start"], machine.get("alive") or 0.0)
            if machine.get("log") and silent >= SWITCH_MINUTES * 60 - 1:
                return "the node's switch"
        said = Path(self.output.name).read_text(errors="replace")
        if "$ sky down" in said or "$ sky jobs cancel" in said or "$ sky api cancel" in said:
            return "the launcher"
        return "SkyPilot"

    def _come_back(self) -> None:
        """Plays the user who comes back. On Lambda, the user first runs `make watch`.

        If a machine is still running, the user then runs `make down`.
        """
        send(self.home, signal.SIGCONT)
        self._reconnect()
        began = time.time()
        if self.cell.cloud == "lambda":
            watch = (self.bench.python, "-u", "-m", "launch.watch")
            words = self.bench.command(self.home, *watch, **self.environment, SWITCH_MINUTES="1")
            process = subprocess.Popen(words, cwd=self.bench.project, stdout=self.output, stderr=self.output)
            gone = self._wait(lambda: not self._look(), WATCH_SECONDS)
            process.send_signal(signal.SIGINT)
            process.wait()
            if gone:
                said = Path(self.output.name).read_text(errors="replace")
                self.cell.ended_by = "`make watch`" if "and was ended" in said else "SkyPilot"
                self.cell.notes.append(f"ended {time.time() - began:.0f} s after `make watch` began")
                return
        done = self.bench.inside(self.home, self.bench.python, "-m", "launch.down", "--down", **self.environment)
        self.output.write(f"\n--- launch.down\n{done.stdout}{done.stderr}")
        self.output.flush()
        self.cell.ended_by = "nothing" if self._look() else "`make down`"
        self.cell.notes.append(f"`make down` ended with {done.returncode} after {time.time() - began:.0f} s")

    def _reconnect(self) -> None:
        self.cut_at = 0.0
        for address in self.rules:
            rule = f"rule del to {address} ipproto tcp dport 22 blackhole priority {2000 + self.cell.number}"
            subprocess.run(["ip", "-n", "skylab", *rule.split()], check=False)
        self.rules.clear()

    def _clean_up(self) -> None:
        kill(self.home)
        if self.launcher:
            self.launcher.wait()
        self._reconnect()
        for each in self.bench.instances():
            if self.hash in f"{each['cluster']} {each['name']}" and each["state"] != "terminated":
                self.cell.notes.append(f"{each['id']} ({each['state']}) ended by this program")
                subprocess.run([LAB / "labctl", "preempt-id", each["id"]], capture_output=True)
        for number in self.seen:
            shutil.rmtree(LAB_ROOT / "instances" / number, ignore_errors=True)
        shutil.rmtree(self.home, ignore_errors=True)
