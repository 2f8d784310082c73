"""`make run` on an emulated cloud with the real SkyPilot: a sum becomes an annealed model within the money."""

import signal
import subprocess
from pathlib import Path

import pytest

from tests import warm
from tests.lab import BUCKET, LAB, PYTHON, REHEARSAL, ROOT, wait
from tests.test_launch_lab import GONE_SECONDS, lab  # noqa: F401 (a fixture)

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(not (LAB / "labexec").exists(), reason="LAB_DIR names no emulated cloud"),
]
# Eight pretended A100 on AWS, on demand, at a pretended price: the sum lasts for about ten minutes.
USD, USD_PER_HOUR = 10.0, 60.0
SMALL = "--batch.tokens_per_step=1024 --batch.micro_batch_size=4 --train.log_every=5 --train.eval_every=0"
SMALL += " --train.eval_tokens=1024 --optimizer.warmup_steps=5 --train.steps=100000"
# Emulated machines go 79 to 133 s after their program.
SMALL += " --run.shutdown_reserve_seconds=135"
ARGUMENTS = (f"--usd={USD:g}", "--gpus=A100:8", "--cloud=aws", "--on-demand")


def start(lab, said: Path) -> subprocess.Popen:  # noqa: F811
    given = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    given |= {"BUCKET_ACCESS_KEY_ID": "test", "BUCKET_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": lab.endpoint}
    given |= {"BUCKET": BUCKET, **REHEARSAL, "RUN": "money", "TRAIN_ARGS": SMALL, "USD_PER_HOUR": f"{USD_PER_HOUR:g}"}
    given |= {"SOURCE_URL": f"s3://{BUCKET}/source/*.parquet", "VOCAB_URL": f"s3://{BUCKET}/source/vocab.bpe"}
    words = [LAB / "labexec", "env", *(f"{name}={value}" for name, value in given.items())]
    with said.open("ab") as file:
        command = [*words, str(PYTHON), "-u", "-m", "launch.run", *ARGUMENTS]
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, preexec_fn=warm.default_signals)


def test_a_sum_on_demand_ends_annealed_and_within_the_money(lab, tmp_path: Path):  # noqa: F811
    said = tmp_path / "said.txt"
    first = start(lab, said)
    wait("the training", lambda: "training: cluster" in said.read_text() or first.poll() is not None)
    assert first.poll() is None, said.read_text()[-3000:]
    first.send_signal(signal.SIGINT)  # as Ctrl-C: the machine goes on
    assert first.wait(120) == 130, said.read_text()[-3000:]
    second = start(lab, said)
    assert second.wait(1800) == 0, said.read_text()[-3000:]
    print(said.read_text())
    text = said.read_text()
    assert text.count("preparation: sky/prep-data.yaml") == text.count("training: sky/pretrain-8xa100.yaml") == 1
    assert "config.json" in "".join(lab.objects("runs/money/exports"))
    assert lab.objects("runs/money/course") == ["000001.json"]
    assert lab.report("money")["segments"][-1]["end"] == "finished"
    wait("no machine", lambda: lab.instances() == [], GONE_SECONDS)
    (train_seconds, _), *others = map(lab.bill, ("pretrain-8xa100", "prep-data", "evaluate", "export"))
    usd = train_seconds / 3600 * USD_PER_HOUR + sum(usd for _, usd in others)
    print(
        f"the clouds charge ${usd:.3f} of ${USD:g}: {100 * usd / USD:.1f} %, {train_seconds:.0f} s of training machine"
    )
    assert usd <= USD
