"""Ends what this project has running, then asks the clouds themselves whether anything is left.

    python -m launch.down             look only
    python -m launch.down --down      cancel its managed jobs, take its clusters down, delete what they left, then look

Each step is independent of the one before: what SkyPilot does not list or end is said, and the rest goes on.
SkyPilot's own list is not the proof: the clouds are asked for instances, spot requests and volumes with this
project's label, or with the name of one of its tasks. Exits 1 if something is up, if a step failed, or if a source
could not be asked. Machines are taken down through SkyPilot alone: a label does not tell yours from those of a
colleague in the same account.
"""

import json
import random
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core import environment, secrets
from core.console import run_entry
from core.errors import ConfigError
from launch import skypilot
from launch.task import is_managed, read_task

LABEL = ("project", "pretrain-launcher")  # as in the labels of sky/*.yaml
LAMBDA_API = "https://cloud.lambdalabs.com/api/v1"
LAMBDA_KEYS = Path("~/.lambda_cloud/lambda_keys")
# Lambda allows one request per second. SkyPilot and a second terminal use the same key.
LAMBDA_ATTEMPTS = 6
# A cancelled job ends its machine by itself, which takes the controller a minute or two.
WAIT_SECONDS = 300.0
POLL_SECONDS = 5.0
ALIVE = ["pending", "running", "stopping", "stopped"]


def main(arguments: list[str]) -> int:
    if set(arguments) - {"--down"}:
        raise ConfigError("usage: python -m launch.down [--down]")
    environment.adopt()
    names = project_tasks()
    failures: list[str] = []
    if "--down" in arguments:
        names, failures = take_down(names)
    deadline = time.monotonic() + (WAIT_SECONDS if "--down" in arguments else 0)
    waiting_for: list[str] = []
    while True:
        found, unknown = look(names, (records_left, aws_left, lambda_left))
        if not found or time.monotonic() >= deadline:
            break
        # Also what a machine left that has only now gone.
        for thing in found:
            if thing.end:
                with _step(str(thing), failures):
                    print(f"ending {thing}", flush=True)
                    thing.end()
        if waiting_for != (waiting_for := [str(thing) for thing in found]):
            print(f"waiting until it is gone: {'; '.join(waiting_for)}", flush=True)
        time.sleep(POLL_SECONDS)
    for problem in dict.fromkeys([*failures, *unknown]):
        print(f"?  {problem}")
    for thing in found:
        print(f"!  {thing}")
    if found:
        print(f"{len(found)} left and maybe billed: run `make down` again, or end them in the cloud's console")
    elif failures or unknown:
        print("nothing was found, but not everything could be asked or ended; see the lines that begin with ?")
    else:
        print("nothing is left: no job, cluster, instance, spot request or volume")
    return 1 if found or failures or unknown else 0


def project_tasks() -> dict[str, bool]:
    """The name of each task in sky/, and whether it is a managed job."""
    return {task["name"]: is_managed(task) for task in map(read_task, sorted(map(str, Path("sky").glob("*.yaml"))))}


def take_down(names: Mapping[str, bool]) -> tuple[dict[str, bool], list[str]]:
    """End all jobs and clusters. Returns `names` with those of the clusters as the clouds know them, and what failed.

    Managed jobs come first: a job that is not cancelled would replace the machine that is taken from it.
    """
    names = dict(names)
    failures: list[str] = []
    with _step("managed jobs", failures):
        if jobs := jobs_of(names):
            _sky(["jobs", "cancel", "--yes", *(str(job["job_id"]) for job in jobs)])
    with _step("clusters", failures):
        try:
            ours = clusters_of(names)
        except ConfigError:
            # SkyPilot skips the names that it does not know.
            _sky(["down", "--yes", *(name for name, managed in names.items() if not managed)])
            raise
        names |= {cluster["cluster_name_on_cloud"]: False for cluster in ours if cluster.get("cluster_name_on_cloud")}
        if ours:
            _sky(["down", "--yes", *(cluster["name"] for cluster in ours)])
    return names, failures


