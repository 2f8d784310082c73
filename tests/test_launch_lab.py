"""Every task launched for real, with the real SkyPilot, on an emulated cloud: `make test-launch LAB_DIR=…`.

The cloud gives real hosts with a real Docker engine behind emulated AWS and Lambda APIs; only GPUs are pretended. So
the tasks run as they are, with the debug preset on the CPU (DEVICE=cpu): launch, image build on the node, preparation,
training, preemptions, and the end of every machine. LAB_DIR is the emulated cloud's folder; without it, all is
skipped.
"""

import os
import subprocess

import pytest

from tests import corpus, tuning
from tests.lab import BUCKET, LAB, ROOT, Lab, wait

SMALL = "--checkpoint.every_steps=5 --train.log_every=5 --batch.tokens_per_step=1024 --batch.micro_batch_size=4"
SMALL += " --train.eval_every=0 --train.eval_tokens=1024"
# Machines have no network but the emulated cloud, which holds no set for evaluations.
PREPARED = "--data.val_fraction=0.05 --evaluation_sets="
# Idle time in the tasks, the minute that SkyPilot takes to look, and the way down.
GONE_SECONDS = 6 * 60

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not (LAB / "labexec").exists(), reason="LAB_DIR names no emulated cloud"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory, vocab_bpe):
    scratch = tmp_path_factory.mktemp("lab")
    # One that is up has work of others: it stays.
    was_up = subprocess.run([LAB / "labctl", "ls"], capture_output=True).returncode == 0
    # A driver that needs NVIDIA's compatibility package where it is not rehearsed on the CPU.
    subprocess.run([LAB / "up.sh"], check=True, env={**os.environ, "LAB_DRIVER": "570.00"})
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
    tuning.write_rows(scratch / "source/rows.jsonl", tuning.conversations(200))
    here.python("-c", code, BUCKET, str(scratch / "source"), environment={"AWS_ENDPOINT_URL": here.endpoint})
    yield here
    if not was_up:
        subprocess.run([LAB / "down.sh"], check=True)


@pytest.fixture(scope="module")
def data(lab) -> str:
    """The tokens, prepared by the task itself. Returns what it printed."""
    source = {"SOURCE_URL": f"s3://{BUCKET}/source/*.parquet", "VOCAB_URL": f"s3://{BUCKET}/source/vocab.bpe"}
    arguments = PREPARED
    config = "data_prep/configs/fineweb-edu-10bt.yaml"
    cluster = lab.launch("prep-data", RUN="prep", CONFIG=config, PREP_ARGS=arguments, **source)
    return lab.output(cluster)


def test_preparation_writes_a_complete_set(lab, data):
    assert "SUCCEEDED" in data
    assert "manifest.json" in lab.objects("data/small")
    assert any(name.startswith("logs/") for name in lab.objects("runs/prep"))


@pytest.mark.parametrize(
    ("task", "name", "machines"),
    [
        ("pretrain-8xa100", "pretrain-8xa100", ""),
        ("pretrain-gh200", "pretrain-gh200", ""),
        ("pretrain-8xa100", "other-gpus", "--gpus A10:1"),
        ("pretrain-8xa100", "two-nodes", "--num-nodes 2"),
    ],
)
def test_training_on_demand(lab, data, task, name, machines):
    cluster = lab.launch(task, name, machines=machines, RUN=name, TRAIN_ARGS=f"{SMALL} --train.steps=10")
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


def test_a_driver_that_cannot_run_the_image_is_refused_before_the_build(lab):
    cluster = lab.launch(
        "pretrain-8xa100", "old-driver", checks=False, RUN="old-driver", DEVICE="cuda", CUDA_COMPAT="no"
    )
    output = lab.output(cluster)
    assert "FAILED_SETUP" in output, output[-3000:]
    assert "returncode=35" in output
    assert "this node is refused: its driver 570.00 is older than CUDA 13.0 needs (R580)" in output
    assert "building the image" not in output
    wait("no machine", lambda: lab.instances(cluster) == [], GONE_SECONDS)


@pytest.mark.parametrize("name", ["smoke-cpu", "smoke-gpu"])
def test_smoke_goes_from_text_to_report(lab, name):
    source = {"SOURCE_URL": f"s3://{BUCKET}/source/*.parquet", "VOCAB_URL": f"s3://{BUCKET}/source/vocab.bpe"}
    small = f"{SMALL} --train.steps=10"
    cluster = lab.launch(name, RUN=name, DATA=name, TRAIN_ARGS=small, PREP_ARGS=PREPARED, **source)
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


@pytest.fixture(scope="module")
def spot(lab, data) -> str:
    """A managed job on spot machines, two of which were taken away. Returns its name; its run is "spot"."""
    job = lab.launch("pretrain-8xa100-spot", RUN="spot", TRAIN_ARGS=f"{SMALL} --train.steps=60")
    for number, step in enumerate((10, 25), 1):
        wait(f"step {step}", lambda step=step: lab.step("spot") >= step)
        wait(f"segment {number}", lambda number=number: len(lab.report("spot")["segments"]) >= number)
        lab.control("preempt", job)
    wait("the last step", lambda: lab.step("spot") == 60)
    wait("no machine", lambda: lab.instances(job) == [], GONE_SECONDS)
    return job


@pytest.fixture(scope="module")
def on_demand(lab, data) -> str:
    """A run of 40 steps on AWS, which tells when its machines were up, to the end of the machine."""
    settings = {"RUN": "on-demand", "TRAIN_ARGS": f"{SMALL} --train.steps=40"}
    cluster = lab.launch("pretrain-8xa100", "on-demand", without="lambda", **settings)
    wait("no machine", lambda: lab.step("on-demand") == 40 and lab.instances(cluster) == [], 900)
    return cluster


