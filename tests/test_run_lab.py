"""`make run` on an emulated cloud with the real SkyPilot: a sum becomes an annealed model within the money.

The machines are eight pretended A100 on AWS at a pretended price, so that the sum lasts for minutes.
"""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import warm
from tests.lab import BUCKET, LAB, PYTHON, REHEARSAL, ROOT, Lab, wait
from tests.test_launch_lab import GONE_SECONDS, lab  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not (LAB / "labexec").exists(), reason="LAB_DIR names no emulated cloud"),
]
USD_PER_HOUR = 30.0
# Emulated machines go 79 to 133 s after their program.
RESERVE_SECONDS = 135
SMALL = "--batch.tokens_per_step=256 --batch.micro_batch_size=2 --train.log_every=5 --train.eval_every=0"
SMALL += " --train.eval_tokens=1024 --checkpoint.every_steps=20 --optimizer.warmup_steps=5 --train.steps=100000"
# On few processors threads would wait for each other.
SMALL += f" --train.cpu_threads=1 --run.shutdown_reserve_seconds={RESERVE_SECONDS}"
# The sums last for up to forty minutes of training.
LONGEST_SECONDS = 3600
STAGES = ("prep-data", "evaluate", "export")
MOST_UNSPENT = 0.03


class Money:
    """One run of a sum, and its command `make run`, which can be started again."""

    def __init__(self, cloud: Lab, said: Path, run: str, task: str, usd: float, *options: str):
        self.lab, self.run, self.task, self.usd = cloud, run, task, usd
        self.folder, self._said, self._options = f"runs/{run}", said, options
        self.began_at = time.time()

    def start(self, usd_per_hour: float = USD_PER_HOUR) -> subprocess.Popen:
        given = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        given |= {"BUCKET_ACCESS_KEY_ID": "test", "BUCKET_SECRET_ACCESS_KEY": "test"}
        given |= {"BUCKET": BUCKET, "AWS_ENDPOINT_URL": self.lab.endpoint, **REHEARSAL, "RUN": self.run}
        given |= {"SOURCE_URL": f"s3://{BUCKET}/source/*.parquet", "VOCAB_URL": f"s3://{BUCKET}/source/vocab.bpe"}
        given |= {"PREP_ARGS": "--evaluation_sets=", "TRAIN_ARGS": SMALL, "USD_PER_HOUR": f"{usd_per_hour:g}"}
        words = [LAB / "labexec", "env", *(f"{name}={value}" for name, value in given.items())]
        command = [*words, str(PYTHON), "-u", "-m", "launch.run", f"--usd={self.usd:g}", *self._options]
        with self._said.open("ab") as file:
            return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, preexec_fn=warm.default_signals)

    @property
    def said(self) -> str:
        return self._said.read_text()

    def stop(self, command: subprocess.Popen) -> None:
        """Ctrl-C once the command waits for its training: the machine goes on."""
        wait("the training", lambda: "training: " in self.waiting or command.poll() is not None)
        assert command.poll() is None, self.said[-3000:]
        command.send_signal(signal.SIGINT)
        assert command.wait(120) == 130, self.said[-3000:]

    @property
    def waiting(self) -> str:
        """The lines that say what the command waits for."""
        return "\n".join(line for line in self.said.splitlines() if "steps, $" in line)

    def preempt(self) -> None:
        """The machine that trains is taken away."""
        for machine in self.lab.machines(self.task, self.began_at, ended=False):
            self.lab.control("preempt-id", machine["id"])

    def segments(self) -> list[dict]:
        """Of the training. The report also has lines for the machines of the other stages."""
        return [each for each in self.lab.report(self.run)["segments"] if each["end"] != "no ledger"]

    def course(self) -> list[str]:
        return self.lab.objects(f"{self.folder}/course")

    def finishes(self, command: subprocess.Popen) -> None:
        """The command ends well, with an annealed model that is exported, and no machine of it is left."""
        assert command.wait(LONGEST_SECONDS) == 0, self.said[-3000:]
        print(self.said)
        assert "config.json" in "".join(self.lab.objects(f"{self.folder}/exports"))
        assert "000001.json" in self.course()
        assert self.segments()[-1]["end"] == "finished"
        for name in (self.task, *STAGES):
            wait(f"no {name}", lambda name=name: not self.lab.machines(name, self.began_at, ended=False), GONE_SECONDS)

    def bill(self, *usd_per_hour: float) -> float:
        """Dollars that the clouds charge, with the training machines at these prices, the last one for the rest."""
        prices = list(usd_per_hour)
        usd = sum(usd for name in STAGES for _, usd in self.lab.bill(name, self.began_at))
        for seconds, _ in self.lab.bill(self.task, self.began_at):
            price = prices.pop(0) if len(prices) > 1 else prices[0]
            usd += seconds / 3600 * price
            print(f"training machine: {seconds:.0f} s at ${price:g} an hour")
        print(f"{self.run}: the clouds charge ${usd:.3f} of ${self.usd:g}, {100 * usd / self.usd:.1f} %")
        return usd


def test_a_sum_on_demand_ends_annealed_and_within_the_money(lab, tmp_path: Path):  # noqa: F811
    options = ("--gpus=A100:8", "--cloud=aws", "--on-demand")
    money = Money(lab, tmp_path / "said.txt", "money", "pretrain-8xa100", 16.0, *options)
    money.stop(money.start())
    money.finishes(money.start())
    assert money.said.count("preparation: sky/prep-data.yaml") <= 1
    assert money.said.count("training: sky/pretrain-8xa100.yaml") == 1
    assert (1 - MOST_UNSPENT) * money.usd <= money.bill(USD_PER_HOUR) <= money.usd


def test_a_sum_on_spot_survives_two_preemptions_one_during_the_cooldown(lab, tmp_path: Path):  # noqa: F811
    options = ("--gpus=A100:8", "--cloud=aws")
    money = Money(lab, tmp_path / "said.txt", "money-spot", "pretrain-8xa100-spot", 9.0, *options)
    command = money.start()
    wait("a step", lambda: lab.step(money.run) > 0 or command.poll() is not None)
    money.preempt()
    wait("the cooldown", lambda: money.course() or command.poll() is not None, LONGEST_SECONDS)
    money.preempt()
    money.finishes(command)
    assert "training: sky/pretrain-8xa100-spot.yaml" in money.said
    assert len(money.segments()) == 3
    assert money.bill(USD_PER_HOUR) <= money.usd


def test_a_price_that_doubles_shortens_the_training_and_not_the_annealing(lab, tmp_path: Path):  # noqa: F811
    """The machine is lost, and the next one costs twice as much."""
    options = ("--gpus=A100:8", "--cloud=aws", "--on-demand")
    money = Money(lab, tmp_path / "said.txt", "money-dearer", "pretrain-8xa100", 12.0, *options)
    money.stop(money.start())
    wait("a step", lambda: lab.step(money.run) > 0)
    money.preempt()
    money.finishes(money.start(2 * USD_PER_HOUR))
    assert [each["usd_per_hour"] for each in money.segments()] == [USD_PER_HOUR, 2 * USD_PER_HOUR]
    assert money.bill(USD_PER_HOUR, 2 * USD_PER_HOUR) <= money.usd
