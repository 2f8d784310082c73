"""bench: each program can print the newest record that it wrote itself."""

import importlib
import json
from pathlib import Path

import pytest

from bench import tables

RESULTS = Path(__file__).parent.parent / "bench" / "results"
PROGRAMS = {"checkpoint": "checkpoint", "loader": "loader", "prep": "prep", "train-step": "train_step"}


def test_a_gpu_s_record_gives_rows_of_the_table():
    def step(speed: float) -> dict:
        return {"results": [{"tokens_per_second": speed, "mfu": 0.41, "device": "NVIDIA H200"}]}

    measurements = {"ours-32": step(1e5), "ours-64": step(4.2e5), "nanoGPT-64": step(4e5), "attention": step(0)}
    rows = tables._gpu_speed({"measurements": measurements | {"plain-compiled-64": {"results": []}}})
    what = "training step, gpt2-124m, NVIDIA H200, 64 sequences"
    assert rows == [(what, "420k tokens/s, MFU 41.0 %", "400k (nanoGPT)", pytest.approx(1.05))]


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_newest_record_is_printed(kind: str, capsys):
    program = importlib.import_module(f"bench.{PROGRAMS[kind]}")
    record = json.loads(sorted(RESULTS.glob(f"*-{kind}.json"))[-1].read_text())
    program.show(record)
    printed = capsys.readouterr().out
    for side in record.get("median") or record["runs"]:
        assert side in printed
