"""bench.ladder: each row keeps the switches above it, and every row trains the same model on the same tokens."""

import json
import math
import sys
from pathlib import Path

import pytest

from bench import harness, ladder
from tests import launching, warm


def test_a_row_keeps_the_switches_above_it():
    found = [ladder.switches_of(rung.name) for rung in ladder.RUNGS]
    assert found[0] == ladder.Switches()
    for before, after, rung in zip(found, found[1:], ladder.RUNGS[1:], strict=False):
        changed = {name for name in vars(after) if getattr(after, name) != getattr(before, name)}
        assert changed == set(rung.changes), rung.name
    with pytest.raises(ValueError, match="no row fp16"):
        ladder.switches_of("fp16")


def test_the_table_compares_with_the_row_above_and_with_the_first(capsys: pytest.CaptureFixture):
    def runs(*rates: float) -> list[dict]:
        return [{"tokens_per_second": rate, "mfu": None, "peak_bytes": 2e9} for rate in rates]

    results = {
        **harness.header("torch"),
        "device": "a device",
        "parameters": 1e6,
        "left_out": ["tf32"],
        "runs": {"fp32": runs(90, 100, 500), "bf16": runs(200, 200, 200), "compile": runs(300, 1, 900)},
    }
    ladder.show(results)
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("│")] for line in lines if "│" in line]
    assert [row[2:5] for row in cells] == [["100", "", "1.00"], ["200", "2.00", "2.00"], ["300", "1.50", "3.00"]]
    assert "tf32" in " ".join(lines)


@pytest.mark.slow
def test_every_row_is_rehearsed_on_a_cpu(tmp_path: Path):
    command = [sys.executable, "-m", "bench.ladder", "--rehearse", "--rounds=1", "--steps=4", "--warm-up=1"]
    done = warm.run([*command, f"--out={tmp_path}/ladder.json"], cwd=launching.REPOSITORY)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "ladder.json").read_text())
    assert [*record["runs"]] == [rung.name for rung in ladder.RUNGS if not rung.needs_cuda]
    for name, [run] in record["runs"].items():
        assert run["loss"] < math.log(50304) - 0.01, name  # five steps on one batch
        assert run["tokens_per_step"] == (64 if name in ("larger-micro-batch", "trainer") else 32), name