def test_spot_job_is_preempted_twice_and_finishes(lab, spot):
    report = lab.report("spot")
    ends = [segment["end"] for segment in report["segments"]]
    assert len(ends) == 3
    assert ends[2] == "finished"
    assert "finished" not in ends[:2]
    lost = next(phase for phase in report["phases"] if phase["name"] == "train_lost")
    assert 0 <= lost["seconds"] < 60


@pytest.mark.parametrize(
    ("run", "clusters", "made_by"),
    [("prep", "prep-data", "data"), ("on-demand", "on-demand", "on_demand"), ("spot", "pretrain-8xa100-spot", "spot")],
)
def test_the_report_is_the_bill(lab, run, clusters, made_by, request):
    """Within one per cent of what the cloud charges for machines, and its phases add up to its total."""
    request.getfixturevalue(made_by)
    wait("no machine", lambda: lab.instances(clusters) == [], GONE_SECONDS)
    report, charged = lab.report(run, "--json"), lab.bill(clusters)
    seconds, usd = (sum(column) for column in zip(*charged, strict=True))
    total, places = report["total"], report["places"]
    # The emulated cloud's prices are those of machines alone.
    of_machines = total["usd"] - sum(each["usd"] for each in report["phases"] if each["name"] in ("disks", "addresses"))
    print(
        f"{run}: {total['seconds']:.1f} of {seconds:.1f} s ({100 * (total['seconds'] / seconds - 1):+.2f} %)", end=", "
    )
    print(f"${of_machines:.{places}f} of ${usd:.{places}f}")
    assert total["seconds"] == pytest.approx(seconds, rel=0.01)
    # The emulated spot price is a thousandth of a cent an hour: there rounding is more than one per cent.
    assert of_machines == pytest.approx(usd, rel=0.01, abs=10**-places)
    for table in ("phases", "segments"):
        assert sum(line["usd"] for line in report[table]) == pytest.approx(total["usd"], abs=10**-places / 100)


def test_the_forecast_is_the_report(lab, on_demand):
    """A run of three times the length, forecast from the shorter one: its speed, and its time to come and to go."""
    before = {phase["name"]: phase["seconds"] for phase in lab.report("on-demand", "--json")["phases"]}
    settings = {"RUN": "longer", "TRAIN_ARGS": f"{SMALL} --train.steps=120"}
    known = [f"--provision-seconds={before.get('provision', 0)}", "--image-seconds=0"]
    known += [f"--shutdown-seconds={before['idle_until_down']}", f"--like=s3://{BUCKET}/runs/on-demand"]
    expected = lab.forecast(lab.task("pretrain-8xa100", "longer", "lambda"), *known, **settings)
    cluster = lab.launch("pretrain-8xa100", "longer", without="lambda", **settings)
    wait("no machine", lambda: lab.step("longer") == 120 and lab.instances(cluster) == [], 900)
    usd = lab.report("longer", "--json")["total"]["usd"]
    print(f"forecast ${expected['usd']:.4f}, report ${usd:.4f}, {100 * (expected['usd'] / usd - 1):+.1f} %")
    assert expected["offer"]["instance_type"] == "p4d.24xlarge"
    assert expected["usd"] == pytest.approx(usd, rel=0.2)


def test_a_trained_model_is_fine_tuned_and_evaluated(lab, data):
    lab.launch("pretrain-8xa100", "base", RUN="base", TRAIN_ARGS=f"{SMALL} --train.steps=10")
    wait("the model", lambda: lab.step("base") == 10)
    small = f"{SMALL} --train.steps=6 --optimizer.warmup_steps=2"
    rows = f"--data.examples=s3://{BUCKET}/source/rows.jsonl"
    start = f"s3://{BUCKET}/runs/base"
    config = "trainer/configs/tuning/finetune-chat.yaml"
    cluster = lab.launch("finetune", RUN="chat", START=start, CONFIG=config, TRAIN_ARGS=f"{small} {rows}")
    output = lab.output(cluster)
    assert "SUCCEEDED" in output, output[-3000:]
    assert lab.step("chat") == 6
    assert lab.report("chat")["stage"] == "finetune"
    arguments = "--tasks=perplexity --tokens=4096"
    scored = lab.launch("evaluate", RUN="base", EVAL_ARGS=arguments)
    output = lab.output(scored)
    assert "SUCCEEDED" in output, output[-3000:]
    assert any(name.startswith("step-00000010/perplexity") for name in lab.objects("runs/base/evaluations"))
    assert lab.report("base/evaluations")["stage"] == "evaluate"
    for each in (cluster, scored, "base"):
        assert lab.inside("sky", "down", "--yes", each).returncode == 0


def test_no_ending_leaves_a_machine(lab, data):
    """Success and failures, SIGKILL of the trainer, the cap, a cancelled job, a cancelled managed job."""
    small = f"{SMALL} --train.steps=10"
    endless = f"{SMALL} --train.steps=100000"
    lab.launch("pretrain-8xa100", "end-success", RUN="end-success", TRAIN_ARGS=small)
    lab.launch("pretrain-8xa100", "end-crash", checks=False, RUN="end-crash", TRAIN_ARGS="--model.layers=0")
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
    command = ("docker", "ps", "--format", "{{.Names}}")
    return instance is None or "pretrain-launcher" not in lab.control("ssh", instance["id"], *command).split()
