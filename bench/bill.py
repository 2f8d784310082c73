"""Compares the cost report with the charge of an emulated cloud.

The charge follows from the cloud's log of its machines.

    LAB_DIR=… python -m bench.bill --scratch=FOLDER --out=FILE [--only=CASE ...]

Each case runs the debug preset with the real SkyPilot, on AWS or Lambda, and ends when its machines are gone. The
report is made as on a user's computer: from SkyPilot's records and the clouds' answers.

A case holds if its total is within half a percent of the charge, or if the charge is within the printed range and the
range is narrow. A narrow range is at most five percent wide, or at most a heartbeat and a billed minute for each
machine.

Each finished case is stored in FILE, and a second call runs the cases that are missing. The emulated cloud must be up,
with the images `prep` and `train` prepared and the token set `small` in its bucket (tests/test_launch_lab.py prepares
both).
"""

import argparse
import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import harness
from tests.lab import Lab, wait

SMALL = "--checkpoint.every_steps=5 --train.log_every=5 --batch.tokens_per_step=512 --batch.micro_batch_size=2"
SMALL += " --train.eval_every=0 --train.eval_tokens=1024 --train.cpu_threads=1"
LAST = 20
SHORT, ENDLESS = f"{SMALL} --train.steps={LAST}", f"{SMALL} --train.steps=100000"
NO_IMAGE = "registry.example.org/none:1"
SHARE = 0.005
RANGE_SHARE = 0.05
HEARTBEAT_SECONDS, BILLED_SECONDS = 30.0, 60.0
LONGEST_SECONDS = 1800.0
TASK = "pretrain-8xa100"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="existing folder for task files")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; finished cases are added to it")
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), help="measure only these cases")
    parser.add_argument(
        "--runs",
        nargs="*",
        metavar="RUN=CLUSTER",
        default=[],
        help="also compare these finished runs of other programs",
    )
    options = parser.parse_args()
    record = json.loads(options.out.read_text()) if options.out.exists() else {**harness.header(), "cases": {}}
    lab, keep = Lab(options.scratch.resolve()), threading.Lock()

    others = dict(each.split("=") for each in options.runs)

    def run(name: str) -> None:
        try:
            found = compared(lab, others[name], name) if name in others else CASES[name](lab)
        except (AssertionError, subprocess.SubprocessError, KeyError, ValueError) as error:
            found = {"error": f"{type(error).__name__}: {str(error)[-500:]}"}
            print(f"{name}: {found['error']}", flush=True)
            return
        with keep:
            record["cases"][name] = found
            options.out.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{name}: {json.dumps(found)}", flush=True)

    wanted = [name for name in (*options.only, *others) if name not in record["cases"]]
    threads = [threading.Thread(target=run, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    show(record)


def show(record: dict[str, Any]) -> None:
    heads = ("case", "machines", "charged $", "report $", "at most $", "difference %", "holds")
    rows = []
    for name, case in record["cases"].items():
        usd = [f"{case[key]:.4f}" for key in ("charged_usd", "report_usd", "report_usd_most")]
        rows.append((name, str(case["machines"]), *usd, f"{case['difference_percent']:+.2f}", str(case["holds"])))
    harness.print_table("the report and the bill", heads, rows)


def compared(lab: Lab, name: str, *runs: str) -> dict[str, Any]:
    """Compare the reports of `runs` with the charge for the machines of a cluster or job.

    Waits until the machines are gone.
    """
    wait("no machine", lambda: not lab.machines(name, ended=False), LONGEST_SECONDS)
    machines = lab.bill(name)
    reports = [lab.report(run, "--json") for run in runs]
    charged = sum(usd for _, usd in machines)
    totals = [report["total"] for report in reports]
    # A total is rounded to cents, which are half a percent of a short run. Charges are not rounded. The emulated cloud
    # charges for machines only.
    charges = [row for run in runs for row in lab.charges(run) if row["ServiceCategory"] == "Compute"]
    usd = sum(float(row["BilledCost"]) for row in charges)
    most = sum(float(row["x_BilledCostAtMost"] or row["BilledCost"]) for row in charges)
    price = charged / sum(seconds for seconds, _ in machines)
    widest = max(RANGE_SHARE * charged, (HEARTBEAT_SECONDS + BILLED_SECONDS) * price * len(machines))
    is_near = abs(usd - charged) <= SHARE * charged
    return {
        "machines": len(machines),
        "charged_seconds": round(sum(seconds for seconds, _ in machines), 1),
        "report_seconds": round(sum(total["seconds"] for total in totals), 1),
        "charged_usd": charged,
        "report_usd": usd,
        "report_usd_most": most,
        "complete": all(total["complete"] for total in totals),
        "difference_percent": round(100 * (usd / charged - 1), 3),
        "holds": is_near or (usd - SHARE * charged <= charged <= most and most - usd <= widest),
        "missing": [line for report in reports for line in report.get("missing") or ()],
        "lines": {line["name"]: round(line["seconds"], 1) for report in reports for line in report["phases"]},
    }


# --- the cases ---------------------------------------------------------------------------------------------------


def on_demand(lab: Lab, name: str, without: str, machines: str = "") -> dict[str, Any]:
    lab.launch(TASK, name, without=without, machines=machines, RUN=name, TRAIN_ARGS=SHORT)
    wait("the last step", lambda: lab.step(name) == LAST, LONGEST_SECONDS)
    return compared(lab, name, name)


def spot(lab: Lab) -> dict[str, Any]:
    name = "bill-spot"
    lab.launch("pretrain-8xa100-spot", name, RUN=name, TRAIN_ARGS=f"{SMALL} --train.steps=300")
    for step in (10, 100):
        wait(f"step {step}", lambda step=step: lab.step(name) >= step, LONGEST_SECONDS)
        for machine in lab.machines(name, ended=False):
            lab.control("preempt-id", machine["id"])
    wait("the last step", lambda: lab.step(name) == 300, LONGEST_SECONDS)
    return compared(lab, name, name)


def killed(lab: Lab) -> dict[str, Any]:
    """A case in which `docker kill` ends the container on Lambda, so that the ledger has no end."""
    name = "bill-killed"
    lab.launch(TASK, name, without="aws", RUN=name, TRAIN_ARGS=ENDLESS)
    wait("a checkpoint", lambda: lab.step(name) >= 5, LONGEST_SECONDS)
    lab.on_node(name, "docker kill pretrain-launcher")
    return compared(lab, name, name)


def two_runs(lab: Lab) -> dict[str, Any]:
    """A case in which a second run begins on the same machine, before the machine goes down."""
    name = "bill-shared"
    for run in ("bill-shared-a", "bill-shared-b"):
        lab.launch(TASK, name, without="lambda", RUN=run, TRAIN_ARGS=SHORT)
        wait("the last step", lambda run=run: lab.step(run) == LAST, LONGEST_SECONDS)
    found = compared(lab, name, "bill-shared-a", "bill-shared-b")
    assert found["machines"] == 1, "the machine was down before the second run"
    return found


def died_in_set_up(lab: Lab) -> dict[str, Any]:
    """A case in which the first machine gets no image, and a second machine trains the run."""
    name = "bill-setup"
    lab.launch(TASK, name, without="lambda", RUN=name, TRAIN_ARGS=SHORT, IMAGE=NO_IMAGE)
    wait("no machine", lambda: lab.machines(name) and not lab.machines(name, ended=False), LONGEST_SECONDS)
    return on_demand(lab, name, "lambda")


CASES: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "aws": lambda lab: on_demand(lab, "bill-aws", "lambda"),
    "lambda": lambda lab: on_demand(lab, "bill-lambda", "aws"),
    "two-nodes": lambda lab: on_demand(lab, "bill-nodes", "lambda", "--num-nodes 2"),
    "spot": spot,
    "killed": killed,
    "two-runs": two_runs,
    "set-up": died_in_set_up,
}


if __name__ == "__main__":
    main()
