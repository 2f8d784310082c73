"""Every task launched for real, with the real SkyPilot, on an emulated cloud: `make test-launch LAB_DIR=…`.

The cloud gives real hosts with a real Docker engine behind emulated AWS and Lambda APIs; only GPUs are pretended. So
the tasks run as they are, with the debug preset on the CPU (DEVICE=cpu): launch, image build on the node, preparation,
training, preemptions, and the end of every machine. LAB_DIR is the emulated cloud's folder; without it, all is
skipped.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import corpus

ROOT = Path(__file__).parent.parent
LAB = Path(os.environ.get("LAB_DIR") or "/nonexistent")
PYTHON = ROOT / ".venv-launch/bin/python"
BUCKET = "my-bucket"
SMALL = "--checkpoint.every=5 --train.log_every=5 --batch.tokens=1024 --train.eval_every=0 --train.eval_tokens=1024"
REHEARSAL = {"DEVICE": "cpu", "RANKS_PER_NODE": "1", "CONFIG": "trainer/configs/debug.yaml", "DATA": "small"}
# What the emulated cloud does not offer, and what stands for it there.
STAND_INS = {'"GH200:1"': '"A10:1"', '"A100:2"': '"A100:1"'}
NOT_OFFERED = ("aws/us-east-2", '"L4:1"')
# Idle time in the tasks, the minute that SkyPilot takes to look, and the way down.
GONE_SECONDS = 6 * 60

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not (LAB / "labexec").exists(), reason="LAB_DIR names no emulated cloud"),
]


class Lab:
    """The emulated cloud, and this repository's commands run inside of it."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        answer = self.inside("sh", "-c", "echo $AWS_ENDPOINT_URL")
        self.endpoint = answer.stdout.strip()

    def inside(self, *command: str, environment: dict[str, str] | None = None, seconds: float = 600):
        given = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
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

    def task(self, name: str, called: str = "") -> str:
        """A task file, with stand-ins for what is not offered here; `called`: another name."""
        lines = (ROOT / f"sky/{name}.yaml").read_text().splitlines(True)
        text = "".join(line for line in lines if not any(word in line for word in NOT_OFFERED))
        for word, other in STAND_INS.items():
            text = text.replace(word, other)
        file = self.scratch / f"{called or name}.yaml"
        file.write_text(text.replace(f"\nname: {name}\n", f"\nname: {called or name}\n"))
        return str(file)

    def launch(self, name: str, called: str = "", **settings: str) -> str:
        """Submit as `make` does. Returns the name of cluster or job."""
        environment = {"BUCKET": BUCKET, "AWS_ENDPOINT_URL": self.endpoint, **REHEARSAL, **settings}
        self.python("-m", "launch.submit", self.task(name, called), environment=environment)
        return called or name

    def output(self, cluster: str) -> str:
        """All output of the cluster's newest job, once it has ended."""
        return self.inside("sky", "logs", cluster).stdout

    def kept_output(self, run: str) -> str:
        """What the run's machines left in the bucket, which outlives them."""
        environment = {"AWS_ENDPOINT_URL": self.endpoint}
        return self.inside(
            str(PYTHON), "-m", "launch.logs", f"s3://{BUCKET}/runs/{run}", environment=environment
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

    def report(self, run: str) -> dict:
        environment = {"AWS_ENDPOINT_URL": self.endpoint}
        return json.loads(
            self.python("cost_report.py", f"s3://{BUCKET}/runs/{run}", "--offline", "--json", environment=environment)
        )

    def on_node(self, cluster: str, script: str) -> None:
        (instance,) = self.instances(cluster)
        self.control("ssh", instance["id"], "bash", "-c", script)


@pytest.fixture(scope="module")
def lab(tmp_path_factory, vocab_bpe):
    scratch = tmp_path_factory.mktemp("lab")
    subprocess.run([LAB / "up.sh"], check=True)
    for target in ("prep", "train"):
        arguments = ["--target", target, "-t", f"pretrain-launcher:{target}", "--build-arg", "TORCH=cpu"]
        subprocess.run([LAB / "image.sh", ROOT, *arguments], check=True, capture_output=True)
    here = Lab(scratch)
    assert here.inside("sky", "api", "start").returncode == 0
    assert here.inside("sky", "check", "aws", "lambda").returncode == 0
    paragraphs = [part for text in corpus.speeches(60) for part in text.split("\n\n") if len(part) > 200]
    corpus.write_parquet(scratch / "source", [paragraphs[::2], paragraphs[1::2]], rows=200)
    (scratch / "source/vocab.bpe").write_bytes(vocab_bpe.read_bytes())
    code = """
import sys, boto3, pathlib
s3 = boto3.client("s3")
s3.create_bucket(Bucket=sys.argv[1])
for path in pathlib.Path(sys.argv[2]).iterdir():
    s3.upload_file(str(path), sys.argv[1], f"source/{path.name}")
"""
    here.python("-c", code, BUCKET, str(scratch / "source"), environment={"AWS_ENDPOINT_URL": here.endpoint})
    yield here
    subprocess.run([LAB / "down.sh"], check=True)


@pytest.fixture(scope="module")
def data(lab) -> str:
    """The tokens, prepared by the task itself. Returns what it printed."""
    source = {"SOURCE_URL": f"s3://{BUCKET}/source/*.parquet", "VOCAB_URL": f"s3://{BUCKET}/source/vocab.bpe"}
    arguments = "--data.val_fraction=0.05"
    config = "data_prep/configs/fineweb-edu-10bt.yaml"
    cluster = lab.launch("prep-data", RUN="prep", CONFIG=config, PREP_ARGS=arguments, **source)
    return lab.output(cluster)


def wait(what: str, holds: Callable[[], object], seconds: float = 900):
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(2)
    return found


def test_preparation_writes_a_complete_set(lab, data):
    assert "SUCCEEDED" in data
    assert "manifest.json" in lab.objects("data/small")
    assert any(name.startswith("logs/") for name in lab.objects("runs/prep"))


@pytest.mark.parametrize("name", ["pretrain-8xa100", "pretrain-gh200", "pretrain-2xa100", "pretrain-multinode"])
def test_training_on_demand(lab, data, name):
    cluster = lab.launch(name, RUN=name, TRAIN_ARGS=f"{SMALL} --train.steps=10")
    output = lab.output(cluster)
    assert "SUCCEEDED" in output, output[-3000:]
    assert lab.step(name) == 10
    kept = lab.objects(f"runs/{name}")
    for folder in ("ledger/segment-000001/start.jsonl", "metrics/", "logs/", "preflight/"):
        assert any(each.startswith(folder) for each in kept), folder
    (segment,) = lab.report(name)["segments"]
    assert segment["end"] == "finished"
    assert segment["usd_per_hour"] > 0
    assert lab.inside("sky", "down", "--yes", cluster).returncode == 0
    assert lab.instances(cluster) == []


@pytest.mark.parametrize("name", ["smoke-cpu", "smoke-gpu"])
def test_smoke_goes_from_text_to_report(lab, name):
    source = {"SOURCE_URL": f"s3://{BUCKET}/source/*.parquet", "VOCAB_URL": f"s3://{BUCKET}/source/vocab.bpe"}
    small = f"{SMALL} --train.steps=10"
    cluster = lab.launch(name, RUN=name, DATA=name, TRAIN_ARGS=small, PREP_ARGS="--data.val_fraction=0.05", **source)
    output = lab.output(cluster)
    assert "SUCCEEDED" in output, output[-3000:]
    for word in ("image prep", "image train", "documents", "step 10/10", "Phases"):
        assert word in output
    assert lab.inside("sky", "down", "--yes", cluster).returncode == 0


def test_image_is_built_on_its_own_node(lab):
    cluster = lab.launch("build-image", IMAGE="registry.example.org/pretrain:1", DEVICE="cpu")
    output = lab.output(cluster)
    assert "SUCCEEDED" in output, output[-3000:]
    assert "prep image works" in output
    assert "train image works" in output
    assert lab.inside("sky", "down", "--yes", cluster).returncode == 0


def test_spot_job_is_preempted_twice_and_finishes(lab, data):
    job = lab.launch("pretrain-8xa100-spot", RUN="spot", TRAIN_ARGS=f"{SMALL} --train.steps=60")
    for number, step in enumerate((10, 25), 1):
        wait(f"step {step}", lambda step=step: lab.step("spot") >= step)
        wait(f"segment {number}", lambda number=number: len(lab.report("spot")["segments"]) >= number)
        lab.control("preempt", job)
    wait("the last step", lambda: lab.step("spot") == 60)
    wait("no machine", lambda: lab.instances(job) == [], GONE_SECONDS)
    report = lab.report("spot")
    ends = [segment["end"] for segment in report["segments"]]
    assert len(ends) == 3
    assert ends[2] == "finished"
    assert "finished" not in ends[:2]
    lost = next(phase for phase in report["phases"] if phase["name"] == "train_lost")
    assert 0 <= lost["seconds"] < 60


def test_no_ending_leaves_a_machine(lab, data):
    """Success and failures, SIGKILL of the trainer, the cap, a cancelled job, a cancelled managed job."""
    small = f"{SMALL} --train.steps=10"
    endless = f"{SMALL} --train.steps=100000"
    lab.launch("pretrain-8xa100", "end-success", RUN="end-success", TRAIN_ARGS=small)
    lab.launch("pretrain-8xa100", "end-crash", RUN="end-crash", TRAIN_ARGS="--model.layers=0")
    lab.launch("pretrain-8xa100", "end-setup", RUN="end-setup", IMAGE="registry.example.org/none:1")
    lab.launch("pretrain-8xa100", "end-cap", RUN="end-cap", TRAIN_ARGS=endless, MAX_USD="2")
    killed = lab.launch("pretrain-8xa100", "end-killed", RUN="end-killed", TRAIN_ARGS=endless)
    cancelled = lab.launch("pretrain-8xa100", "end-cancelled", RUN="end-cancelled", TRAIN_ARGS=endless)
    job = lab.launch("pretrain-8xa100-spot", "end-job", RUN="end-job", TRAIN_ARGS=endless)
    wait("a checkpoint", lambda: lab.step("end-killed") >= 5)
    lab.on_node(killed, "sudo pkill -KILL -f 'trainer[.]train'")
    wait("a checkpoint", lambda: lab.step("end-cancelled") >= 5)
    assert lab.inside("sky", "cancel", "--yes", "--all", cancelled).returncode == 0
    wait("no container", lambda: no_container(lab, cancelled), 150)
    wait("a checkpoint", lambda: lab.step("end-job") >= 5)
    assert lab.inside("sky", "jobs", "cancel", "--yes", "--name", job).returncode == 0
    wait("the cap", lambda: "exit code" in lab.kept_output("end-cap"))
    wait("no machine", lambda: lab.instances("end-") == [], GONE_SECONDS)
    ends = {run: lab.kept_output(run).splitlines()[-1] for run in ("end-success", "end-crash", "end-cap", cancelled)}
    codes = {run: int(line.rpartition("exit code ")[2]) for run, line in ends.items()}
    assert codes == {"end-success": 0, "end-crash": 1, "end-cap": 34, "end-cancelled": 33}


def no_container(lab: Lab, cluster: str) -> bool:
    (instance,) = lab.instances(cluster) or [None]
    return instance is None or "pretrain-launcher" not in lab.control("ssh", instance["id"], "docker", "ps")
