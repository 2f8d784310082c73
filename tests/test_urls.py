"""core.urls: every entry refuses a misspelt URL with the right spelling, before it writes anything."""

import os
import sys
from pathlib import Path

import pytest

from core import storage, urls
from core.errors import ConfigError, StorageError
from core.settings import loader
from core.settings.evaluation import EvaluateConfig
from core.settings.preparation import FetchConfig, PrepConfig
from core.settings.training import PretrainConfig
from core.settings.tuning import DistilConfig, DpoConfig, FinetuneConfig, SynthesisConfig
from costs import discover
from launch import runs
from launch.node import place as place_on_node
from tests import warm
from tests.patience import PATIENCE_SECONDS
from tests.rare import fast_only
from trainer.chat import ChatConfig
from trainer.generate import GenerateConfig
from trainer.weights import folder as public

ROOT = Path(__file__).parent.parent
MEANT = {
    "s3:/b/x": "s3://b/x",
    "s3:b/x": "s3://b/x",
    "S3:/b/x": "s3://b/x",
    "s3//b/x": "s3://b/x",
    "s3:///b/x": "s3://b/x",
    "s3:://b/x": "s3://b/x",
    "gs:/b/*.bin": "gs://b/*.bin",
    "hf:/datasets/a/b": "hf://datasets/a/b",
    "az:/account/container/x": "az://account/container/x",
    "S3://b/x": "s3://b/x",
    "Hf://datasets/a/b": "hf://datasets/a/b",
    "file:/a/b": "file:///a/b",
    "FILE:///a/b": "file:///a/b",
    "memory:/x": "memory:///x",
    '"s3://b/x"': "s3://b/x",
    " s3:/b/x": "s3://b/x",
}
UNKNOWN = ("http:/x/y", "https://x/y", "ftp://host/file", "s3a://b/x", "r2:/b")
FINE = (
    *("s3://b/x", "gs://b", "hf://datasets/a/b@main/*.parquet", "memory://x", "file:///a", "file://a", "s3://b//x"),
    *("./s3:/b/x", "/s3:/b/x", "~/s3:/b", "../s3:b", "runs/a:b", "run:1", "s3", "gs/x", "2026-11-29T10:00", "data", ""),
)


