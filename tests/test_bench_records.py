"""bench: each program can print the newest record that it wrote itself."""

import importlib
import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent.parent / "bench" / "results"
PROGRAMS = {"checkpoint": "checkpoint", "loader": "loader", "prep": "prep", "train-step": "train_step"}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_the_newest_record_is_printed(kind: str, capsys):
    program = importlib.import_module(f"bench.{PROGRAMS[kind]}")
    record = json.loads(sorted(RESULTS.glob(f"*-{kind}.json"))[-1].read_text())
    program._show(record)
    printed = capsys.readouterr().out
    for side in record.get("median") or record["runs"]:
        assert side in printed
