"""An emulated cloud with the real SkyPilot, and this repository's commands run inside of it (tests/test_launch_lab.py).

LAB_DIR is the emulated cloud's folder.
"""

import csv
import io
import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAB = Path(os.environ.get("LAB_DIR") or "/nonexistent")
PYTHON = ROOT / ".venv-launch/bin/python"
BUCKET = "my-bucket"
REHEARSAL = {"DEVICE": "cpu", "RANKS_PER_NODE": "1", "CONFIG": "trainer/configs/debug.yaml", "DATA": "small"}
# What the emulated cloud does not offer, and what stands for it there.
STAND_INS = {'"GH200:1"': '"A10:1"'}
NOT_OFFERED = ("aws/us-east-2", '"L4:1"')


class Lab:
    """The emulated cloud, and this repository's commands run inside of it."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        answer = self.inside("sh", "-c", "echo $AWS_ENDPOINT_URL")
        self.endpoint = answer.stdout.strip()

    def inside(self, *command: str, environment: dict[str, str] | None = None, seconds: float = 600):
        given = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        given |= {"BUCKET_ACCESS_KEY_ID": "test", "BUCKET_SECRET_ACCESS_KEY": "test"}
        given |= environment or {}
        settings = [f"{name}={value}" for name, value in given.items()]
        return subprocess.run(
            [LAB / "labexec", "env", *settings, *command], cwd=ROOT, capture_output=True, text=True, timeout=seconds
        )

    def python(self, *arguments: str, **options) -> str:
        done = self.inside(str(PYTHON), *arguments, **options)
        assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def control(self, *arguments: str) -> str:
        return subprocess.run([LAB / "labctl", *arguments], capture_output=True, text=True, check=True).stdout

    def instances(self, name: str = "") -> list[dict]:
        alive = ("pending", "running", "booting", "active")
        found = json.loads(self.control("json"))
        return [i for i in found if i["state"] in alive and (i["cluster"] or "").startswith(name)]

    def task(self, name: str, called: str = "", without: str = "") -> str:
        """A task file, with stand-ins for what is not offered here; `called`: another name; `without` a cloud."""
        lines = (ROOT / f"sky/{name}.yaml").read_text().splitlines(True)
        unwanted = (*NOT_OFFERED, f"infra: {without},") if without else NOT_OFFERED
        text = "".join(line for line in lines if not any(word in line for word in unwanted))
        for word, other in STAND_INS.items():
            text = text.replace(word, other)
        file = self.scratch / f"{called or name}.yaml"
        file.write_text(text.replace(f"\nname: {name}\n", f"\nname: {called or name}\n"))
        return str(file)

    def launch(
        self, name: str, called: str = "", without: str = "", checks: bool = True, machines: str = "", **settings: str
    ) -> str:
        """Submit as `make` does, with `checks` or without. Returns the name of cluster or job.

        `machines` are options of `sky launch` that choose others than the task's.
        """
        environment = {"BUCKET": BUCKET, "AWS_ENDPOINT_URL": self.endpoint, **REHEARSAL, **settings}
        options = [*([] if checks else ["--no-check"]), *machines.split()]
        self.python("-m", "launch.submit", self.task(name, called, without), *options, environment=environment)
        return called or name

    def output(self, cluster: str) -> str:
        """All output of the cluster's newest job, once it has ended."""
        return self.inside("sky", "logs", cluster).stdout

    def kept_output(self, run: str) -> str:
        """What the run's machines left in the bucket, which outlives them."""
        environment = {"AWS_ENDPOINT_URL": self.endpoint}
        return self.inside(
            str(PYTHON), "-m", "launch.runs", "logs", f"s3://{BUCKET}/runs/{run}", environment=environment
        ).stdout

    def objects(self, folder: str) -> list[str]:
        code = "import sys; from core import storage\nfor found in storage.list_objects(sys.argv[1]): print(found.uri)"
        uri = f"s3://{BUCKET}/{folder}"
        found = self.python("-c", code, uri, environment={"AWS_ENDPOINT_URL": self.endpoint}).split()
        return [each.removeprefix(f"{uri}/") for each in found]

    def step(self, run: str) -> int:
        """Of the newest complete checkpoint; 0 without one."""
        names = self.objects(f"runs/{run}/checkpoints")
        return max((int(name[5:13]) for name in names if name.endswith("/COMPLETE")), default=0)

    def report(self, run: str, *options: str) -> dict:
        """By the run's own ledger; with `options`, such as none at all but "--json", by what else is known."""
        environment = {"AWS_ENDPOINT_URL": self.endpoint}
        options = options or ("--offline", "--json")
        return json.loads(self.python("cost_report.py", f"s3://{BUCKET}/runs/{run}", *options, environment=environment))

    def charges(self, run: str) -> list[dict[str, str]]:
        """The rows of the report's CSV, by all that is known."""
        environment = {"AWS_ENDPOINT_URL": self.endpoint}
        text = self.python("cost_report.py", f"s3://{BUCKET}/runs/{run}", "--csv", environment=environment)
        return list(csv.DictReader(io.StringIO(text)))

    def forecast(self, task: str, *options: str, **settings: str) -> dict:
        """The offer of `estimate` whose speed was measured; the pretended GPUs of others have published speeds."""
        environment = {"BUCKET": BUCKET, "AWS_ENDPOINT_URL": self.endpoint, **REHEARSAL, **settings}
        arguments = ("cost_report.py", "estimate", task, "--json", *options)
        offers = json.loads(self.python(*arguments, environment=environment))["offers"]
        return next(offer for offer in offers if offer["kind"] == "measured")

    def bill(self, name: str, since: float = 0.0) -> list[tuple[float, float]]:
        """Seconds and dollars that the cloud charges for each machine of `machines`, from start to end."""
        found = self.machines(name, since)
        return [(each["end"] - each["start"], self._usd(each)) for each in found]

    def machines(self, name: str, since: float = 0.0, ended: bool = True) -> list[dict]:
        """The machines of a cluster, or of the managed jobs of a task, that started after `since`, oldest first.

        `name` is SkyPilot's, or the cluster's on its cloud.

        By the cloud's own record of events, with `start` and, if they have ended, `end` (unix s). `ended`: only these,
        else only the others.
        """
        events = json.loads(self.inside("curl", "-s", f"{self.endpoint.rpartition(':')[0]}:5001/events").stdout)
        ends = {event["id"]: event["t"] for event in events if event["kind"] == "kill"}
        listed = {each["id"]: each for each in json.loads(self.control("json"))}
        found = []
        for event in events:
            if event["kind"] == "run_instances":
                found += [listed[number] | {"start": event["t"]} for number in event["ids"]]
            elif event["kind"] == "lambda_launch":  # it lists no machine that has ended
                place = {"cluster": event["name"], "market": "lambda", "region": event["region"]}
                found.append({"id": event["id"], "type": event["type"], "start": event["t"], **place})
        of_name = re.compile(rf"{re.escape(name)}((-\d+)?-[0-9a-f]{{8}})?(-head|-worker)?")
        found = [{**each, "end": ends.get(each["id"])} for each in found if of_name.fullmatch(each["cluster"] or "")]
        return [each for each in found if each["start"] >= since and (each["end"] is not None) is ended]

    def _usd(self, machine: dict) -> float:
        """At the cloud's own prices; spot at what its price history says."""
        return (machine["end"] - machine["start"]) / 3600 * self._usd_per_hour(machine)

    def _usd_per_hour(self, instance: dict) -> float:
        if instance["market"] == "spot":
            code = "import sys, time; from clouds import aws; now = time.time()\n"
            code += "print(max(aws.spot_prices(sys.argv[1], sys.argv[2], sys.argv[3], now, now))[1])"
            place = (instance["zone"], instance["type"], instance["region"])
            return float(self.python("-c", code, *place, environment={"AWS_ENDPOINT_URL": self.endpoint}))
        cloud = "lambda" if instance["market"] == "lambda" else "aws"
        catalog = self.inside("sh", "-c", f"cat $HOME/.sky/catalogs/v8/{cloud}/vms.csv").stdout
        rows = csv.DictReader(io.StringIO(catalog))
        return next(float(row["Price"]) for row in rows if row["InstanceType"] == instance["type"])

    def on_node(self, cluster: str, script: str) -> None:
        (instance,) = self.instances(cluster)
        self.control("ssh", instance["id"], "bash", "-c", script)


def wait(what: str, holds: Callable[[], object], seconds: float = 900):
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(2)
    return found
