"""What messages of training, models, launches and reports tell a user to do, done as printed and accepted."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from core import bucket, environment
from core.data import vocabulary
from core.errors import LauncherError
from core.run.cap import Bounds, spent_by_earlier_segments
from core.run.folder import RunFolder, open_run
from core.run.machine import Machine
from core.settings import loader
from core.settings.stages import training_schema, written_out
from core.settings.training import PretrainConfig
from core.settings.tuning import ExamplesConfig
from core.stores import credentials
from core.task import machine_choice, read_task
from costs import show
from launch.node import network
from tests import models, tuning
from trainer import export, import_weights, plots
from trainer.data.examples import read_conversations
from trainer.inference.chat import Chat
from trainer.stages.distil import Distil
from trainer.stages.finetune import Finetune
from trainer.stages.pretrain import Pretrain
from trainer.weights.open import open_weights

CPU = torch.device("cpu")


def refused(call, *given) -> str:
    with pytest.raises(LauncherError) as caught:
        call(*given)
    return str(caught.value)


def found(pattern: str, said: str) -> Sequence[str]:
    match = re.search(pattern, said)
    assert match, said
    return match.groups()


# --- variables, tasks, flags -------------------------------------------------------------------------------------


def root(**given: str) -> str:
    return bucket.root(given)


def run_name(**given: str) -> str:
    return bucket.url({"BUCKET": "b", **given}, "RUN")


def s3_keys(**given: str) -> object:
    return credentials.for_s3(given)


def google_key(**given: str) -> object:
    return credentials.for_google(given)


def price(**given: str) -> object:
    return environment.positive(given, "USD_PER_HOUR") or "empty"


def ranks(**given: str) -> object:
    return network.ranks_per_node(given)


# Program; variables that it refuses; a pattern of what it says; the variables that it names, None to leave one out.
VARIABLES = [
    (root, {}, r"give (BUCKET)=NAME to make", {"{0}": "my-bucket"}),
    (root, {"BUCKET": "s3:/b"}, r"(BUCKET) is .* did you mean (s3://b)\?", {"{0}": "{1}"}),
    (root, {"BUCKET": "s3://"}, r"(BUCKET) is .*; write (s3://BUCKET/FOLDER)", {"{0}": "{1}"}),
    (root, {"BUCKET": "memory://"}, r"names no bucket; give (BUCKET)=NAME", {"{0}": "b"}),
    (root, {"BUCKET": "b/../c"}, r"give (BUCKET)=NAME/FOLDER", {"{0}": "b/c"}),
    (run_name, {"RUN": "s3://b/runs/a"}, r"(RUN) is .*, must be the name of a folder in BUCKET/runs", {"{0}": "a"}),
    (s3_keys, {"AWS_ACCESS_KEY_ID": "k"}, r"(AWS_SECRET_ACCESS_KEY) is empty, .* set both or none", {"{0}": "s"}),
    (s3_keys, {"BUCKET_SECRET_ACCESS_KEY": "k"}, r"(BUCKET_ACCESS_KEY_ID) is empty, .* set both", {"{0}": "s"}),
    (google_key, {"BUCKET_GOOGLE_KEY": "/none"}, r"(BUCKET_GOOGLE_KEY): .* give its path or its (JSON)",
     {"{0}": '{"type": "service_account"}'}),
    (price, {"USD_PER_HOUR": "$12"}, r"(USD_PER_HOUR) is '\$12', must be a number above zero, or empty", {"{0}": "12"}),
    (price, {"USD_PER_HOUR": "0"}, r"(USD_PER_HOUR) is .* or empty", {"{0}": ""}),
    (ranks, {"RANKS_PER_NODE": "eight"}, r"(RANKS_PER_NODE) is 'eight', .* leave it empty", {"{0}": ""}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("program", "given", "said", "remedy"), VARIABLES, ids=[f"{row[0].__name__} {row[2]}" for row in VARIABLES]
)
def test_a_refused_variable_is_accepted_as_the_message_corrects_it(program, given, said: str, remedy, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(LauncherError) as caught:
        program(**given)
    groups = found(said, str(caught.value))
    fill = lambda text: re.sub(r"\{(\d)\}", lambda match: groups[int(match[1])], text)  # noqa: E731
    assert program(**given | {fill(name): fill(value) for name, value in remedy.items()})


def test_keys_of_another_server_are_renamed_as_the_message_says(tmp_path: Path):
    given = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_ENDPOINT_URL": "https://r2.example.com"}
    file = tmp_path / ".env"
    file.write_text("".join(f"{name}={value}\n" for name, value in given.items()))
    names = re.findall(r"(\w+) to (\w+)", refused(environment.with_dotenv, {}, file).partition("; rename ")[2])
    assert len(names) == 3
    renamed = {dict(names)[name]: value for name, value in given.items()}
    file.write_text("".join(f"{name}={value}\n" for name, value in renamed.items()))
    assert environment.with_dotenv({}, file) == renamed
    assert credentials.for_s3(renamed)


def test_machines_and_tasks_are_named_as_the_messages_say(monkeypatch):
    assert found(r"give (--gpus) NAME:COUNT or (--num-nodes) NUMBER", refused(machine_choice, ["--gpus"]))
    choice = machine_choice(["--gpus", "A100:2", "--num-nodes", "2"])
    assert (choice.gpus, choice.nodes) == ("A100:2", 2)
    [names] = found(r"no such task file; sky/ has (.*)$", refused(read_task, "sky/pretrain.yaml", {}))
    for name in names.split(", "):
        assert read_task(f"sky/{name}.yaml", {}).path.endswith(f"{name}.yaml")
    for text in found(r"must be a date \((\S+)\) or an age \((\w+), (\w+)\)", refused(show._since, "yesterday", 1e9)):
        assert show._since(text, 1e9) > 0


def test_flags_of_plots(tmp_path: Path):
    run = str(tmp_path)
    known = found(r"known ones: (\S+)=, (\S+)=, (\S+)=", refused(plots.parse, [run, "--size=3"]))
    for flag, value in {"--out": "x", "--format": "png", "--smooth": "0.5"}.items():
        assert flag in known
        assert plots.parse([run, f"{flag}={value}"])
    for kind in found(r"one or several of (\w+), (\w+)", refused(plots.parse, [run, "--format=jpg"])):
        assert plots.parse([run, f"--format={kind}"])
    assert "below 1" in refused(plots.parse, [run, "--smooth=1"])


# --- runs and models ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_url(tmp_path_factory, vocab_bpe) -> str:
    return models.prepare_data(tmp_path_factory.mktemp("some data"), vocab_bpe, items=2)


def test_a_run_is_continued_elsewhere_with_the_printed_command(data_url: str, tmp_path: Path):
    run_url = str(tmp_path / "a run")
    models.make_run(run_url, data_url)
    flags = [f"--model.{key}={value}" for key, value in loader.to_dict(models.SMALL).items()]
    loaded = [*flags, f"--run.url={run_url}", f"--data.url={data_url}"]
    settings = loader.load(PretrainConfig, loaded, {})
    open_run(RunFolder(run_url), loader.identity(settings), loader.to_dict(settings), "data")
    other = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, lr=0.5))
    opening = (loader.identity(other), loader.to_dict(other), "data")
    said = refused(open_run, RunFolder(run_url), *opening)
    [flags] = found(r"to go on from its newest step with other settings: (.*)$", said)
    branch = loader.load(PretrainConfig, [*loaded, *written_out(shlex.split(flags))], {})
    assert (branch.run.branch_from, branch.run.url) == (run_url, f"{run_url}-2")
    other = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, name="muon"))
    opening = (loader.identity(other), loader.to_dict(other), "data")
    said = refused(open_run, RunFolder(run_url), *opening)
    command, place = found(
        r"with other settings: (python -m trainer\.import_weights .*), then train with run\.url=(.*)$", said
    )
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "trainer.import_weights", run_url]
    config = tmp_path / "config.yaml"
    config.write_text(loader.to_yaml(other))
    import_weights.main([str(config) if word == "CONFIG.yaml" else word for word in words[3:]])
    assert open_run(RunFolder(place), *opening)
    assert "use the settings it was started with" in said
    assert not open_run(RunFolder(run_url), loader.identity(settings), loader.to_dict(settings), "data")


def test_a_cap_needs_a_price_or_is_removed(tmp_path: Path):
    folder = RunFolder(str(tmp_path))
    [name] = found(
        r"set (USD_PER_HOUR) to .*, or remove the cap",
        refused(spent_by_earlier_segments, folder, Machine(), Bounds(5.0)),
    )
    usd = environment.positive({name: "2"}, name)
    assert spent_by_earlier_segments(folder, Machine(usd_per_hour=usd), Bounds(5.0)).usd == 0
    assert spent_by_earlier_segments(folder, Machine(), Bounds()).usd == 0


def pretrain(data_url: str, ranks, *flags: str):
    given = [*tuning.MODEL, *tuning.BATCH, "--run.url=/none", f"--data.url={data_url}", *flags]
    stage = Pretrain(loader.load(PretrainConfig, given, {}), ranks)
    stage.batches(0).close()
    return stage


def test_a_model_that_does_not_fit_its_data(data_url: str, ranks):
    said = refused(pretrain, data_url, ranks, "--model.padded_vocab_size=1000")
    key, value = found(r"(model\.padded_vocab_size) is 1000, .*; set it to (\d+)$", said)
    assert pretrain(data_url, ranks, f"--{key}={value}")
    long = ("--model.context=65536", "--batch.tokens_per_step=131072", "--batch.micro_batch_size=1")
    [key] = found(
        r"fewer than one window of 65536 \+ 1; prepare more data, or lower (model\.context)",
        refused(pretrain, data_url, ranks, *long),
    )
    assert pretrain(data_url, ranks, *long, f"--{key}=1024")


def stage_of(kind: type, ranks, flags: Sequence[str]):
    return kind(loader.load(training_schema(flags), flags, {}), ranks)


def test_tuning_within_the_context_of_its_start(pretrained, ranks, tmp_path: Path):
    rows = tuning.write_rows(tmp_path / "rows.jsonl", tuning.conversations(8))
    places = (f"--start.weights={pretrained[1]}", f"--data.examples={rows}", f"--run.url={tmp_path / 'run'}")
    flags = ["--stage=finetune", *tuning.BATCH, *places, "--data.length=128"]
    key, limit, none = found(
        r"(data\.length) is 128, .* a context of (\d+) tokens; set data\.length to at most that, or (0)$",
        refused(stage_of, Finetune, ranks, flags),
    )
    assert stage_of(Finetune, ranks, [*flags, f"--{key}={limit}"]).context == int(limit)
    assert stage_of(Finetune, ranks, [*flags, f"--{key}={none}"]).context == int(limit)


def test_a_student_within_the_context_of_its_teacher(pretrained, ranks, tmp_path: Path):
    places = [f"--data.url={pretrained[0]}", f"--teacher.weights={pretrained[1]}", f"--run.url={tmp_path / 'run'}"]
    flags = ["--stage=distil", *tuning.MODEL, *tuning.BATCH, *places, "--model.context=128"]
    limit, key = found(
        r"a context of (\d+) tokens, .* set (model\.context) to at most that", refused(stage_of, Distil, ranks, flags)
    )
    flags.append(f"--{key}={limit}")
    assert stage_of(Distil, ranks, flags)
    start = [*flags, f"--start.weights={pretrained[1]}", "--model.layers=1"]
    name, value, empty = found(
        r"has (model\.layers) = (\d), this config has 1; give the model settings of the start, "
        r"or leave (start\.weights) empty",
        refused(stage_of, Distil, ranks, start),
    )
    assert stage_of(Distil, ranks, [*start, f"--{name}={value}"])
    assert stage_of(Distil, ranks, [*start, f"--{empty}="])


def test_examples_that_cannot_be_used(tmp_path: Path, vocab_bpe):
    encoding = vocabulary.read(str(vocab_bpe)).encoding()

    def read(count: int, rows: list, **settings):
        place = tuning.write_rows(tmp_path / f"{count}.jsonl", rows)
        return read_conversations(ExamplesConfig(examples=place, **settings), encoding, 64)

    bad = [*tuning.conversations(8), {"text": "x"}]
    [key] = found(r"or raise data\.(max_bad_fraction) to skip them$", refused(read, 1, bad))
    assert len(read(1, bad, **{key: 0.5, "val_fraction": 0.0}).train) == 8
    few = tuning.conversations(3)
    [key] = found(r"or lower data\.(val_fraction)$", refused(lambda: read(2, few, val_fraction=0.999)))
    assert len(read(2, few, **{key: 0.0}).train) == 3


def test_a_checkpoint_is_named_as_the_message_lists_it(pretrained):
    run_url = pretrained[1]
    said = refused(open_weights, f"{run_url}/checkpoints/step-00000007", CPU)
    [names] = found(r"has no step-00000007; complete ones: (.*)$", said)
    for name in names.split(", "):
        assert open_weights(f"{run_url}/checkpoints/{name}", CPU).step == int(name.removeprefix("step-"))


def test_imports_and_exports(data_url: str, tmp_path: Path, vocab_bpe, monkeypatch):
    monkeypatch.setenv("VOCAB_URL", str(vocab_bpe))
    run_url, first, second = (str(tmp_path / name) for name in ("run", "first", "second"))
    models.make_run(run_url, data_url, dataclasses.replace(models.SMALL, mlp="relu2"))
    data = f"--data.url={data_url}"
    [key] = found(
        r"(model\.layers) is 3, .* have 2; leave it out",
        refused(import_weights.main, [run_url, first, data, "--model.layers=3"]),
    )
    import_weights.main([flag for flag in [run_url, first, data, "--model.layers=3"] if key not in flag])
    [again] = found(
        r"holds objects already; give the import a new (run\.url)$",
        refused(import_weights.main, [run_url, first, data]),
    )
    import_weights.main([run_url, second, data])
    assert again == "run.url"
    [flag] = found(
        r"export with (--format=huggingface)$",
        refused(export.main, [run_url, str(tmp_path / "a.gguf"), "--format=gguf"]),
    )
    export.main([run_url, str(tmp_path / "exported"), flag])
    assert "name a new folder" in refused(export.main, [run_url, str(tmp_path / "exported")])
    export.main([run_url, str(tmp_path / "new")])


class Notes:
    """A terminal that keeps the errors it is given."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def error(self, text: str) -> None:
        self.errors.append(text)

    def note(self, text: str) -> None: ...

    def table(self, head: list[str], rows: list) -> None: ...


@pytest.mark.parametrize(
    ("line", "said", "remedy"),
    [
        ("/halp", r"did you mean (/help)\?", "{0}"),
        ("/xyzzy", r"try (/help)$", "{0}"),
        ("/set top_k", r"write (/set top_k) VALUE$", "{0} 5"),
        ("/set topk 5", r"did you mean (top_k)\?", "/set {0} 5"),
        ("/set temperature -1", r"temperature: is -1\.0, must be at least (0)", "/set temperature {0}"),
    ],
)
def test_commands_of_the_chat(line: str, said: str, remedy: str):
    from core.settings.inference import InferenceOptions, Sampling

    notes = Notes()
    model = type("Model", (), {"tuned": True, "name": "m"})()
    chat = Chat(model, Sampling(), InferenceOptions(), notes)
    assert chat.handle(line)
    [error] = notes.errors
    chat.handle(remedy.format(*found(said, error)))
    assert notes.errors == [error]