@contextmanager
def _step(what: str, failures: list[str]) -> Iterator[None]:
    """Part of an emergency exit: whatever goes wrong in it is said, and the next part runs."""
    try:
        yield
    except Exception as error:  # SkyPilot, credentials, network: whatever the libraries raise
        failures.append(f"{what}: {_brief(error)}")
        print(f"?  {failures[-1]}", flush=True)


def _sky(arguments: list[str]) -> None:
    """Run a command of SkyPilot's with its output shown. Raises ConfigError if it fails."""
    print(f"$ sky {' '.join(arguments)}", flush=True)
    if code := subprocess.call([skypilot.find_sky(), *arguments]):
        raise ConfigError(f"`sky {' '.join(arguments)}` ended with {code}; its lines above say why")


def jobs_of(names: Iterable[str]) -> list[dict]:
    """Managed jobs of our tasks that are not over, also several of one name. Raises ConfigError."""
    return [job for job in skypilot.jobs() if job.get("job_name") in set(names) and not skypilot.has_ended(job)]


def clusters_of(names: Iterable[str]) -> list[dict]:
    """This user's clusters of our tasks, whatever they are called: `sky launch` without -c makes a name up."""
    key, value = LABEL
    return [c for c in skypilot.clusters() if c["name"] in set(names) or (c.get("labels") or {}).get(key) == value]


@dataclass(frozen=True)
class Left:
    """Something that may cost money. `end` deletes what holds no data of yours."""

    what: str
    end: Callable[[], object] | None = None

    def __str__(self) -> str:
        return self.what


def look(names: Iterable[str], sources: Iterable[Callable] | None = None) -> tuple[list[Left], list[str]]:
    """What the sources, by default the clouds, still have of ours, and which of them could not be asked."""
    found: list[Left] = []
    unknown: list[str] = []
    for ask in sources or (aws_left, lambda_left):
        try:
            found += ask(tuple(names))
        except Exception as error:  # credentials, network: whatever the libraries raise
            unknown.append(f"{ask.__name__.partition('_')[0]}: could not be asked ({_brief(error)})")
    return found, unknown


def records_left(names: tuple[str, ...]) -> list[Left]:
    """What SkyPilot itself still lists: a job that is only scheduled to be cancelled has a machine, or rents one."""
    found = [Left(f"managed job {job['job_id']} {job['job_name']}: {job['status']}") for job in jobs_of(names)]
    return found + [Left(f"cluster {cluster['name']}: {cluster['status']}") for cluster in clusters_of(names)]


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
    """`data` of an answer of Lambda's API; None without a key. A refusal for too many requests is waited out."""
    keys = LAMBDA_KEYS.expanduser()
    if not keys.exists():
        return None
    request = urllib.request.Request(f"{LAMBDA_API}/{path}", headers={"Authorization": f"Bearer {_lambda_key(keys)}"})
    for attempt in range(1, LAMBDA_ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code != 429 or attempt == LAMBDA_ATTEMPTS:
                raise
            asked = error.headers.get("Retry-After") or ""
            pause = float(asked) if asked.isdigit() else 2.0 ** (attempt - 1) * random.uniform(1.0, 1.3)
        time.sleep(min(pause, 30.0))


def _lambda_key(path: Path) -> str:
    """`api_key` of the file, by SkyPilot 0.14.1's rule: only lines with ` = ` count. Raises ConfigError."""
    pairs = [line.strip().split(" = ") for line in path.read_text(encoding="utf-8-sig").splitlines() if " = " in line]
    key = {pair[0]: pair[1] for pair in pairs}.get("api_key", "")
    if not key:
        raise ConfigError(f"{path}: holds no `api_key = ...` line, with a blank on both sides of the =")
    return secrets.register(key)


def _brief(error: Exception) -> str:
    return secrets.scrub(" ".join(str(error).split()))[:300] or type(error).__name__


if __name__ == "__main__":
    run_entry(main)
