"""notebooks/run.ipynb: every cell runs, on a run with two machines, and what it prints about steps is true."""

import json
import math
import sys
from pathlib import Path

import pytest

from tests import launching, notebook, warm
from tests.golden import preempted_and_resumed

PATH = launching.REPOSITORY / "notebooks" / "run.ipynb"


@pytest.mark.slow
def test_every_cell_runs_and_the_model_learns(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("pandas", reason="pandas is not installed")
    run = preempted_and_resumed(tmp_path / "run")
    for file in (tmp_path / "run/metrics").rglob("*.jsonl"):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({"lr": 1e-3, "grad_norm": 1.0} | record) + "\n" for record in records))
    done = warm.run(
        [sys.executable, "-m", "tests.notebook", str(PATH)],
        cwd=launching.REPOSITORY,
        env={**launching.no_ranks(), "RUN_URL": run.url, "MPLBACKEND": "agg"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["RUN_URL"] == run.url
    assert found["random_loss"] == pytest.approx(math.log(50257), abs=0.3)
    assert found["losses"][-1] < found["losses"][0] - 3


def test_the_notebook_holds_no_outputs_and_is_whole():
    document = json.loads(PATH.read_text())
    code = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    assert len(code) == len(notebook.code_cells(PATH)) > 5
    assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]]
    assert len({cell["id"] for cell in document["cells"]}) == len(document["cells"])
    assert document["nbformat"] == 4
