"""What a forecast reads in a task file: resources, idle time, the program with its settings and its model."""

from pathlib import Path

import pytest

from core import task as tasks
from core.errors import ConfigError
from core.task import Want
from tests.sky_tasks import GPT2, write


@pytest.mark.parametrize(
    ("resources", "wants"),
    [
        ("accelerators: A100:8", [Want(accelerator="A100", accelerators=8)]),
        ("accelerators: {H100: 8}", [Want(accelerator="H100", accelerators=8)]),
        ("accelerators: [A100:8, H100:8]", [Want(accelerator=name, accelerators=8) for name in ("A100", "H100")]),
        ("infra: aws/us-east-1", [Want(cloud="aws", region="us-east-1")]),
        ("infra: aws/*/us-east-1a", [Want(cloud="aws", zone="us-east-1a")]),
        ("{cloud: Lambda, instance_type: gpu_8x_a100}", [Want(cloud="lambda", instance_type="gpu_8x_a100")]),
        ("{cpus: 8+, memory: 32}", [Want(cpus=(8.0, True), memory_gb=(32.0, False))]),
        ("{use_spot: true, max_hourly_cost: 12}", [Want(spot=True, max_usd_per_hour=12)]),
        (
            "accelerators: A100:8\nany_of: [{cloud: aws, use_spot: true}, {cloud: lambda}]",
            [
                Want(cloud="aws", accelerator="A100", accelerators=8, spot=True),
                Want(cloud="lambda", accelerator="A100", accelerators=8),
            ],
        ),
        (
            "ordered: [{accelerators: H100}, {cpus: 4}]",
            [Want(accelerator="H100", accelerators=1), Want(cpus=(4.0, False))],
        ),
    ],
)
def test_resources_are_read_as_skypilot_documents_them(tmp_path: Path, resources: str, wants: list[Want]):
    assert list(tasks.load(write(tmp_path, resources)).wants) == wants


def test_the_work_is_what_the_task_runs(tmp_path: Path):
    task = tasks.load(
        write(tmp_path, "accelerators: A100:8", GPT2 + " --train.steps=${STEPS:-1000} --batch.tokens_per_step=1048576")
    )
    assert task.work.stage == "pretrain"
    assert (task.work.config.train.steps, task.work.config.batch.tokens_per_step) == (1000, 1048576)
    prep = tasks.load(
        write(tmp_path, "cpus: 8+", "python -m data_prep.prepare data_prep/configs/fineweb-edu-10bt.yaml")
    )
    assert prep.work.stage == "prep"
    other = tasks.load(write(tmp_path, "cpus: 8+", "echo hello"))
    assert other.work.why_not == "its commands run no program of this project"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a list", "is no SkyPilot task"),
        ("name: [unclosed", "cannot be read as a task"),
        ("resources: {accelerators: 'A100:many'}\nrun: x", "must be NAME or NAME:COUNT"),
        ("resources: {cpus: several}\nrun: x", "resources.cpus is 'several'"),
    ],
)
def test_what_is_no_task_is_one_sentence(tmp_path: Path, content: str, message: str):
    path = tmp_path / "task.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        tasks.load(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("resources", "seconds"),
    [
        ("{cpus: 4, autostop: {idle_minutes: 2, down: true}}", 120.0),
        ("{cpus: 4, autostop: 3}", 180.0),
        ("{cpus: 4, job_recovery: {strategy: FAILOVER}}", 0.0),
        ("cpus: 4", None),
    ],
)
def test_idle_time_until_the_machine_goes_is_read_from_the_task(tmp_path: Path, resources: str, seconds: float | None):
    assert tasks.load(write(tmp_path, resources)).idle_seconds == seconds


def test_training_counts_for_a_task_that_prepares_as_well(tmp_path: Path):
    path = write(tmp_path, "accelerators: A100:8", f"python -m data_prep.prepare\n  {GPT2}")
    assert tasks.load(path).work.stage == "pretrain"


def test_an_absent_task_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such task file"):
        tasks.load("nowhere.yaml")


def test_a_build_of_images_is_work_as_well(tmp_path: Path):
    work = tasks.load(write(tmp_path, "cpus: 8+", "bash launch/node/container.sh build prep")).work
    assert (work.stage, work.config, work.why_not) == ("image", None, "")


@pytest.mark.parametrize(
    ("start", "width", "assumed"),
    [
        ("gpt2-large", 1280, ""),
        ("s3://b/runs/x", 768, "the model that it begins with is taken for GPT-2 124M"),
    ],
)
def test_what_is_tuned_is_the_model_that_its_start_names(tmp_path: Path, start: str, width: int, assumed: str):
    run = f"torchrun -m trainer.train --stage=finetune --start.weights={start} --batch.tokens_per_step=65536"
    work = tasks.load(write(tmp_path, "accelerators: A100:1", run)).work
    assert (work.stage, work.model.width, work.assumed) == ("finetune", width, assumed)


def test_what_is_distilled_is_the_student(tmp_path: Path):
    run = "torchrun -m trainer.train --stage=distil --teacher.weights=gpt2-xl --model.layers=6"
    work = tasks.load(write(tmp_path, "accelerators: A100:1", run)).work
    assert (work.stage, work.model.layers) == ("distil", 6)
    assert work.assumed == "what the teacher computes is not counted"
