"""trainer.metrics: all metrics of runs in one table, as CSV, JSON and parquet."""

import csv
import io
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from core.errors import ConfigError
from core.run import measured
from tests import launching, warm
from tests.golden import NOON, preempted_and_resumed
from trainer import metrics

SAMPLE = {"kind": "sample", "time": NOON + 737, "step": 12, "prompt": "The sea", "text": "=\x1b[2Jone,\ntwo"}
NORMS = {"kind": "norms", "time": NOON + 738, "step": 12, "weights": {"mlp": 2.0}, "largest_activations": [3.0, None]}


@pytest.fixture
def run_url(tmp_path: Path) -> str:
    """Two machines; steps 6 to 10 were done twice."""
    run = preempted_and_resumed(tmp_path / "golden")
    file = next((tmp_path / "golden/metrics/segment-000002").iterdir())
    old = file.read_text()
    file.unlink()
    lines = old + json.dumps(SAMPLE) + "\n" + json.dumps(NORMS) + "\n"
    count = lines.count("\n")
    run.write(f"metrics/segment-000002/00000000-{count - 1:08d}.jsonl", lines)
    return run.url


def test_the_table_holds_each_record_that_counts_once(run_url: str):
    rows = measured.rows(measured.read_all([run_url]))
    train = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, 13))
    assert [row["loss"] for row in train] == pytest.approx([5.0 - step / 10 for step in range(1, 13)])
    # The first machine takes a cent a second and ran for 372 s, the second half a cent.
    assert train[0]["usd"] == pytest.approx(0.01 * 171)
    assert (train[5]["machine_seconds"], train[5]["usd"]) == pytest.approx((372 + 102.2, 3.72 + 0.511))
    [norms] = [row for row in rows if row["kind"] == "norms"]
    assert (norms["weights.mlp"], norms["largest_activations.0"], norms["largest_activations.1"]) == (2.0, 3.0, None)
    assert norms["loss"] is None
    assert len({tuple(row) for row in rows}) == 1  # the same columns in the same order


def test_csv_json_and_parquet_hold_the_same_table(run_url: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert metrics.main([run_url, "--json"]) == 0
    from_json = json.loads(capsys.readouterr().out)
    assert from_json == measured.rows(measured.read_all([run_url]))

    assert metrics.main([run_url, "--parquet", f"--out={tmp_path}/all.parquet"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/all.parquet\n"
    assert pq.read_table(tmp_path / "all.parquet").to_pylist() == from_json

    # Another process, because the bytes of standard output are its product.
    command = [sys.executable, "-m", "trainer.metrics", run_url, "--csv"]
    done = warm.run(command, cwd=launching.REPOSITORY, env={**launching.no_ranks(), "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    from_csv = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [float(row["loss"]) for row in from_csv if row["loss"]] == [row["loss"] for row in from_json if row["loss"]]
    [sample] = [row["text"] for row in from_csv if row["kind"] == "sample"]
    assert sample == "'=\\x1b[2Jone,\ntwo"  # neither a formula nor an escape of the terminal


def test_two_runs_are_told_apart(run_url: str, tmp_path: Path):
    preempted_and_resumed(tmp_path / "other")
    rows = measured.rows(measured.read_all([run_url, str(tmp_path / "other")]))
    assert {row["run"] for row in rows} == {"golden", "other"}


def test_a_column_of_many_types_becomes_text():
    rows = [{"step": 1, "x": 1}, {"step": 2, "x": 0.5}, {"step": 3, "x": None}]
    table = pq.read_table(io.BytesIO(metrics.as_parquet(rows)))
    assert table["x"].to_pylist() == [1.0, 0.5, None]
    table = pq.read_table(io.BytesIO(metrics.as_parquet([*rows, {"step": 4, "x": "a"}, {"step": 2**63, "x": "b"}])))
    assert table["x"].to_pylist() == ["1", "0.5", None, "a", "b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "give one of --csv, --json and --parquet"),
        (["run", "--csv", "--json"], "give one of --csv, --json and --parquet"),
        (["run", "--cvs"], "--cvs: unknown flag; known ones: --csv, --json, --parquet, --out=FILE"),
        (["--csv"], "no run named"),
        (["run", "--csv", "--out=s3://b/x"], "--out is 's3://b/x', which is not a path of this machine"),
    ],
)
def test_wrong_arguments_are_said(arguments: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        metrics.parse(arguments)


def test_parquet_without_pyarrow_is_refused(run_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "old.parquet").write_text("old")
    with pytest.raises(ConfigError, match=r"--parquet needs pyarrow; run `pip install pyarrow`"):
        metrics.main([run_url, "--parquet", f"--out={tmp_path}/old.parquet"])
    assert (tmp_path / "old.parquet").read_text() == "old"
