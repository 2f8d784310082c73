"""What a forecast reads in a task file: resources, idle time, the program with its settings and its model."""

import json
import shlex
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.task import MachineChoice, MachineRequest, TaskSpec, machine_choice, read_task, urls, with_more
from tests.sky_tasks import GPT2, write


def load(path: str, **environment: str) -> TaskSpec:
    return read_task(path, environment)


@pytest.mark.parametrize(
    ("resources", "requests"),
    [
        ("accelerators: A100:8", [MachineRequest(accelerator="A100", accelerators=8)]),
        ("accelerators: {H100: 8}", [MachineRequest(accelerator="H100", accelerators=8)]),
        (
            "accelerators: [A100:8, H100:8]",
            [MachineRequest(accelerator=g, accelerators=8) for g in ("A100", "H100")],
        ),
        ("infra: aws/us-east-1", [MachineRequest(cloud="aws", region="us-east-1")]),
        ("infra: aws/*/us-east-1a", [MachineRequest(cloud="aws", zone="us-east-1a")]),
        ("{cloud: Lambda, instance_type: gpu_8x_a100}", [MachineRequest(cloud="lambda", instance_type="gpu_8x_a100")]),
        ("{cpus: 8+, memory: 32}", [MachineRequest(cpus=(8.0, True), memory_gb=(32.0, False))]),
        ("{use_spot: true, max_hourly_cost: 12}", [MachineRequest(spot=True, max_usd_per_hour=12)]),
        (
            "accelerators: A100:8\nany_of: [{cloud: aws, use_spot: true}, {cloud: lambda}]",
            [
                MachineRequest(cloud="aws", accelerator="A100", accelerators=8, spot=True),
                MachineRequest(cloud="lambda", accelerator="A100", accelerators=8),
            ],
        ),
        (
            "ordered: [{accelerators: H100}, {cpus: 4}]",
            [MachineRequest(accelerator="H100", accelerators=1), MachineRequest(cpus=(4.0, False))],
        ),
    ],
)
def test_resources_are_read_as_skypilot_documents_them(tmp_path: Path, resources: str, requests: list[MachineRequest]):
    assert list(load(write(tmp_path, resources)).requests) == requests


def test_the_work_is_what_the_task_runs(tmp_path: Path):
    task = load(
        write(tmp_path, "accelerators: A100:8", GPT2 + " --train.steps=${STEPS:-1000} --batch.tokens_per_step=1048576")
    )
    assert task.workload.stage == "pretrain"
    assert (task.workload.config.train.steps, task.workload.config.batch.tokens_per_step) == (1000, 1048576)
    prep = load(write(tmp_path, "cpus: 8+", "python -m data_prep.prepare data_prep/configs/fineweb-edu-10bt.yaml"))
    assert prep.workload.stage == "prep"
    other = load(write(tmp_path, "cpus: 8+", "echo hello"))
    assert other.workload.problem == "its commands run no program of this project"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a list", "is not a SkyPilot task"),
        ("name: [unclosed", "cannot be read as a task"),
        ("resources: {accelerators: 'A100:many'}\nrun: x", "must be NAME or NAME:COUNT"),
        ("resources: {cpus: several}\nrun: x", "resources.cpus is 'several'"),
    ],
)
def test_what_is_no_task_is_one_sentence(tmp_path: Path, content: str, message: str):
    path = tmp_path / "task.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(str(path))
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
    assert load(write(tmp_path, resources)).idle_seconds == seconds


def test_training_counts_for_a_task_that_prepares_as_well(tmp_path: Path):
    path = write(tmp_path, "accelerators: A100:8", f"python -m data_prep.prepare\n  {GPT2}")
    assert load(path).workload.stage == "pretrain"


def test_an_absent_task_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such task file"):
        load("nowhere.yaml")


def test_a_build_of_images_is_work_as_well(tmp_path: Path):
    work = load(write(tmp_path, "cpus: 8+", "bash launch/node/container.sh build prep")).workload
    assert (work.stage, work.config, work.problem) == ("image", None, "")


@pytest.mark.parametrize(
    ("start", "width", "assumed"),
    [
        ("gpt2-large", 1280, ""),
        ("s3://b/runs/x", 768, "the model to start from is GPT-2 124M"),
    ],
)
def test_what_is_tuned_is_the_model_that_its_start_names(tmp_path: Path, start: str, width: int, assumed: str):
    run = f"torchrun -m trainer.train --stage=finetune --start.weights={start} --batch.tokens_per_step=65536"
    work = load(write(tmp_path, "accelerators: A100:1", run)).workload
    assert (work.stage, work.model.width, work.assumed) == ("finetune", width, assumed)


def test_what_is_distilled_is_the_student(tmp_path: Path):
    run = "torchrun -m trainer.train --stage=distil --teacher.weights=gpt2-xl --model.layers=6"
    work = load(write(tmp_path, "accelerators: A100:1", run)).workload
    assert (work.stage, work.model.layers) == ("distil", 6)
    assert (work.teacher.layers, work.assumed) == (48, "")
    unknown = load(write(tmp_path, "accelerators: A100:1", run.replace("gpt2-xl", "s3://b/runs/x"))).workload
    assert (unknown.teacher, unknown.assumed) == (None, "the teacher's computation is not counted")


