"""Takes down what this project has running, then asks the clouds themselves whether anything is left.

    python -m launch.left             look only
    python -m launch.left --down      cancel its managed jobs, take its clusters down, delete what they left, then look

SkyPilot's own list is not the proof: the clouds are asked for instances, spot requests and volumes with this
project's label, or with the name of one of its tasks. Exits 1 and names them if there are any. Machines are taken down
through SkyPilot alone: a label does not tell yours from those of a colleague in the same account.
"""

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core.console import run_entry
from core.errors import ConfigError
from launch.submit import find_sky, is_managed, read_task, with_dotenv

LABEL = ("project", "pretrain-launcher")  # as in the labels of sky/*.yaml
LAMBDA_API = "https://cloud.lambdalabs.com/api/v1"
LAMBDA_KEYS = Path("~/.lambda_cloud/lambda_keys")
# A machine that was just told to go stays `shutting-down` for a while, which costs nothing.
WAIT_SECONDS = 120.0
ALIVE = ["pending", "running", "stopping", "stopped"]


def main(arguments: list[str]) -> int:
    os.environ.update(with_dotenv(os.environ, Path(".env")))
    names = {task["name"]: is_managed(task) for task in map(read_task, sorted(map(str, Path("sky").glob("*.yaml"))))}
    if "--down" in arguments:
        take_down(names)
    deadline = time.monotonic() + (WAIT_SECONDS if "--down" in arguments else 0)
    while True:
        found, unknown = look(names)
        if not found or time.monotonic() > deadline:
            break
        time.sleep(5)
    for problem in unknown:
        print(f"?  {problem}")
    for thing in found:
        print(f"!  {thing}")
    if found:
        print(f"{len(found)} left and maybe billed: run `make down` again, or end them in the cloud's console")
        return 1
    print("nothing is left" + (", as far as could be asked" if unknown else ": no instance, spot request or volume"))
    return 1 if unknown else 0


def take_down(names: Mapping[str, bool]) -> None:
    """Managed jobs first: a job that is not cancelled would replace the machine that is taken from it."""
    sky = find_sky()
    running = {job.get("job_name") for job in _listed([sky, "jobs", "queue", "--skip-finished", "-o", "json"], "jobs")}
    for name in sorted(running & {name for name, managed in names.items() if managed}):
        _show([sky, "jobs", "cancel", "--yes", "--name", name])
    up = {cluster["name"] for cluster in _listed([sky, "status", "-o", "json"], "clusters")}
    if ours := sorted(up & set(names)):
        _show([sky, "down", "--yes", *ours])
    for thing in look(names)[0]:
        if thing.end:
            print(f"ending {thing}", flush=True)
            thing.end()


@dataclass(frozen=True)
class Left:
    """Something that may cost money. `end` deletes what holds nothing anybody could miss."""

    what: str
    end: Callable[[], object] | None = None

    def __str__(self) -> str:
        return self.what


def look(names: Iterable[str]) -> tuple[list[Left], list[str]]:
    """What the clouds still have of ours, and which cloud could not be asked."""
    found: list[Left] = []
    unknown: list[str] = []
    for ask in (aws_left, lambda_left):
        try:
            found += ask(tuple(names))
        except Exception as error:  # credentials, network: whatever the libraries raise
            unknown.append(
                f"{ask.__name__.partition('_')[0]}: could not be asked ({' '.join(str(error).split())[:150]})"
            )
    return found, unknown


def aws_left(names: tuple[str, ...], regions: Iterable[str] = ()) -> list[Left]:
    """Instances, open spot requests and unattached volumes with our label, in all regions. Empty without an account."""
    import boto3

    session = boto3.session.Session()
    if session.get_credentials() is None:
        return []
    home = session.region_name or "us-east-1"
    if not regions:
        regions = [r["RegionName"] for r in session.client("ec2", region_name=home).describe_regions()["Regions"]]
    key, value = LABEL
    ours = {"Name": f"tag:{key}", "Values": [value]}
    found = []
    for region in regions:
        ec2 = session.client("ec2", region_name=region)
        answer = ec2.describe_instances(Filters=[ours, {"Name": "instance-state-name", "Values": ALIVE}])
        for instance in (i for r in answer["Reservations"] for i in r["Instances"]):
            kind, state = instance["InstanceType"], instance["State"]["Name"]
            found.append(Left(f"aws {region}: {kind} {instance['InstanceId']} ({state})"))
        answer = ec2.describe_spot_instance_requests(Filters=[ours, {"Name": "state", "Values": ["open"]}])
        for request in (r["SpotInstanceRequestId"] for r in answer["SpotInstanceRequests"]):
            cancel = partial(ec2.cancel_spot_instance_requests, SpotInstanceRequestIds=[request])
            found.append(Left(f"aws {region}: spot request {request}", cancel))
        answer = ec2.describe_volumes(Filters=[ours, {"Name": "status", "Values": ["available"]}])
        for volume in answer["Volumes"]:
            delete = partial(ec2.delete_volume, VolumeId=volume["VolumeId"])
            found.append(Left(f"aws {region}: unattached volume {volume['VolumeId']}, {volume['Size']} GB", delete))
    return found


def lambda_left(names: tuple[str, ...]) -> list[Left]:
    """Lambda has no labels: instances that carry the name of a task, as SkyPilot names them."""
    answer = lambda_get("instances")
    if answer is None:
        return []
    return [
        Left(f"lambda {instance['region']['name']}: {instance['instance_type']['name']} {instance['id']}")
        for instance in answer
        if any((instance.get("name") or "").startswith(name) for name in names)
    ]


def lambda_get(path: str):
    """`data` of an answer of Lambda's API; None without a key."""
    keys = LAMBDA_KEYS.expanduser()
    if not keys.exists():
        return None
    _, _, key = keys.read_text().partition("=")
    if not key.strip():
        raise ConfigError(f"{keys}: holds no `api_key = ...` line")
    request = urllib.request.Request(f"{LAMBDA_API}/{path}", headers={"Authorization": f"Bearer {key.strip()}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["data"]


def _listed(command: list[str], key: str) -> list[dict]:
    """What a listing of sky holds; SkyPilot wraps some listings in an object. Raises ConfigError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    start = min((at for at in (done.stdout.find("["), done.stdout.find("{")) if at >= 0), default=-1)
    if start < 0:
        if done.returncode:
            said = " ".join((done.stderr or done.stdout).split())[-300:]
            raise ConfigError(f"`sky {' '.join(command[1:3])}` failed: {said}")
        return []
    answer = json.loads(done.stdout[start:])
    return answer if isinstance(answer, list) else answer.get(key, [])


def _show(command: list[str]) -> None:
    print(f"$ sky {' '.join(command[1:])}", flush=True)
    if subprocess.call(command):
        print("that failed; what follows shows what is left", flush=True)


if __name__ == "__main__":
    run_entry(main)
