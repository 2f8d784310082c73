"""core.settings.loader: three layers, typed values, errors that say where."""

import dataclasses
import importlib
import itertools
import re
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.settings import evaluation, loader
from core.settings.evaluation import EvaluateConfig
from core.settings.preparation import (
    FetchConfig,
    FetchSourceConfig,
    PrepConfig,
    PrepDataConfig,
    ShardsConfig,
    SourceConfig,
)
from core.settings.renamed import REMOVED, RENAMED
from core.settings.stages import training_schema
from core.settings.training import PretrainConfig
from core.settings.tuning import DistilConfig, DpoConfig, FinetuneConfig
from trainer.generate import GenerateConfig

REPOSITORY = Path(__file__).parent.parent
URLS = ["--run.url=/r", "--data.url=/d"]


def load(*arguments: str, **environment: str) -> PretrainConfig:
    return loader.load(PretrainConfig, [*URLS, *arguments], environment)


def write(folder: Path, text: str) -> str:
    (folder / "c.yaml").write_text(text)
    return str(folder / "c.yaml")


def test_layers_and_types(tmp_path: Path):
    file = write(
        tmp_path, "optimizer:\n  lr: 6e-4\ntrain:\n  steps: 1_000\n  compile: no\n  sample_prompts: [a, 'b, c']\n"
    )
    loaded = load(file, "--train.steps=2e3")
    assert loaded.optimizer.lr == 6e-4
    assert loaded.train.steps == 2000
    assert loaded.train.compile is False
    assert loaded.train.sample_prompts == ("a", "b, c")
    assert load("--train.compile").train.compile is True
    assert load("--train.sample_prompts=x,y").train.sample_prompts == ("x", "y")


def test_environment_overrides_the_file_and_a_flag_both(tmp_path: Path):
    file = write(tmp_path, "run:\n  url: /from-file\ndata:\n  url: /d\n")
    assert loader.load(PretrainConfig, [file], {}).run.url == "/from-file"
    assert loader.load(PretrainConfig, [file], {"RUN_URL": "/from-env"}).run.url == "/from-env"
    assert loader.load(PretrainConfig, [file, "--run.url=/flag"], {"RUN_URL": "/from-env"}).run.url == "/flag"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optimizer:\n  lr: 1e-3\n  warmup: 5\n",
            r"c\.yaml:3: unknown setting optimizer\.warmup; did you mean optimizer\.warmup_steps\?",
        ),
        ("steps: 5\n", r"c\.yaml:1: unknown setting steps; did you mean train\.steps\?"),
        ("train:\n  steps: many\n", r"c\.yaml:2: train\.steps is 'many', must be a whole number"),
        ("train:\n  steps: 1.5\n", r"c\.yaml:2: train\.steps is '1\.5', must be a whole number"),
        ("train:\n  compile: 3\n", r"c\.yaml:2: train\.compile is '3', must be true or false"),
        ("train:\n  device: gpu\n", r"c\.yaml:2: train\.device is 'gpu', must be one of auto, cpu, cuda"),
        ("train: 5\n", r"c\.yaml:1: train must be a mapping"),
        ("train:\n  seed: 1\n  seed: 2\n", r"c\.yaml:3: train\.seed is set twice; the first is at .*c\.yaml:2"),
        ("model:\n\n  heads: 7\n", r"c\.yaml:3: model\.heads: is 7, must divide the width 768"),
        ("checkpoint:\n  keep_last: 1\n", r"c\.yaml:2: checkpoint\.keep_last: is 1, must be at least 2"),
        ("a: [b\n", r"c\.yaml: not valid YAML"),
    ],
)
def test_errors_name_file_line_and_remedy(tmp_path: Path, text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, text))


def test_errors_of_flags(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"flag --train\.step=3: unknown setting train\.step; did you mean train\.steps\?"
    ):
        load("--train.step=3")
    with pytest.raises(ConfigError, match=r"flag --train\.steps: no value; write --train\.steps=VALUE"):
        load("--train.steps")
    with pytest.raises(ConfigError, match=r"flag --train=1: train is a section"):
        load("--train=1")
    with pytest.raises(ConfigError, match=r"/no/such\.yaml: no such config file"):
        load("/no/such.yaml")
    with pytest.raises(ConfigError, match="more than one config file"):
        load(write(tmp_path, ""), write(tmp_path, ""))
    with pytest.raises(
        ConfigError,
        match=r"batch\.tokens_per_step: is 1000, must be a multiple of .* = 32 x 1024 = 32768; the nearest is 32768",
    ):
        load("--batch.tokens_per_step=1000")
    with pytest.raises(ConfigError, match=r"url: is empty; set it with --run\.url"):
        loader.load(PretrainConfig, [], {})


