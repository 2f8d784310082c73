"""A run that was trained with relative places is used from another folder, and without its data."""

import shutil
import sys
from pathlib import Path

import pytest

from core import urls
from tests import corpus, launching, tuning, warm
from trainer.weights.open import look_up


def run_in(folder: Path, *command: str, **environment: str) -> str:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", *command]
    result = warm.run(command, cwd=folder, env=launching.no_ranks() | environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory, vocab_bpe) -> Path:
    """The folder in which `data` was prepared and `runs/first` trained, both named from within it."""
    folder = tmp_path_factory.mktemp("home")
    corpus.prepare_set(corpus.write_parquet(folder / "source", [corpus.speeches(12)]), str(folder / "data"), vocab_bpe)
    flags = ["--data.url=data", "--run.url=runs/first", "--train.steps=2", "--train.sample_tokens=0"]
    run_in(folder, "trainer.train", *launching.TINY, *flags)
    return folder


def test_weights_are_used_from_another_folder(home: Path, tmp_path: Path):
    run = str(home / "runs" / "first")
    assert look_up(run)[1]["config"]["data"]["url"] == str(home / "data")
    run_in(tmp_path / "other", "trainer.generate", run, "--max_tokens=2", "--device=cpu")
    found = run_in(tmp_path / "other", "trainer.evaluate", run, "--tasks=perplexity", "--tokens=256", "--device=cpu")
    assert "perplexity" in found


def test_weights_are_used_without_their_data(home: Path, tmp_path: Path):
    run = shutil.copytree(home / "runs" / "first", tmp_path / "moved")
    away = (home / "data").rename(home / "away")
    try:
        run_in(tmp_path / "other", "trainer.generate", str(run), "--max_tokens=2", "--device=cpu")
        run_in(tmp_path / "other", "trainer.export", str(run), "exported")
        assert (tmp_path / "other" / "exported" / "tokenizer.json").exists()
    finally:
        away.rename(home / "data")


def test_what_was_tuned_on_relative_places_is_used_from_another_folder(home: Path, tmp_path: Path):
    tuning.write_rows(home / "rows.jsonl", tuning.conversations(8))
    places = ["--start.weights=runs/first", "--data.url=data", "--data.examples=rows.jsonl", "--run.url=runs/tuned"]
    more = ["--stage=finetune", "--train.steps=2", "--lora.rank=2", "--train.sample_tokens=0"]
    run_in(home, "trainer.train", *tuning.BATCH, *tuning.QUIET, *more, *places)
    run_in(tmp_path / "other", "trainer.generate", str(home / "runs" / "tuned"), "--max_tokens=2", "--device=cpu")


@pytest.mark.slow
def test_a_tilde_is_the_home_folder_wherever_a_place_is_named(home: Path, tmp_path: Path):
    """A shell leaves it as it is in --run.url=~/run and in .env; a folder of that name invites `rm -rf ~`."""
    places = ["--data.url=~/data", "--run.url=~/runs/tilde", "--data.cache_dir=~/cache"]
    flags = ["--train.steps=2", "--train.sample_tokens=0"]
    run_in(tmp_path / "other", "trainer.train", *launching.TINY, *flags, *places, HOME=str(home))
    assert (home / "runs/tilde/run.json").exists()
    exported = run_in(tmp_path / "other", "trainer.export", "~/runs/tilde", "~/exported", HOME=str(home))
    assert (home / "exported/config.json").exists(), exported
    assert list((tmp_path / "other").iterdir()) == []


def test_a_tilde_in_a_path_of_this_machine(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(home))
    assert urls.local_path("~/plots", "--out") == home / "plots"
