"""Checks a node, then runs one program under supervision. This is the first program in the container on each node.

    python -m launch.node -m trainer.train CONFIG [--key=value ...]     (under torchrun, after a preflight)
    python -m launch.node -m data_prep.prepare CONFIG [--key=value ...]
    python -m launch.node -m trainer.train CONFIG --more="$TRAIN_ARGS"  (TRAIN_ARGS is split into words, as by a shell)

The program gets the facts of this machine as environment variables (clouds/machine.py). Its output is stored, line by
line, below RUN_URL/logs/, because SkyPilot loses the output of a preempted node. The tasks in sky/ rely on these exit
codes:

    0    the program reached its last step
    33   it saved after a request to stop               (a managed job starts again)
    34   the run reached its cap on dollars             (a managed job ends)
    35   this machine is bad or hung: take another one  (a managed job starts again, REFUSALS_PER_DAY times)
    36   the bucket failed for too long                 (a managed job ends: another machine has no better bucket)
    else the program failed                             (the job ends)

A request to stop (SIGTERM, SIGHUP, SIGINT) at any moment ends this program with 33, unless the program that it runs
exits with 0 or 34.
"""

import signal

from core import stop

if __name__ == "__main__":
    stop.listen(signal.SIGINT)  # this call comes before the imports, which take seconds

import contextlib
import json
import logging
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from clouds import machine
from clouds.base import Gpu
from core import pulse, storage, task
from core.console import run_entry, set_up_logging
from core.environment import positive
from core.errors import ConfigError, LauncherError
from core.exit_codes import BAD_NODE, CAPPED, FAILED, OK, PREEMPTED
from core.run import paid
from core.run.cap import RESTARTS, restarts_too_dear
from core.run.folder import RunFolder
from core.run.log import Output, StoredLog
from core.run.machine import cluster_info, machine_from_environment, segment_started_at
from core.run.reader import Spent, spent_at_most
from core.run.segment import one_node_of
from launch.node import network, preflight, supervise
from launch.node.supervise import Child, Outcome, kill_descendants

log = logging.getLogger("node")

# After more refusals than this within a day, the job ends and a person must look, because the machines are probably not
# the cause.
REFUSALS_PER_DAY = 3
# The head node's exit code counts for the job. If another node fails, it gives the head node this many seconds to end
# first.
HEAD_START_SECONDS = 30.0
# Seconds that this process has to end after it has killed the program. Then container.sh kills this process.
AFTER_KILL_SECONDS = 4.0
# These programs run as several ranks under torchrun. All other programs are one process.
UNDER_TORCHRUN = ("trainer.train", "trainer.evaluate")
# For these programs, MAX_USD caps the whole run. Other programs have a separate ledger and check their cap themselves.
CAPPED_AS_A_RUN = ("trainer.train", "trainer.synthesize")
SIGTERMED = (-signal.SIGTERM, 128 + signal.SIGTERM)


class PaidRecord:
    """This machine's paid time, which the cap counts. The nodes of a training share the record of the first node."""

    def __init__(self, environment: Mapping[str, str], module: str, rank: int, attempt: str):
        trains = module.startswith("trainer.")
        self._is_kept = rank == 0 or not trains
        self._folder, self._attempt = RunFolder(environment["RUN_URL"]), attempt
        machine = machine_from_environment(None, 0, environment)
        self._machine = machine if trains else one_node_of(machine)
        self._controller, self._place = controller(environment), cluster_info(environment)
        self._began = False

    def begin(self) -> None:
        """Record the start of the machine's paid time. Raises StorageError."""
        if self._is_kept:
            started_at = segment_started_at() or time.time()
            price, host = self._machine.usd_per_hour, self._machine.host or ""
            paid.begin(self._folder, self._attempt, started_at, price, host, self._controller, self._place)
            self._began = True

    def end(self) -> None:
        """Record the end once. If the store fails, the cap counts more time for this machine than was paid."""
        if self._began:
            self._began = False
            with contextlib.suppress(LauncherError):
                paid.end(self._folder, self._attempt)


