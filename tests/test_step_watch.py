"""What a step is watched by: norms and activations, slow ranks, trackers, the picture on a terminal."""

import gzip
import itertools
import json
import os
import pty
import re
import struct
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from core import pulse, storage
from core.run.folder import RunFolder, id_of, open_run
from core.run.segment import SegmentLog
from core.settings.model import ModelConfig
from core.settings.training import OptimizerConfig
from tests import corpus, launching, warm
from tests.patience import PATIENCE_SECONDS
from trainer.distributed import process_group
from trainer.loop import trackers
from trainer.loop.health import SlowRanks, StepNorms
from trainer.loop.loop import Loop
from trainer.loop.report import StepReporter
from trainer.loop.screen import curve
from trainer.model.gpt import GPT
from trainer.optim.optimizer import BlockOptimizer


def test_norms_of_one_step():
    model = GPT(ModelConfig(layers=2, heads=2, width=8, context=4, padded_vocab_size=32, tie_embeddings=False))
    model.initialise(1)
    optimizer = BlockOptimizer(model, OptimizerConfig(weight_decay=0.0), rank=0, world=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    norms = StepNorms(model)
    tokens = torch.randint(0, 32, (2, 5))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    norms.gradients()
    optimizer.step(0.5)
    norms.finish()
    found = norms.read()
    gradients = found["gradients"]
    assert set(gradients) == set(found["updates"]) == {"embedding", "head", "attention", "mlp", "other"}
    moved = (model.lm_head.weight - before["lm_head.weight"]).norm()
    assert found["updates"]["head"] == pytest.approx(moved.item())
    assert found["weights"]["head"] == pytest.approx(model.lm_head.weight.norm().item())
    assert gradients["head"] == pytest.approx(model.lm_head.weight.grad.norm().item())
    assert len(found["largest_activations"]) == 2
    assert min(found["largest_activations"]) > 0
    assert model.watch is None


def test_a_rank_that_stays_slow_is_named_once():
    ranks = SlowRanks(4)
    fine, slow = [1.0, 1.0, 1.1, 1.0], [1.0, 1.0, 1.5, 1.0]
    assert [ranks.check(slow), ranks.check(slow), ranks.check(fine)] == [[], [], []]
    assert [ranks.check(slow), ranks.check(slow)] == [[], []]
    assert ranks.check(slow) == [(2, 1.5)]
    assert ranks.check(slow) == []


@pytest.mark.parametrize(("device", "is_gpu"), [("cuda", True), ("cpu", False)])
def test_only_rank_0_warns_of_a_slow_rank(caplog, device, is_gpu):
    for is_main in (True, False):
        ranks = SimpleNamespace(is_main=is_main, device=torch.device(device))
        loop = SimpleNamespace(slow_ranks=SlowRanks(4), segment=SegmentLog(), ranks=ranks)
        for _ in range(4):
            Loop._report_slow_ranks(loop, [1.0, 1.0, 1.5, 1.0])
    (said,) = caplog.messages
    assert said.startswith("rank 2 computes 1.50 times as long as the median rank")
    assert ("GPU" in said) == is_gpu


def test_an_exchange_between_ranks_is_a_sign_of_life(ranks, tmp_path, monkeypatch):
    """The supervisor of a node sees it: a step ends with one, and so does a batch of an evaluation."""
    monkeypatch.setenv("PULSE_FILE", str(tmp_path / "pulse"))
    exchanges = (
        lambda: process_group.gather_numbers([1.0], ranks),
        lambda: process_group.gather_objects("x", ranks),
        lambda: process_group.on_main(lambda: None, ranks),
        lambda: process_group.divide_over_ranks(1, lambda index: [1.0], ranks),
    )
    for exchange in exchanges:
        (tmp_path / "pulse").unlink(missing_ok=True)
        monkeypatch.setattr(pulse, "_due", {})
        exchange()
        assert (tmp_path / "pulse").exists()


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """A tracker's library takes long to import and to end on a busy machine."""
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", PATIENCE_SECONDS)


def test_a_tracker_that_fails_is_named_and_left_out(monkeypatch, caplog):
    got = []

    def good(run: trackers.TrackedRun):
        return lambda step, values: got.append((step, dict(values))), lambda: got.append("closed")

    def bad(run: trackers.TrackedRun):
        def send(step: int, values: dict) -> None:
            raise OSError("no route to its server")

        return send, lambda: None

    monkeypatch.setattr(trackers, "_KINDS", {"wandb": good, "mlflow": bad})
    sender = trackers.Trackers(("wandb", "mlflow"), "s3://bucket/runs/first", {}, "1a")
    sender.add("train", {"step": 1, "loss": 2.5, "mfu": None, "updates": {"mlp": 0.1}})
    sender.add("sample", {"step": 1, "text": "no number"})
    sender.add("train", {"step": 2, "loss": 2.0})
    sender.close()
    assert got == [(1, {"train/loss": 2.5, "train/updates/mlp": 0.1}), (2, {"train/loss": 2.0}), "closed"]
    assert [record.message for record in caplog.records] == [
        "train.trackers: mlflow fails and gets no more metrics (OSError: no route to its server)"
    ]


def test_a_tracker_that_does_not_end_is_named_and_not_waited_for(monkeypatch, caplog):
    ends = threading.Event()
    monkeypatch.setattr(trackers, "_KINDS", {"wandb": lambda run: (lambda step, values: None, ends.wait)})
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.05)
    sender = trackers.Trackers(("wandb",), "run", {}, "1a")
    sender.add("train", {"step": 1, "loss": 2.5})
    sender.close()
    assert [record.message for record in caplog.records] == [
        "train.trackers: wandb has not taken the last metrics within 0.05 s and may lack them; the run's folder has "
        "all metrics"
    ]
    ends.set()


