"""SkyPilot's own loader and optimizer on the task files, with this repository's price snapshot as its catalog.

SkyPilot has an environment of its own, whose Python SKY_PYTHON names: `make test-sky`, which CI runs, makes it first.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from clouds.providers import snapshot
from core.task import MachineChoice, read_task
from costs.forecast import Assumptions, forecast_of
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parent.parent
PYTHON = os.environ.get("SKY_PYTHON")
TASKS = sorted((ROOT / "sky").glob("*.yaml"))

pytestmark = pytest.mark.skipif(not PYTHON, reason="SKY_PYTHON is not set: make test-sky")


def price(home: Path, *files: Path | str) -> subprocess.CompletedProcess:
    command = [PYTHON, "tests/sky_price.py", "clouds/catalog", *map(str, files)]
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def priced(tmp_path_factory) -> dict[str, dict]:
    done = price(tmp_path_factory.mktemp("home"), *TASKS)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_task_loads_and_has_a_price(priced):
    assert set(priced) == {path.stem for path in TASKS}
    assert all(task["usd_per_hour"] > 0 for task in priced.values())


def test_the_cheapest_machine_is_the_one_we_mean(priced):
    chosen = {name: (task["cloud"], task["instance_type"], task["spot"]) for name, task in priced.items()}
    assert chosen["pretrain-8xa100"] == ("Lambda", "gpu_8x_a100", False)
    assert chosen["pretrain-8xa100-spot"] == ("AWS", "p4d.24xlarge", True)
    assert chosen["pretrain-gh200"] == ("Lambda", "gpu_1x_gh200", False)
    assert chosen["prep-data"][1] == "c6i.2xlarge"


def test_gpus_choose_the_machine_that_our_own_parser_expects(tmp_path):
    """`make pretrain GPUS=…` gives --gpus to SkyPilot, and to checks and forecasts through core/task.py."""
    path = ROOT / "sky/pretrain-8xa100.yaml"
    for gpus, machine in (("A100:2", "gpu_2x_a100"), ("GH200", "gpu_1x_gh200")):
        (found,) = json.loads(price(tmp_path, f"{path}@{gpus}").stdout.splitlines()[-1]).values()
        assert (found["cloud"], found["instance_type"]) == ("Lambda", machine)
        task = read_task(str(path), {}, MachineChoice(gpus=gpus))
        rows = forecast_of(task, snapshot(), Assumptions(), None).rows
        assert rows[0].offer.instance_type == machine


def test_no_task_leaves_a_machine_up(priced):
    assert all(task["down"] for task in priced.values())


def test_the_price_ceiling_keeps_on_demand_out_of_the_spot_task(tmp_path):
    """The last candidates of the spot task are on demand, and too dear until the user raises max_hourly_cost."""
    text = (ROOT / "sky/pretrain-8xa100-spot.yaml").read_text()
    dear = tmp_path / "dear.yaml"
    dear.write_text("".join(line for line in text.splitlines(True) if "use_spot" not in line))
    refused = price(tmp_path, dear)
    assert refused.returncode != 0
    assert "ResourcesUnavailable" in refused.stderr
    dear.write_text(dear.read_text().replace("max_hourly_cost: 15", "max_hourly_cost: 30"))
    assert price(tmp_path, dear).returncode == 0


def test_a_misspelt_field_is_refused(tmp_path):
    """The loader does look: without this, the tests above could not fail."""
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((ROOT / "sky/prep-data.yaml").read_text().replace("use_spot:", "use_spots:"))
    done = price(tmp_path, wrong)
    assert done.returncode != 0
    assert "use_spots" in done.stderr