def controller(environment: Mapping[str, str]) -> paid.Controller | None:
    """The controller of this managed job. None if this is no managed job, or if the controller's price is not known."""
    price, since = positive(environment, "CONTROLLER_USD_PER_HOUR"), positive(environment, "SUBMITTED_AT")
    managed = environment.get("SKYPILOT_MANAGED_JOB_ID")
    return paid.Controller(since, price) if managed and price and since else None


def main(arguments: list[str]) -> int:
    set_up_logging()
    if len(arguments) < 2 or arguments[0] != "-m":
        raise ConfigError("usage: python -m launch.node -m MODULE [ARGUMENTS ...]")
    environment = dict(os.environ)
    module, words = arguments[1], task.with_more(arguments[2:])
    if not environment.get("RUN_URL"):
        raise ConfigError("RUN_URL is not set; launch/node/container.sh derives it from BUCKET and RUN")
    supervise.hang_minutes(environment)
    stop.seconds()
    # Before the program starts, there is nothing to save, so a request to stop ends the preflight and this process.
    stop.on_leaving(kill_descendants)
    rank, addresses = network.nodes(environment)
    found = machine.gpus()
    environment |= machine.describe(environment, found)
    run_url = environment["RUN_URL"]
    # Names of attempts have a random part, because two machines may start in the same second.
    attempt = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-node-{rank:03d}-{secrets.token_hex(4)}"
    output = Output(storage.join(RunFolder(run_url).logs, attempt))
    stop.on_leaving(output.close)
    ours = StoredLog(output)
    logging.getLogger().addHandler(ours)
    record = PaidRecord(environment, module, rank, attempt)
    stop.on_leaving(record.end)
    try:
        record.begin()
        log.info("node %d of %d: %s", rank + 1, len(addresses), describe(environment))
        code = job(module, words, environment, found, output, attempt)
        stop.settle(code if code != FAILED else PREEMPTED)
        log.info("exit code %d", code)
        return code
    except LauncherError as error:  # run_entry prints the error, but the stored log needs it as well
        output.add(f"error: {error}")
        raise
    finally:
        record.end()
        logging.getLogger().removeHandler(ours)
        if not stop.asked():  # if the process is asked to stop, stop.leave closes the log within a time limit
            output.close()


def job(
    module: str, arguments: list[str], environment: dict[str, str], found: list[Gpu], output: Output, attempt: str
) -> int:
    """Run preflight and program. Returns the exit code of this node."""
    trains = module in UNDER_TORCHRUN
    pulse.sign_of_life()
    if module in CAPPED_AS_A_RUN and (spent := spent_cap(environment)):
        log.error("%s", spent)
        return CAPPED
    if trains:
        network.check_port(environment)
        report = preflight.run(environment, found)
        stop.hold_if_leaving()
        storage.write_bytes(
            storage.join(RunFolder(environment["RUN_URL"]).preflight, f"{attempt}.json"),
            (json.dumps(report.to_dict(), indent=1) + "\n").encode(),
        )
        if report.problems:
            return refuse(environment["RUN_URL"], attempt, report.problems)
        environment |= network.settings(environment)
    with tempfile.TemporaryDirectory() as folder:
        code_file = Path(folder) / "exit-code"
        command = [sys.executable, "-m", module, *arguments]
        if trains:
            launcher = [sys.executable, "-m", "trainer.distributed.torchrun", *network.rendezvous(environment)]
            command = [*launcher, "-m", module, *arguments]
        log.info("running %s", " ".join(command))
        asked = threading.Event()
        stop.inform(lambda reason: asked.set())
        stop.allow(stop.seconds() + AFTER_KILL_SECONDS, lambda: "asked to stop: ending without waiting for open work")
        files = {"EXIT_CODE_FILE": str(code_file), "STOP_FILE": f"{folder}/stop", "PULSE_FILE": f"{folder}/pulse"}
        child = Child(command, {**environment, **files}, output.add, launched=trains, asked=asked)
        outcome = child.wait(supervise.hang_minutes(environment) * 60, stop.seconds())
        written = int(code_file.read_text()) if code_file.exists() else None
    if outcome.stopped:
        return exit_code(outcome, written)
    if outcome.hung and outcome.answered and written == PREEMPTED:
        log.warning("the program has saved, so it did not hang: it was slow, or waited; it may start again")
        return PREEMPTED
    if outcome.hung:
        stacks = "its stacks are in the log" if outcome.stacks else "it printed no stacks"
        return refuse(environment["RUN_URL"], attempt, [f"the program hung; {stacks}"])
    code = exit_code(outcome, written)
    if code == FAILED and trains and (problems := preflight.gpu_problems(environment, machine.gpus())):
        return refuse(environment["RUN_URL"], attempt, problems)
    if code and network.nodes(environment)[0] > 0:
        time.sleep(HEAD_START_SECONDS)
    return code