def test_a_tracker_that_is_not_installed_is_said(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sender = trackers.Trackers(("wandb",), "run", {}, "1a")
    sender.close()
    assert "wandb is not installed and gets no metrics: pip install wandb" in caplog.text


def test_tensorboard_gets_the_numbers(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path))
    sender = trackers.Trackers(("tensorboard",), "s3://bucket/runs/first", {"model": {"layers": 2}}, "1a")
    for step in (1, 2):
        sender.add("train", {"step": step, "loss": 3.0 - step})
    sender.close()
    events = EventAccumulator(str(tmp_path / "first-1a")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]


def test_trackers_get_the_dollars_of_each_step(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "logs"))
    url = str(tmp_path / "run")
    open_run(RunFolder(url), {}, {}, "f")
    train = SimpleNamespace(display="lines", trackers=("tensorboard",), log_every=100)
    settings = SimpleNamespace(train=train, batch=SimpleNamespace(tokens_per_step=256), run=SimpleNamespace(url=url))
    stage = SimpleNamespace(settings=settings, flops_per_token=None, share_world=1, steps=9, config={})
    ranks = SimpleNamespace(device=torch.device("cpu"), world=1, is_main=True)
    amounts = iter([1.25, 1.5, None])
    segment = SimpleNamespace(metric=lambda *_: None, cap=SimpleNamespace(spent_usd=lambda: next(amounts)))
    reporter = StepReporter(stage, ranks, segment)
    for step in (1, 2, 3):
        reporter.step(step, 3.0, 0.1, 1.0, 2.0, 0.0)
    reporter.close()
    [folder] = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("cost/usd_at_most")] == [(1, 1.25), (2, 1.5)]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]