def test_a_variable_holds_values_with_blanks_and_commas(tmp_path: Path):
    run = 'python -m launch.node -m trainer.train "$CONFIG" --more="$TRAIN_ARGS"'
    envs = "{CONFIG: trainer/configs/debug.yaml, TRAIN_ARGS: '', BUCKET: null}"
    path = write(tmp_path, "cpus: 4+", run).strip()
    file = Path(path)
    file.write_text(file.read_text().replace("envs: {RUN_URL: '', DATA_URL: ''}", f"envs: {envs}"))
    said = ["Hello, I'm a language model,", "Once upon a time"]
    given = f"--train.steps=20 --train.sample_prompts={shlex.quote(json.dumps(said))}"
    settings = load(path, TRAIN_ARGS=given).workload.config
    assert settings.train.sample_prompts == tuple(said)
    assert settings.train.steps == 20
    assert load(path).workload.problem == ""
    assert "cannot be split into words (no closing quotation)" in load(path, TRAIN_ARGS="--a='b").workload.problem


@pytest.mark.parametrize(
    ("config", "given", "cap", "derived"),
    [
        ("gpt2-124m", {}, "60", {}),
        ("llama-416m", {}, "220", {"MAX_USD": "220"}),
        ("llama-416m", {"MAX_USD": "20"}, "20", {}),
        ("gpt2-124m", {"TRAIN_ARGS": "--run.usual_max_usd=70.5"}, "70.5", {"MAX_USD": "70.5"}),
    ],
)
def test_the_cap_of_a_launch_fits_its_config(config: str, given: dict[str, str], cap: str, derived: dict[str, str]):
    task = load("sky/pretrain-8xa100.yaml", CONFIG=f"trainer/configs/{config}.yaml", **given)
    assert (task.envs["MAX_USD"], task.derived) == (cap, derived)


def test_the_words_of_a_variable_take_its_place():
    assert with_more(["a b", "--more=--x=1 '--y=2 3'", "--more=", "c"]) == ["a b", "--x=1", "--y=2 3", "c"]


@pytest.mark.parametrize("options", ["--gpus H100:4 --num-nodes 2", "--yes --num-nodes=2 --gpus=H100:4 --env A=b"])
def test_options_of_a_launch_choose_other_machines(tmp_path: Path, options: str):
    path = write(tmp_path, "max_hourly_cost: 9\nany_of: [{cloud: aws, accelerators: A100:8}, {cloud: aws}]")
    task = read_task(path, {}, machine_choice(options.split()))
    assert task.nodes == 2
    assert task.requests == (MachineRequest(cloud="aws", accelerator="H100", accelerators=4, max_usd_per_hour=9),), (
        "equal requests are one"
    )
    assert read_task(path, {}, MachineChoice()) == read_task(path, {})


@pytest.mark.parametrize(
    ("options", "said"),
    [("--num-nodes two", "--num-nodes is 'two', must be a whole number above 0"), ("--gpus", "expected one argument")],
)
def test_a_choice_that_cannot_be_read_is_one_sentence(options: str, said: str):
    with pytest.raises(ConfigError, match=said):
        machine_choice(options.split())


def test_variables_of_the_task_reach_its_program_and_empty_is_absent(tmp_path: Path):
    run = 'python -m trainer.train "$CONFIG" --train.device=$DEVICE $TRAIN_ARGS'
    envs = "{CONFIG: trainer/configs/debug.yaml, DEVICE: cpu, TRAIN_ARGS: '', BUCKET: null}"
    path = write(tmp_path, "cpus: 4", run)
    text = Path(path).read_text().replace("{RUN_URL: '', DATA_URL: ''}", envs)
    Path(path).write_text(text)
    given = {"CONFIG": "", "TRAIN_ARGS": "--train.steps=20 --optimizer.muon_ns_steps=4", "UNRELATED": "x"}
    task = load(path, **given)
    assert (task.workload.config.train.steps, task.workload.config.train.device) == (20, "cpu")
    expected = {
        "CONFIG": "trainer/configs/debug.yaml",
        "DEVICE": "cpu",
        "TRAIN_ARGS": given["TRAIN_ARGS"],
        "BUCKET": "",
    }
    assert task.envs == expected
    assert (task.required, task.managed) == (("BUCKET",), False)
    assert "no such" in load(path, CONFIG="debug").workload.problem
    assert "train.stepz" in load(path, TRAIN_ARGS="--train.stepz").workload.problem


def test_urls_are_made_in_one_place():
    given = {"BUCKET": "gs://b/team", "RUN": "a", "DATA": "d"}
    assert urls(given) == {"RUN_URL": "gs://b/team/runs/a", "DATA_URL": "gs://b/team/data/d"}
    assert urls({**given, "DATA_URL": "/elsewhere"})["DATA_URL"] == "/elsewhere"
    assert urls({}) == {"RUN_URL": "s3://forecast/run", "DATA_URL": "s3://forecast/data"}


def test_settings_of_an_evaluation_that_the_node_would_refuse_are_a_problem(tmp_path: Path):
    run = "python -m trainer.evaluate s3://b/runs/x --device=cpu "
    assert (
        load(write(tmp_path, "accelerators: A10:1", f"{run} --tasks=perplexity --per_document")).workload.problem == ""
    )
    workload = load(write(tmp_path, "accelerators: A10:1", f"{run} --tasks=perplexit")).workload
    assert workload.stage == "evaluate"
    assert "'perplexit' is not a task" in workload.problem