def spent_cap(environment: Mapping[str, str]) -> str:
    """A sentence on the limit that the run has reached, and how to continue. "" if no limit is reached.

    The time of this machine counts for the limits of the whole run, but not for the limit of restarts.
    """
    names = ("MAX_USD", "MAX_HOURS", RESTARTS)
    try:
        usd, hours, restart_usd = (float(environment.get(name) or 0) for name in names)
    except ValueError:  # the program itself reports the error
        return ""
    folder = RunFolder(environment["RUN_URL"])
    spent = spent_at_most(folder.url) if usd or hours else Spent(None, 0.0)
    further = "this machine ends so that it costs no more; to continue, raise {} and type the same command again"
    if usd and spent.usd is not None and spent.usd >= usd:
        return f"at most ${spent.usd:.2f} of ${usd:g} spent: {further.format('MAX_USD')}"
    if hours and spent.seconds >= 3600 * hours:
        return f"{spent.seconds / 3600:.2f} of {hours:g} hours paid: {further.format('MAX_HOURS')}"
    here = (machine_from_environment(None, 0, environment).host, segment_started_at() or 0.0)
    restarts = restarts_too_dear(folder, restart_usd, here=here)
    return restarts and f"{restarts}: see the logs of the last machines; {further.format(RESTARTS)}"


def exit_code(outcome: Outcome, written: int | None) -> int:
    """The exit code of a child. `written` is the code that rank 0 wrote to EXIT_CODE_FILE, or None.

    `written` counts first, because torchrun exits with 1 for any failure of its workers.
    """
    if written is not None:
        return written
    if outcome.returncode == 0:
        return OK
    # After a request to stop, a child may also be killed at the time limit, or fail because its store is unreachable. A
    # SIGTERM that only torchrun got counts as a request to stop, too.
    return PREEMPTED if outcome.stopped or outcome.returncode in SIGTERMED else FAILED


def refuse(run_url: str, attempt: str, problems: list[str]) -> int:
    """Record the refusal of this machine. Returns BAD_NODE, or FAILED after too many refusals."""
    stop.hold_if_leaving()
    for problem in problems:
        log.error("this node is refused: %s", problem)
    folder = RunFolder(run_url).refusals
    day_ago = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() - 86400))
    recent = [name for name in storage.list_names(folder) if name >= day_ago]
    document = {"time": time.time(), "problems": problems}
    storage.write_bytes(storage.join(folder, f"{attempt}.json"), (json.dumps(document) + "\n").encode())
    if len(recent) < REFUSALS_PER_DAY:
        return BAD_NODE
    log.error("%d nodes were refused within a day: the job ends; see %s, then start it again", len(recent) + 1, folder)
    return FAILED


def describe(environment: Mapping[str, str]) -> str:
    """A line with the place, the type, the market and the price of this machine."""
    place = "/".join(environment.get(name) or "?" for name in ("CLOUD", "REGION", "ZONE"))
    market = {"true": "spot", "false": "on demand"}.get(environment.get("USE_SPOT", ""), "?")
    price = environment.get("USD_PER_HOUR")
    price = f"${price}/h ({environment.get('PRICE_SOURCE', 'USD_PER_HOUR')})" if price else "price not known"
    return f"{place}, {environment.get('INSTANCE_TYPE') or '?'}, {market}, {price}"


if __name__ == "__main__":
    run_entry(main)
