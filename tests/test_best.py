"""The model before its first step, and the checkpoint with the lowest validation loss."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from core import storage
from core.errors import CheckpointError
from core.run import journal
from core.run.folder import RunFolder
from core.run.segment import SegmentLog
from core.settings import loader
from core.settings.training import PretrainConfig
from tests import launching, models
from trainer.checkpoint import layout
from trainer.loop.evaluation import TrainingEvaluator
from trainer.weights.open import look_up, open_weights


@pytest.fixture(scope="module")
def run_url(tmp_path_factory, vocab_bpe) -> str:
    """A run that gets worse: its rate grows until it is far too high."""
    folder = tmp_path_factory.mktemp("best")
    data_url, run_url = models.prepare_data(folder, vocab_bpe), str(folder / "run")
    flags = [f"--data.url={data_url}", f"--run.url={run_url}", "--train.steps=6", "--checkpoint.every_steps=1"]
    flags += ["--train.eval_every=1", "--optimizer.lr=2", "--optimizer.warmup_steps=6", "--optimizer.min_lr_ratio=1"]
    flags += ["--train.sample_every=6", "--train.sample_prompts=Once", "--train.samples_per_prompt=2"]
    launching.train(1, *flags)
    return run_url


def test_a_run_begins_with_the_model_before_its_first_step(run_url: str):
    losses = launching.metrics(run_url, "eval")
    assert sorted(losses) == [0, 1, 2, 3, 4, 5, 6]
    assert 10.5 < losses[0]["val_loss"] < 11.2  # ln 50304 = 10.83
    samples = [
        event
        for segment in storage.list_names(f"{run_url}/metrics")
        for event in journal.read(f"{run_url}/metrics/{segment}")[0]
        if event["kind"] == "sample"
    ]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(0, "Once")] * 2 + [(6, "Once")] * 2
    assert samples[0]["text"] != samples[1]["text"]


def test_a_run_by_hand_keeps_its_log(run_url: str):
    [attempt] = storage.list_names(RunFolder(run_url).logs)
    assert attempt.endswith("-by-hand-000001")
    lines = [event["line"] for event in journal.read(f"{RunFolder(run_url).logs}/{attempt}")[0]]
    assert [line for line in lines if line.startswith("step 6/6 | loss ")]
    assert [line for line in lines if "tokens per parameter" in line and "weight decay on" in line]


def test_the_best_checkpoint_is_kept_and_opened_by_name(run_url: str):
    losses = {step: event["val_loss"] for step, event in launching.metrics(run_url, "eval").items() if step}
    best = min(losses, key=losses.get)
    assert best < 5, "the run was to get worse"
    assert launching.completed(run_url) == [6, 5, best]
    assert look_up(f"{run_url}/checkpoints/best")[0] == layout.folder_of(run_url, best)
    assert open_weights(f"{run_url}/checkpoints/best/", torch.device("cpu")).step == best
    assert launching.manifest(run_url, 6).state["best"] == [best, losses[best]]


def test_without_a_validation_loss_no_checkpoint_is_the_best(tmp_path: Path, vocab_bpe):
    models.make_run(str(tmp_path / "run"), models.prepare_data(tmp_path, vocab_bpe))
    with pytest.raises(CheckpointError, match="has no checkpoint with a validation loss; complete ones: step-00000000"):
        open_weights(f"{tmp_path}/run/checkpoints/best", torch.device("cpu"))


@pytest.mark.parametrize(
    ("restored", "measured", "best"),
    [
        (None, {}, None),
        ([5, 3.0], {}, (5, 3.0)),
        ([5, 3.0], {"eval": {"val_loss": 2.0}}, (9, 2.0)),
        ([5, 3.0], {"eval": {"val_loss": 4.0}}, (5, 3.0)),
        (None, {"eval": {"val_loss": 4.0}}, (9, 4.0)),
    ],
)
def test_a_later_segment_knows_the_lowest_loss(restored, measured, best):
    evaluator = TrainingEvaluator.__new__(TrainingEvaluator)
    evaluator.best = None
    evaluator.recall(restored, 9, measured)
    assert evaluator.best == best


def test_old_checkpoints_are_removed_but_the_best():
    stored = {step: {layout.MARKER: 1} for step in (9, 8, 7, 6, 5)}
    assert layout.to_remove(stored, 2, 0, kept=[6]) == [7, 5]
    assert layout.to_remove(stored, 2, 5, kept=[6]) == [7]
    assert layout.to_remove(stored, 2, 0) == [7, 6, 5]


@pytest.mark.parametrize("kind", ["hellaswag", "sample"])
def test_a_request_to_stop_ends_hellaswag_and_samples(kind, run_url: str, ranks, caplog):
    """test_stop_life.py does this with the validation loss, in real processes."""
    opened, reported, asked = open_weights(run_url, torch.device("cpu")), [], []
    flags = [f"--train.{each}_every=0" for each in ("eval", "hellaswag", "sample") if each != kind]
    flags += [f"--train.{kind}_every=1", "--train.sample_prompts=Once", "--train.sample_tokens=8"]
    train = loader.load(PretrainConfig, [*flags, "--run.url=r", "--data.url=d"], {}).train
    stage = SimpleNamespace(
        settings=SimpleNamespace(train=train, batch=SimpleNamespace(tokens_per_step=1)),
        encoding=opened.encoding,
        ranks=ranks,
        precision="auto",
        steps=9,
        as_prompt=str,
        validation=lambda: None,
    )
    reporter = SimpleNamespace(metric=lambda kind, values: reported.append((kind, values["step"])))
    rows = models.hellaswag_items(4)
    evaluator = TrainingEvaluator(stage, ranks, opened.model, SegmentLog(), reporter, rows, lambda: bool(asked))
    assert evaluator.due(1) == [kind]
    assert evaluator.evaluate(1)
    assert set(reported) == {(kind, 1)}
    asked.append("SIGTERM")
    assert not evaluator.evaluate(2)
    assert set(reported) == {(kind, 1)}
    assert "the evaluation of step 2 is cut off: the next segment repeats it" in caplog.text