def test_round_trip_and_identity():
    loaded = load("--train.steps=2000", "--train.log_every=3")
    assert loader.from_dict(PretrainConfig, loader.to_dict(loaded), "stored") == loaded
    identity = loader.identity(loaded)
    assert identity["train.steps"] == 2000
    assert "train.log_every" not in identity
    assert "run.url" not in identity
    with pytest.raises(ConfigError, match=r"stored: unknown setting train\.nonsense"):
        loader.from_dict(PretrainConfig, {"train": {"nonsense": 1}}, "stored")


def test_a_number_of_tokens_gives_the_number_of_steps(tmp_path: Path):
    file = write(tmp_path, "train: {steps: 7}\nbatch: {tokens_per_step: 65536}\noptimizer: {warmup_steps: 0}\n")
    assert load(file).train.steps == 7
    found = load(file, "--train.tokens=1e6").train
    assert (found.steps, found.tokens) == (15, 0.0)  # 15.26 steps
    assert load(file, "--train.tokens=1").train.steps == 1
    # The run is the same as with that number of steps.
    assert loader.identity(load(file, "--train.tokens=1e6")) == loader.identity(load(file, "--train.steps=15"))
    assert load(file, "--train.epochs=0.5").train.epochs == 0.5
    # A flag replaces another length of the file, but a zero does not.
    longer = write(tmp_path, "train: {epochs: 2}\n")
    assert load(longer, "--train.steps=1000").train.epochs == 0
    assert load(longer, "--train.tokens=1e9").train.epochs == 0
    assert load(longer, "--train.steps=1000", "--train.epochs=0").train.steps == 1000


@pytest.mark.parametrize("flags", [*itertools.combinations(("steps", "tokens", "epochs"), 2)])
def test_a_run_has_one_length(flags: tuple[str, str]):
    said = " and ".join(f"flag --train.{name}" for name in flags)
    both = " and ".join(f"train.{name}" for name in flags)
    with pytest.raises(ConfigError, match=f"{said}: {both} are both set; give one of them"):
        load(*(f"--train.{name}=1000" for name in flags))


def test_help_names_every_setting():
    text = loader.help_text(PretrainConfig, "usage")
    for key in loader.flatten(loader.to_dict(load())):
        assert f"--{key}=" in text


@pytest.mark.parametrize(
    "file", sorted((REPOSITORY / "trainer" / "configs").glob("*.yaml")), ids=lambda file: file.name
)
def test_shipped_training_configs_load(file: Path):
    loaded = load(str(file))
    assert loaded.batch.tokens_per_step % (loaded.batch.micro_batch_size * loaded.model.context) == 0


def test_an_old_name_of_a_setting_is_answered_with_the_new_one(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"flag --batch\.tokens=512: batch\.tokens is an old name; write batch\.tokens_"
    ):
        load("--batch.tokens=512")
    with pytest.raises(ConfigError, match=r"c\.yaml:2: optimizer\.deal_sums is an old name; write optimizer\.zero=2"):
        load(write(tmp_path, "optimizer:\n  deal_sums: true\n"))
    with pytest.raises(ConfigError, match=r"finetune\.start is an old name; write start\.weights with stage=finetune"):
        load("--finetune.start=gpt2")
    with pytest.raises(ConfigError, match=r"train\.compile_cache is gone; remove it: each machine compiles"):
        load("--train.compile_cache=true")


def test_the_config_names_the_stage_and_a_flag_overrides_it(tmp_path: Path):
    assert training_schema([]) is PretrainConfig
    file = write(tmp_path, "# a comment\nstage: dpo\n")
    assert training_schema([file]) is DpoConfig
    assert training_schema([file, "--stage=distil"]) is DistilConfig
    loaded = loader.load(DpoConfig, [file, "--run.url=/r", "--start.weights=gpt2"], {})
    assert (loaded.stage, loader.identity(loaded)["stage"]) == ("dpo", "dpo")
    with pytest.raises(ConfigError, match=r"c\.yaml:1: stage is 'tune', must be one of pretrain, finetune, dpo"):
        training_schema([write(tmp_path, "stage: tune\n")])
    with pytest.raises(
        ConfigError, match=r"start\.weights=gpt2: is not a setting of pretraining; add --stage=finetune"
    ):
        training_schema(["--start.weights=gpt2"])
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such config file"):
        training_schema(["nowhere.yaml"])


def test_every_new_name_is_a_setting():
    schemas = (PretrainConfig, FinetuneConfig, DpoConfig, DistilConfig, EvaluateConfig, GenerateConfig)
    keys = [{key for key, _ in loader._walk(schema)} for schema in schemas]
    new_keys = {old: re.split("[= ]", new)[0] for old, new in RENAMED.items()}
    assert {*new_keys.values()} <= set().union(*keys)
    for known in keys:  # an old name of one schema may be a setting of another
        assert not {old for old, new in new_keys.items() if new in known} & known
        assert not {*REMOVED} & known


