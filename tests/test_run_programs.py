"""`make run` with the real programs in the place of rented machines: what one leaves is what the next one needs."""

import sys
import time
from pathlib import Path

import pytest

from core.run import budget as budgets
from core.run import course
from core.run.folder import RunFolder
from launch import run
from tests import warm
from tests.launching import TINY, completed, metrics, no_ranks
from tests.rented import Machines, rent

# How the money ends a run is tested with a clock that is not this machine's (test_anneal.py): here the steps end it.
STEPS, USD_PER_HOUR = 40, 3.6


class Programs(Machines):
    """Runs the programs of the tasks here, with what a node would tell them."""

    def _train(self, settings: dict[str, str]) -> None:
        arguments = [settings["CONFIG"], *settings["TRAIN_ARGS"].split()]
        self._run("trainer.train", arguments, settings, settings["USD_PER_HOUR"])

    def _evaluate(self, settings: dict[str, str]) -> None:
        self._run("trainer.evaluate", [*settings["EVAL_ARGS"].split(), "--tokens=2048"], settings, "3.6")

    def _export(self, settings: dict[str, str]) -> None:
        self._run("trainer.export", [], settings, "3.6")

    def _run(self, module: str, arguments: list[str], settings: dict[str, str], price: str) -> None:
        told = {"RUN_URL": str(self.bucket / "runs" / settings["RUN"]), "MAX_USD": settings["MAX_USD"]}
        told |= {"DATA_URL": str(self.bucket / "data" / settings["DATA"]), "USD_PER_HOUR": price, "USE_SPOT": "false"}
        told |= {"SEGMENT_STARTED_AT": f"{time.time():.3f}", "CLOUD": "lambda", "INSTANCE_TYPE": "gpu_8x_a100"}
        done = warm.run(
            [sys.executable, "-m", module, *arguments],
            env={**no_ranks(), **told},
        )
        assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_sum_becomes_an_annealed_model_that_is_evaluated_and_exported(
    tmp_path: Path, sky, vocab_bpe: Path, monkeypatch, capsys
):
    machines = Programs(tmp_path / "bucket", vocab_bpe)
    rent(machines, sky, monkeypatch)
    monkeypatch.setenv("CONFIG", "trainer/configs/debug.yaml")
    monkeypatch.setenv("TRAIN_ARGS", " ".join([*TINY, f"--train.steps={STEPS}"]))
    monkeypatch.setenv("USD_PER_HOUR", f"{USD_PER_HOUR:g}")
    assert run.main(["--usd=20"]) == 0
    said = capsys.readouterr().out
    print(said)
    folder = RunFolder(str(machines.bucket / "runs/20usd"))
    [change] = course.read(folder)
    assert change.kind == "anneal"
    assert change.end == max(completed(folder.url)) == STEPS
    rates = {step: record["lr"] for step, record in metrics(folder.url).items()}
    assert rates[change.end] < 0.1 * rates[change.step]
    result = budgets.outcome(folder, 1)
    assert result["end"] == "finished"
    assert result["usd"] <= 20 - result["beside_usd"]
    assert result["val_loss"] < 11
    [exported] = Path(folder.exports).glob("step-*")
    assert (exported / "model.safetensors").exists()
    assert "the cap ended the training" not in said