@pytest.mark.parametrize("place", MEANT)
def test_what_looks_like_a_url_is_refused_with_the_right_spelling(place: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (
        storage.read_bytes,
        storage.list_objects,
        storage.list_names,
        storage.expand_objects,
        lambda uri: storage.write_bytes(uri, b"x"),
        lambda uri: storage.write_file(uri, __file__),
    ):
        with pytest.raises(StorageError) as caught:
            call(place)
        assert str(caught.value).startswith(f"{place}: ")
        assert f"did you mean {MEANT[place]}?" in str(caught.value)
    assert not list(tmp_path.iterdir())
    assert urls.mistake(MEANT[place]) is None


@pytest.mark.parametrize("place", UNKNOWN)
def test_a_store_that_there_is_not_is_refused(place: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=f"{place}: has the unknown storage scheme '{place.partition(':')[0]}'"):
        storage.write_bytes(place, b"x")


@pytest.mark.parametrize("place", ["s3://", "S3:", "gs:/", "hf://"])
def test_a_url_without_a_bucket_is_refused(place: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=r"names no bucket; write \w+://BUCKET/FOLDER"):
        storage.list_objects(place)


@pytest.mark.parametrize("place", ["az://", "az:/account", "az://account/"])
def test_an_account_without_a_container_is_refused(place: str):
    with pytest.raises(StorageError, match="names no container; write az://ACCOUNT/CONTAINER/FOLDER"):
        storage.list_objects(place)


@pytest.mark.parametrize("place", FINE)
def test_urls_and_local_paths_are_taken_as_they_are(place: str):
    assert urls.mistake(place) is None
    assert storage.is_local(place) is not place.startswith(("s3://", "gs://", "hf://", "memory://"))


def test_a_local_path_may_have_the_name_of_a_url(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place in ("./s3:/b/x", f"{tmp_path}/gs:/b/x", "./s3:x", "run:1/x"):
        storage.write_bytes(place, b"x")
        assert storage.read_bytes(place) == b"x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gs:", "run:1", "s3:", "s3:x"]


def test_names_of_models():
    for fine in (
        "gpt2",
        "hf:gpt2",
        "hf:a/b",
        "hf:a/b@refs/pr/1",
        "transformers:/models/x",
        "s3://b/runs/a",
        "./hf:a/b",
    ):
        assert urls.mistake_in_model(fine) is None
    for name, meant in (("HF:a/b", "hf:a/b"), ("hf:/a/b", "hf:a/b"), ("hf://a/b", "hf:a/b"), ("s3:/b", "s3://b")):
        assert f"did you mean {meant}?" in urls.mistake_in_model(name)
    with pytest.raises(ConfigError, match=r"HF:a/b: not of the form hf:OWNER/NAME\[@REVISION\]"):
        public.resolve("HF:a/b")
    with pytest.raises(ConfigError, match="HF:a/b is not of the form hf:OWNER/NAME"):
        public.check_publishable("HF:a/b")


# Every setting that is a place, with what else its schema requires.
TUNED = ("--run.url=/r", "--data.url=/d")
MAKE = ("--endpoint.model=m", "--run.url=/r", "--make.url=/d", "--make.prompts=p.txt", "--make.licence=MIT")
SETTINGS = {
    PretrainConfig: (TUNED, ("run.url", "data.url")),
    PrepConfig: (("--data.url=/d", "--source.url=/s"), ("source.url", "data.url", "tokenizer.vocab_url")),
    FetchConfig: (
        ("--data.url=/d", "--source.train_url=/t"),
        ("source.train_url", "source.val_url", "data.url", "tokenizer.vocab_url"),
    ),
    FinetuneConfig: (
        (*TUNED, "--start.weights=gpt2"),
        ("run.url", "data.url", "data.examples", "start.weights"),
    ),
    DpoConfig: ((*TUNED, "--start.weights=gpt2"), ("run.url", "data.url", "data.examples", "start.weights")),
    DistilConfig: ((*TUNED, "--teacher.weights=gpt2"), ("run.url", "data.url", "teacher.weights", "start.weights")),
    SynthesisConfig: (MAKE, ("run.url", "make.url", "make.prompts")),
    EvaluateConfig: ((), ("data_url", "results", "compare")),
    GenerateConfig: ((), ("prompts",)),
    ChatConfig: ((), ("compare",)),
}


@pytest.mark.parametrize(("schema", "key"), [(schema, key) for schema, (_, keys) in SETTINGS.items() for key in keys])
def test_every_setting_that_is_a_place_is_checked(schema: type, key: str):
    others = [flag for flag in SETTINGS[schema][0] if not flag.startswith(f"--{key}=")]
    with pytest.raises(ConfigError, match=rf"^flag --{key}: {key} is 's3:/b/x', which .*did you mean s3://b/x\?"):
        loader.load(schema, [*others, f"--{key}=s3:/b/x"], {})
    assert loader.load(schema, [*others, f"--{key}=./s3:/b/x"], {})


def test_no_setting_that_is_a_place_was_forgotten():
    tested = {(schema, key) for schema, (_, keys) in SETTINGS.items() for key in keys}
    names = ("url", "weights", "examples", "prompts", "results", "compare")
    others = {"endpoint.url", "model.padded_vocab_size", "rows", "train.sample_prompts"}  # an API; numbers; texts
    for schema in SETTINGS:
        found = {key for key, _ in loader._walk(schema) if key.endswith(names)} - others
        assert {(schema, key) for key in found} <= tested


def test_variables_are_checked_and_named():
    with pytest.raises(ConfigError, match=r"^environment variable RUN_URL: run.url is 's3:/b', which"):
        loader.load(PretrainConfig, ["--data.url=/d"], {"RUN_URL": "s3:/b"})


@pytest.mark.parametrize(("schema", "key"), [(PretrainConfig, "data.cache_dir"), (EvaluateConfig, "lm_eval_tasks")])
@pytest.mark.parametrize("place", ["s3://b/x", "s3:/b/x", "file:///x"])
def test_a_local_folder_is_no_url(schema: type, key: str, place: str):
    flags = SETTINGS[schema][0]
    with pytest.raises(ConfigError, match=rf"{key} is '{place}', which is not a path of this machine"):
        loader.load(schema, [*flags, f"--{key}={place}"], {})


# Entries as they are called, with settings that are complete but for the place.
ENTRIES = {
    "train": "trainer.train trainer/configs/debug.yaml --data.url=/nowhere --run.url=PLACE",
    "prepare": "data_prep.prepare --source.url=/nowhere/*.txt --data.url=PLACE",
    "fetch": "data_prep.fetch --source.train_url=/nowhere/*.bin --data.url=PLACE",
    "sets": "data_prep.sets instructions PLACE --from=/nowhere.jsonl",
    "verify": "data_prep.verify PLACE",
    "evaluate": "trainer.evaluate PLACE",
    "generate": "trainer.generate PLACE",
    "chat": "trainer.chat PLACE",
    "serve": "trainer.serve PLACE",
    "export": "trainer.export gpt2 PLACE",
    "import": "trainer.import_weights gpt2 PLACE trainer/configs/debug.yaml --data.url=/nowhere",
    "pull": "launch.runs pull PLACE HERE/pulled",
    "logs": "launch.runs logs PLACE",
    "report": "cost_report PLACE --offline",
    "page": "cost_report /nowhere --html PLACE",
    "plots": "trainer.plots /nowhere --out=PLACE",
}


@pytest.mark.parametrize("entry", fast_only(ENTRIES, {"train", "prepare", "fetch", "evaluate", "report", "pull"}))
def test_an_entry_refuses_it_and_writes_nothing(entry: str, tmp_path: Path):
    """In a folder of its own, where s3:/b/x could be made."""
    module, *arguments = ENTRIES[entry].replace("PLACE", "s3:/b/x").replace("HERE", str(tmp_path)).split()
    arguments = [str(ROOT / each) if each.endswith(".yaml") else each for each in arguments]
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COST_CACHE_DIR": str(tmp_path / "costs")}
    command = [sys.executable, "-m", module, *arguments]
    done = warm.run(command, cwd=work, env=environment, timeout=PATIENCE_SECONDS)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()[-1:]
    assert line.startswith("error: ")
    assert "s3:/b/x" in line
    assert "did you mean s3://b/x" in line or "is not a path of this machine" in line
    assert not list(work.rglob("*"))
    assert not list(tmp_path.glob("pulled*"))


# --- one place for BUCKET and RUN ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "run", "url"),
    [
        ("b", "a", "s3://b/runs/a"),
        ("b/", "a", "s3://b/runs/a"),
        ("s3://b", "a", "s3://b/runs/a"),
        ("s3://b/", "a", "s3://b/runs/a"),
        ("s3://b//", "a", "s3://b/runs/a"),
        ("s3://b/team/x/", "a", "s3://b/team/x/runs/a"),
        ("b/team", "a", "s3://b/team/runs/a"),
        ("gs://b/", "a", "gs://b/runs/a"),
        ("b", "a/", "s3://b/runs/a"),
        ("b", "/a", "s3://b/runs/a"),
        ("  b ", "a", "s3://b/runs/a"),
        ("S3://b", "a", "s3://b/runs/a"),
        ("b", "team//a", "s3://b/runs/team/a"),
    ],
)
def test_node_client_and_report_make_the_same_url_of_bucket_and_run(given, run, url, monkeypatch, capsys):
    """status, logs and pull looked into another folder than the node had written."""
    variables = {"BUCKET": given, "RUN": run}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RUN_URL", raising=False)
    assert place_on_node.main(["RUN"]) == 0
    assert capsys.readouterr().out.strip() == url
    assert runs.run_of("sky/pretrain-8xa100.yaml", variables) == url
    assert url.startswith(discover.runs_url(variables) + "/")
