"""launch.here: data and training on this computer, by the variables of a launch."""

import os
import sys
from pathlib import Path

import pytest

from bench import tokens
from clouds.base import Gpu
from core.errors import ConfigError
from core.run.model import Run
from core.run.reader import read_run
from launch import here
from tests import corpus, launching, warm

GPU = Gpu("NVIDIA GeForce RTX 4090", 24564, "580.95.05", None, None)


def test_a_text_file_becomes_a_set_of_its_name():
    command, added = here.preparation("prep", {"BUCKET": "./", "SOURCE": "texts/input.txt"})
    assert command[1:] == ["-m", "data_prep.prepare", "data_prep/configs/text.yaml", "--source.url=texts/input.txt"]
    assert added == {"DATA_URL": "./data/input"}
    named = {
        "BUCKET": "b",
        "SOURCE": "*.txt",
        "DATA": "all",
        "PREP_ARGS": "--data.seed=1 --source.text_column='my text'",
    }
    command, added = here.preparation("prep", named)
    assert command[-2:] == ["--data.seed=1", "--source.text_column=my text"]
    assert added == {"DATA_URL": "s3://b/data/all"}


def test_a_config_is_a_source_too():
    source = "data_prep/configs/tiny-shakespeare.yaml"
    command, added = here.preparation("prep", {"BUCKET": "./", "SOURCE": source})
    assert command[1:] == ["-m", "data_prep.prepare", source]
    assert added == {"DATA_URL": "./data/tiny-shakespeare"}


def test_shards_of_others_are_fetched():
    command, added = here.preparation("fetch", {"BUCKET": "./", "SOURCE": "shards/fine*.bin", "PREP_ARGS": ""})
    assert command[1:] == ["-m", "data_prep.fetch", "--source.train_url=shards/fine*.bin"]
    assert added == {"DATA_URL": "./data/fine"}


def test_all_gpus_train_and_a_price_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(here, "torch_version", lambda: "2.13.0")
    given = {"BUCKET": "./", "DATA": "input", "CONFIG": "trainer/configs/debug.yaml", "TRAIN_ARGS": "--train.steps=9"}
    command, added = here.training(given, [GPU, GPU])
    assert command[1:] == ["-m", "launch.node", "-m", "trainer.train", "trainer/configs/debug.yaml", "--train.steps=9"]
    places = {"RUN_URL": "./runs/debug", "DATA_URL": "./data/input"}
    assert added == places | {"DEVICE": "cuda", "RANKS_PER_NODE": "2"}
    assert "USD_PER_HOUR=0.40" in capsys.readouterr().out
    _, added = here.training(given | {"USD_PER_HOUR": "0.4", "RANKS_PER_NODE": "1", "RUN": "a"}, [])
    assert (added["DEVICE"], added["RANKS_PER_NODE"], added["RUN_URL"]) == ("cpu", "1", "./runs/a")
    assert "the price" not in capsys.readouterr().out


def test_the_only_set_is_taken(tmp_path: Path):
    given = {"BUCKET": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"holds no token set; make one first: `make prep-data SOURCE=input.txt`"):
        here.only_set(given)
    tokens.make(str(tmp_path / "data/one"), 1 << 15)
    (tmp_path / "data/unfinished").mkdir()
    assert here.only_set(given) == "one"
    tokens.make(str(tmp_path / "data/two"), 1 << 15)
    with pytest.raises(ConfigError, match=r"holds 2 token sets; choose one, as DATA=one: one, two"):
        here.only_set(given)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: here.preparation("prep", {"BUCKET": "./"}), "SOURCE is empty; name a text file"),
        (
            lambda: here.preparation("prep", {"BUCKET": "./", "SOURCE": "**"}),
            "gives the token set no name; add DATA=NAME",
        ),
        (
            lambda: here.split({"TRAIN_ARGS": "--a='b"}, "TRAIN_ARGS"),
            r"TRAIN_ARGS is \"--a='b\", which a shell could not",
        ),
        (lambda: here.check_torch(1, "2.13.0+cpu"), r"has 1 NVIDIA GPU, but torch 2\.13\.0\+cpu .* `make setup GPU=1`"),
        (lambda: here.check_torch(0, ""), "torch is not installed in this environment; run `make setup`"),
        (lambda: here.main(["tain"]), "usage: python -m launch.here prep, fetch or train"),
    ],
    ids=["no source", "no name", "quote", "CPU build", "no torch", "usage"],
)
def test_bad_input_is_one_sentence(call, said: str):
    with pytest.raises(ConfigError, match=said):
        call()


@pytest.mark.slow
def test_from_a_text_file_to_dollars(tmp_path: Path, vocab_bpe: Path):
    (tmp_path / "input.txt").write_text("\n\n".join(corpus.speeches(6)))
    for name in ("data_prep", "trainer"):
        (tmp_path / name).symlink_to(launching.REPOSITORY / name)
    small = " ".join(flag for flag in launching.TINY if "warmup" not in flag)
    settings = {
        "VOCAB_URL": str(vocab_bpe),
        "SOURCE": "input.txt",
        "RUN": "first",
        "TRAIN_ARGS": f"{small} --train.steps=4 --optimizer.warmup_steps=1 --train.sample_prompts='O my'",
        "USD_PER_HOUR": "0.40",
        "PYTHONPATH": str(launching.REPOSITORY),
        "PATH": f"/usr/bin:/bin:{tmp_path}",
    }
    environment = {**{name: os.environ[name] for name in ("HOME",) if name in os.environ}, **settings}
    for what, given in (("prep", {}), ("train", {"CONFIG": "trainer/configs/debug.yaml"})):
        done = warm.run([sys.executable, "-m", "launch.here", what], cwd=tmp_path, env=environment | given)
        assert done.returncode == 0, done.stdout + done.stderr
    run: Run = read_run(str(tmp_path / "runs/first"))
    assert run.last_step == 4
    assert run.usd == pytest.approx(sum(segment.seconds for segment in run.segments) * 0.40 / 3600)
    assert list((tmp_path / "runs/first/logs").iterdir())
