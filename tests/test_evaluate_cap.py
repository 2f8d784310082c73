"""trainer.evaluate under a cap, and asked to stop: it stops in time, keeps what it found, says so with its exit code,
and can go on."""

import os
import signal
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from core import storage
from core.errors import CapReached, ConfigError
from core.run.reader import read_run
from core.settings import loader
from core.settings.evaluation import EvaluateConfig
from tests import launching, models, patched, warm
from trainer import evaluate
from trainer.evals import likelihood, progress, suite
from trainer.weights.open import open_weights

ROOT = Path(__file__).parent.parent
TASK = ["--tasks=perplexity", "--tokens=3000", "--cpu_threads=1"]


@pytest.fixture
def run_url(tmp_path: Path, vocab_bpe) -> str:
    url = str(tmp_path / "run")
    models.make_run(url, models.prepare_data(tmp_path, vocab_bpe, 4, ("Once upon a time there was a cap. " * 40,) * 12))
    return url


def ends(run_url: str) -> list[str]:
    return [segment.end["reason"] for segment in read_run(f"{run_url}/evaluations").segments]


def test_it_stops_between_batches_and_goes_on_with_more_money(run_url, ranks, monkeypatch):
    monkeypatch.setenv("USD_PER_HOUR", "36")
    # Paid for from now on: this process may have run other tests for long.
    monkeypatch.setattr("core.run.segment.process_started_at", time.time)
    monkeypatch.setattr(likelihood, "TOKENS_PER_BATCH", 512)
    compute, batches = likelihood._scores, []

    def counted(*arguments):
        batches.append(len(arguments[1]))
        if len(batches) == 3:  # the clock strikes
            monkeypatch.setattr(progress.time, "time", lambda now=time.time: now() + 3600)
        return compute(*arguments)

    monkeypatch.setattr(likelihood, "_scores", counted)
    with pytest.raises(CapReached, match=r"the \$5 of max_usd.*larger MAX_USD"):
        evaluate.run([run_url], loader.load(EvaluateConfig, TASK, {"MAX_USD": "5"}), ranks)
    assert len(batches) == 3
    assert ends(run_url) == ["cap"]
    monkeypatch.undo()
    monkeypatch.setenv("USD_PER_HOUR", "36")
    monkeypatch.setattr("core.run.segment.process_started_at", time.time)
    monkeypatch.setattr(likelihood, "TOKENS_PER_BATCH", 512)
    rest = []
    monkeypatch.setattr(likelihood, "_scores", lambda *given: rest.append(len(given[1])) or compute(*given))
    evaluate.run([run_url], loader.load(EvaluateConfig, TASK, {"MAX_USD": "50"}), ranks)
    [document] = suite.read_results(suite.results_folder(open_weights(run_url, torch.device("cpu")), ""))
    assert sum(batches) + sum(rest) == -(-document["scores"]["tokens"] // 64), "nothing is computed twice"
    assert ends(run_url) == ["cap", "finished"]


def test_all_ranks_leave_with_the_code_of_the_cap(run_url, tmp_path):
    """The machine's first two minutes are in the ledger, and cost more than the cap."""
    environment = os.environ | {"TORCHELASTIC_ERROR_FILE": os.devnull, "USD_PER_HOUR": "36", "MAX_USD": "1"}
    environment |= {"SEGMENT_STARTED_AT": str(time.time() - 120), "EXIT_CODE_FILE": str(tmp_path / "code")}
    environment |= {"WARM_CHILDREN": "yes"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    done = warm.run([*command, "-m", "trainer.evaluate", run_url, *TASK], cwd=ROOT, env=environment)
    assert done.returncode == 1
    assert (tmp_path / "code").read_text() == "34\n"
    assert "evaluations have cost nearly the $1 of max_usd" in done.stderr
    assert ends(run_url) == ["cap"]
    assert not [name for name in storage.list_names(f"{run_url}/evaluations") if name.startswith("step-")]


def test_asked_to_stop_it_leaves_with_33_and_keeps_what_it_found(tmp_path, vocab_bpe):
    """With so many validation tokens, in so small batches, that it is not done before it is asked."""
    run_url = str(tmp_path / "run")
    models.make_run(
        run_url, models.prepare_data(tmp_path, vocab_bpe, 4, ("Once upon a time there was a cap. " * 2000,) * 24)
    )
    environment = {**launching.no_ranks(), "EXIT_CODE_FILE": str(tmp_path / "code")}
    constants = {**patched.PROMPT, "trainer.evals.likelihood.TOKENS_PER_BATCH": 512}
    command = [sys.executable, *patched.module_of("trainer.evaluate", constants), run_url]
    command += ["--tasks=perplexity", "--cpu_threads=1"]
    process = warm.Popen(command, cwd=ROOT, env=environment, stderr=PIPE, text=True)
    folder = tmp_path / "run" / "evaluations"
    while not list(folder.glob("*/partial/*/*/*.jsonl")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 33
    assert (tmp_path / "code").read_text() == "33\n"
    assert ends(run_url) == ["preempted"]
    assert list(folder.glob("*/partial/*/*/*.jsonl"))


def test_a_cap_without_a_price_is_refused(run_url, ranks, monkeypatch):
    monkeypatch.delenv("USD_PER_HOUR", raising=False)
    with pytest.raises(ConfigError, match="this machine's price is not known; set USD_PER_HOUR"):
        evaluate.run([run_url], loader.load(EvaluateConfig, TASK, {"MAX_USD": "5"}), ranks)
