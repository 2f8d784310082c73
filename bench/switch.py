"""Boots machines with the dead man's switch on an emulated AWS, and measures when each machine is gone.

    LAB_DIR=… python -m bench.switch --minutes=1.5 [--out=FILE]

EC2 starts the machines, without SkyPilot, with the user data that SkyPilot would send after `make role`. There are
seven machines. Two have no job, one on demand and one on spot. One has a job that gives signs of life. One is a
controller of managed jobs, and one belongs to another project. The last two, one on demand and one on spot, have lost
their network, so they cannot ask for their tags or role. The emulated cloud must be up. Seconds count from the switch's
start at boot.
"""

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import boto3

from bench import harness
from launch import role

LAB = Path(os.environ.get("LAB_DIR") or "/nonexistent")
LAB_ROOT = Path(os.environ.get("LAB_ROOT") or "/tmp/lab")
OURS = {"project": "pretrain-launcher"}
# For each name: the tags, whether the machine is on spot, whether it has a network, whether a job gives signs of life.
MACHINES: dict[str, tuple[dict[str, str], bool, bool, bool]] = {
    "on demand, no job": ({**OURS, "ray-cluster-name": "a-1a2b3c4d"}, False, True, False),
    "spot, no job": ({**OURS, "ray-cluster-name": "b-1a2b3c4d"}, True, True, False),
    "on demand, a job": ({**OURS, "ray-cluster-name": "c-1a2b3c4d"}, False, True, True),
    "controller": ({"ray-cluster-name": "sky-jobs-controller-1a2b3c4d"}, False, True, False),
    "another project's": ({"ray-cluster-name": "d-1a2b3c4d", "project": "other"}, False, True, False),
    "on demand, no network": ({**OURS, "ray-cluster-name": "e-1a2b3c4d"}, False, False, False),
    "spot, no network": ({**OURS, "ray-cluster-name": "f-1a2b3c4d"}, True, False, False),
}
BOOT_SECONDS = 600.0
ALIVE = "var/lib/pretrain-launcher/alive"


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument(
        "--minutes", type=float, default=1.5, help="minutes without a sign of life after which a machine ends itself"
    )
    options = parser.parse_args()
    ids = {name: start(options.minutes, *machine[:3]) for name, machine in MACHINES.items()}
    ended = threading.Event()
    for name, (_, _, _, has_job) in MACHINES.items():
        if has_job:
            threading.Thread(target=live, args=(ids[name], ended), daemon=True).start()
    found = {name: {"state": "running", "seconds": None} for name in MACHINES}
    began: dict[str, float] = {}
    deadline = time.monotonic() + BOOT_SECONDS
    # A machine without a network waits for the time of the switch twice. A machine that is still running a minute after
    # that counts as never ending.
    while len(began) < len(ids) or time.time() < max(began.values()) + options.minutes * 120 + 60:
        if time.monotonic() > deadline and len(began) < len(ids):
            raise SystemExit(f"not all machines have booted within {BOOT_SECONDS:.0f} s")
        states = {each["id"]: each["state"] for each in instances()}
        for name, number in ids.items():
            switch = LAB_ROOT / "instances" / number / "upper" / Path(ALIVE).parent / "lock"
            if name not in began and switch.exists():
                began[name] = switch.stat().st_mtime
            state = states.get(number, "terminated")
            if found[name]["seconds"] is None and state in ("stopped", "terminated", "shutting-down", "stopping"):
                found[name] = {"state": state, "seconds": round(time.time() - began[name], 1)}
        time.sleep(0.5)
    ended.set()
    harness.finish({**harness.header("boto3"), "minutes": options.minutes, "machines": found}, show, options.out)


def start(minutes: float, tags: dict[str, str], spot: bool, has_network: bool) -> str:
    """Start a machine and return its id.

    If `has_network` is true, the machine is in a subnet of the emulated cloud. The cloud's services can be reached only
    from there.
    """
    ec2 = boto3.client("ec2", region_name="us-east-1")
    zone = [{"Name": "availability-zone", "Values": ["us-east-1a"]}]
    more: dict[str, Any] = {"InstanceMarketOptions": {"MarketType": "spot"}} if spot else {}
    if has_network:
        more["SubnetId"] = ec2.describe_subnets(Filters=zone)["Subnets"][0]["SubnetId"]
    made = ec2.run_instances(
        ImageId="ami-785db401",
        MinCount=1,
        MaxCount=1,
        InstanceType="c6i.2xlarge",
        UserData="#cloud-config\nruncmd:\n" + "".join(f"  - {command}\n" for command in role.start_switch(minutes)),
        TagSpecifications=[
            {"ResourceType": "instance", "Tags": [{"Key": key, "Value": value} for key, value in tags.items()]}
        ],
        **more,
    )
    return made["Instances"][0]["InstanceId"]


def live(number: str, ended: threading.Event) -> None:
    """Give signs of life on a machine, as a job does."""
    while not ended.wait(10):
        subprocess.run([LAB / "labctl", "ssh", number, "touch", "-c", f"/{ALIVE}"], capture_output=True)


def instances() -> list[dict[str, Any]]:
    done = subprocess.run([LAB / "labctl", "json"], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else []


def show(record: dict[str, Any]) -> None:
    rows = [
        (name, each["state"], "-" if each["seconds"] is None else f"{each['seconds']:.0f}")
        for name, each in record["machines"].items()
    ]
    title = f"a switch of {record['minutes']:g} minutes"
    harness.print_table(title, ("machine", "state at the end", "seconds after the boot"), rows)


if __name__ == "__main__":
    main()