def test_the_launching_side_parses_a_command_line_of_evaluation():
    models, settings = evaluation.parse(["hf:a/b", "--tasks=perplexity", "s3://b/runs/x"], {"RUN_URL": "s3://b/runs/y"})
    assert (models, settings.tasks) == (["hf:a/b", "s3://b/runs/x"], ("perplexity",))
    assert evaluation.parse([], {"RUN_URL": "s3://b/runs/y"})[0] == ["s3://b/runs/y"]
    with pytest.raises(ConfigError, match=r"no model given; python -m trainer\.evaluate"):
        evaluation.parse(["--tasks=perplexity"], {})
    with pytest.raises(ConfigError, match="items is an old name; write limit"):
        evaluation.parse(["run", "--items=5"], {})


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_line_ends_are_no_part_of_a_value(end: str):
    """As a file with Windows line ends gives them."""
    environment = {"RUN_URL": f"s3://b/run{end}", "DATA_URL": f"data{end}", "MAX_USD": f"20{end}"}
    flags = [f"--train.device=cpu{end}", f"--train.trackers=tensorboard,wandb{end}", f"--train.compile=false{end}"]
    config = loader.load(PretrainConfig, flags, environment)
    assert (config.run.url, config.data.url, config.run.max_usd) == ("s3://b/run", "data", 20.0)
    assert (config.train.device, config.train.compile) == ("cpu", False)
    assert config.train.trackers == ("tensorboard", "wandb")


def test_lists_may_be_json(tmp_path):
    def prompts(text: str) -> tuple[str, ...]:
        flags = [f"--train.sample_prompts={text}", "--run.url=r", "--data.url=d"]
        return loader.load(PretrainConfig, flags, {}).train.sample_prompts

    assert prompts('["Once upon a time, there was", " b "]') == ("Once upon a time, there was", " b ")
    assert prompts("one, two") == ("one", "two")
    assert prompts("[]") == ()
    with pytest.raises(
        ConfigError, match=r"flag --train.sample_prompts: .* which is not a JSON list .*; write \[\"one"
    ):
        prompts('["open')
    with pytest.raises(ConfigError, match="must be text"):
        prompts("[1]")
    flags = ["--train.skip_steps=[3, 5]", '--train.trackers=["wandb"]', "--run.url=r", "--data.url=d"]
    config = loader.load(PretrainConfig, flags, {})
    assert (config.train.skip_steps, config.train.trackers) == ((3, 5), ("wandb",))


NEEDED = {
    PrepConfig: {"source": SourceConfig(url="/source"), "data": PrepDataConfig(url="/set")},
    FetchConfig: {"source": FetchSourceConfig(train_url="/source"), "data": ShardsConfig(url="/set")},
}


def schemas() -> list[type]:
    """Every dataclass of core.settings that declares bounds."""
    found = {}
    for file in sorted((REPOSITORY / "core/settings").glob("[a-z]*.py")):
        module = importlib.import_module(f"core.settings.{file.stem}")
        for each in vars(module).values():
            is_own = dataclasses.is_dataclass(each) and each.__module__ == module.__name__
            if is_own and any(bounds_of(field) for field in dataclasses.fields(each)):
                found[each.__qualname__] = each
    return list(found.values())


def bounds_of(field: dataclasses.Field) -> dict[str, float]:
    return {name: bound for name, bound in (field.metadata.get("bounds") or {}).items() if bound is not None}


@pytest.mark.parametrize("schema", schemas(), ids=lambda schema: schema.__name__)
def test_every_bound_holds(schema: type):
    """Also in a schema with checks of its own, which may forget those of its base."""
    for field in dataclasses.fields(schema):
        for name, bound in bounds_of(field).items():
            outside = bound + {"ge": -1, "gt": 0, "le": 1, "lt": 0}[name]
            with pytest.raises(loader.SettingError, match=field.name):
                schema(**NEEDED.get(schema, {}), **{field.name: outside})


def test_a_log_shows_the_settings_that_differ_from_their_defaults():
    flags = ["trainer/configs/debug.yaml", "--data.url=d", "--run.url=r", "--train.profile=3,4", "--train.steps=17"]
    text = loader.describe(loader.load(PretrainConfig, flags, {}), "all: r/run.json")
    assert text.startswith("settings that differ from the defaults (all: r/run.json):\n")
    lines = dict(line.strip().split(": ", 1) for line in text.splitlines()[1:])
    assert lines["run"] == "url=r"
    assert "steps=17" in lines["train"].split(", ")
    assert "profile=3,4" in lines["train"].split(", ")
    assert "device" not in lines["train"]