def test_tensorboard_shows_a_repeated_step_once_and_runs_of_one_name_apart(monkeypatch, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path))
    _in_two_segments("tensorboard")
    other = trackers.Trackers(("tensorboard",), "gs://elsewhere/first: #1 o'hara", {}, "2b")
    other.add("train", {"step": 1, "loss": 9.0})
    other.close()
    events = EventAccumulator(str(tmp_path / "first-1a")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    events = EventAccumulator(str(tmp_path / "first___1_o_hara-2b")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == [9.0]


def test_a_run_gets_its_id_when_it_is_created(tmp_path):
    first, again = RunFolder(str(tmp_path / "a" / "run")), RunFolder(str(tmp_path / "b" / "run"))
    assert open_run(first, {"x": 1}, {}, "f")
    made = id_of(first)
    assert not open_run(first, {"x": 1}, {}, "f")
    assert id_of(first) == made
    assert open_run(again, {"x": 1}, {}, "f")
    assert id_of(again) != made
    storage.delete(first.description)  # made anew under its name
    assert open_run(first, {"x": 1}, {}, "f")
    assert id_of(first) != made
    old = json.loads(storage.read_bytes(first.description))
    del old["id"]
    storage.write_bytes(first.description, json.dumps(old).encode())
    assert id_of(first) == id_of(RunFolder(f"{first}/")) != id_of(again)


def _in_two_segments(kind: str) -> None:
    """Steps 1 to 5, then 4 to 6 again, as after a preemption."""
    for first, last in ((1, 5), (4, 6)):
        sender = trackers.Trackers((kind,), "s3://bucket/runs/first", {"model": {"layers": 2}}, "1a", first - 1)
        for step in range(first, last + 1):
            sender.add("train", {"step": step, "loss": 7.0 - step})
        sender.close()


def _log_entries(data: bytes) -> Iterator[bytes]:
    """The entries of a short log in LevelDB's format behind W&B's head: checksum, length, type, content."""
    at = 7
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1, "an entry of several parts"
        yield data[at + 7 : at + 7 + length]
        at += 7 + length


def test_wandb_gets_the_metrics_of_every_segment(tmp_path, monkeypatch):
    """Needs wandb; offline."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    _in_two_segments("wandb")

    def records() -> list[list]:
        files = sorted(tmp_path.rglob("*.wandb"))
        return [[Record.FromString(data) for data in _log_entries(path.read_bytes())] for path in files]

    # A process of W&B writes the files, and `finish` does not wait for it when it is offline.
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all(file and file[-1].HasField("exit") for file in records()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = []
    for record in itertools.chain.from_iterable(records()):
        values = {item.nested_key[0] or item.key: item.value_json for item in record.history.item}
        if record.HasField("run"):
            assert (record.run.run_id, record.run.display_name) == ("1a", "first")
        if values:
            found.append((int(values["step"]), float(values["train/loss"])))
    assert found == [(step, 7.0 - step) for step in (1, 2, 3, 4, 5, 4, 5, 6)]


def test_mlflow_gets_one_run_for_all_segments(tmp_path, monkeypatch):
    """Needs mlflow; into a folder."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    _in_two_segments("mlflow")
    (run,) = mlflow.search_runs(output_format="list")
    assert run.data.params == {"model.layers": "2"}
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(step, 7.0 - step) for step in (1, 2, 3, 4, 5, 4, 5, 6)]


def test_curve_draws_the_fall_of_a_loss():
    assert curve([]) == ""
    assert curve([1.0]) == "▁"
    assert curve([4, 3, 2, 1]) == "█▆▃▁"
    assert curve([8.0] * 60 + [1.0] * 60, columns=4) == "██▁▁"


@pytest.fixture(scope="module")
def data_url(tmp_path_factory, vocab_bpe) -> str:
    folder = tmp_path_factory.mktemp("data")
    source = corpus.write_parquet(folder / "source", [corpus.speeches(4)])
    corpus.prepare_set(source, str(folder / "set"), vocab_bpe)
    return str(folder / "set")


def test_on_a_terminal_a_picture_is_kept_up_to_date(data_url: str, tmp_path):
    flags = [f"--data.url={data_url}", f"--run.url={tmp_path}/run", "--train.steps=4", "--checkpoint.every_steps=9"]
    environment = {**os.environ, "COLUMNS": "100", "LINES": "30", "TERM": "xterm-256color", "USD_PER_HOUR": "3.6"}
    watched = ["--train.norms_every=2", "--train.profile=2,3"]
    command = [sys.executable, "-m", "trainer.train", *launching.TINY, *flags, *watched]
    terminal, end = pty.openpty()
    process = warm.Popen(command, cwd=launching.REPOSITORY, env=environment, stdin=end, stdout=end, stderr=end)
    os.close(end)
    output = b""
    while True:
        try:
            output += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
    assert process.wait() == 0, text
    assert "step 4 of 4" in text
    for name in ("loss", "tokens/s", "MFU", "spent", "left under the cap", "time to go", "validation loss"):
        assert name in text, name
    assert "| loss" not in text  # no log line per step beside it
    norms = launching.metrics(f"{tmp_path}/run", "norms")
    assert sorted(norms) == [2, 4]
    (trace,) = storage.list_names(f"{tmp_path}/run/profile")
    assert trace == "segment-000001-steps-2-3.json.gz"
    events = json.loads(gzip.decompress(storage.read_bytes(f"{tmp_path}/run/profile/{trace}")))["traceEvents"]
    assert sum(event["name"] == "aten::_fused_adamw_" for event in events) == 2 * 2  # two groups, two steps
    (line,) = [each for each in text.splitlines() if "operations with the most CPU time" in each]
    assert re.search(r"the 10 operations with the most CPU time, of [\d.]+ ms in all:", line)
    assert len(re.findall(r"\d+\.\d ms +\d+\.\d % +\d+ x aten::", text)) >= 5
