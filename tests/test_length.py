"""The length of a run in epochs: the data gives the number of steps."""

from pathlib import Path

from core.data import manifest
from core.settings import loader
from core.settings.training import PretrainConfig
from tests import models, tuning
from trainer.stages.pretrain import Pretrain


def test_epochs_become_steps_of_the_data(tmp_path: Path, vocab_bpe, ranks):
    data_url = models.prepare_data(tmp_path, vocab_bpe)
    given = [*tuning.MODEL, *tuning.BATCH, "--run.url=/none", f"--data.url={data_url}", "--train.epochs=2.5"]
    stage = Pretrain(loader.load(PretrainConfig, given, {}), ranks)
    tokens = manifest.read(data_url).splits["train"].tokens
    assert stage.steps == round(2.5 * tokens / stage.settings.batch.tokens_per_step) > 1
    assert stage.identity["train.steps"] == stage.steps
    assert stage.describe_epochs().startswith(" = 2.5")
