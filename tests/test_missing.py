"""What starts on a machine that has little more than torch, numpy and PyYAML."""

import sys

import pytest
import xxhash

from bench import tokens
from core import storage
from core.errors import ConfigError
from tests import launching, missing
from trainer.loop import report


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("made-up"))
    tokens.make(folder, 1 << 15)
    return folder


def test_the_trainer_trains_and_its_checkpoint_is_as_with_all_packages(data_url: str, tmp_path):
    run_url = f"{tmp_path}/run"
    flags = [f"--data.url={data_url}", f"--run.url={run_url}", "--train.device=cpu", "--train.steps=8"]
    without = missing.environment(tmp_path / "hook", missing.PACKAGES)
    launching.train(1, *flags, "--train.hellaswag_items=0", "--train.sample_prompts=", environment=without)
    losses = launching.metrics(run_url)
    assert losses[8]["loss"] < losses[1]["loss"] - 0.5  # the made-up tokens can be learned
    file = launching.manifest(run_url, 8).files[0]
    data = storage.read_bytes(f"{run_url}/checkpoints/step-00000008/{file.name}")
    assert file.xxh3_128 == xxhash.xxh3_128_hexdigest(data)


def test_a_live_view_without_rich_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "trainer.loop.screen", None)  # as where its own imports fail
    assert report.open_screen("auto", 10, None) is None
    with pytest.raises(
        ConfigError, match=r"train.display is live, which needs the package rich; run `pip install rich`"
    ):
        report.open_screen("live", 10, None)
