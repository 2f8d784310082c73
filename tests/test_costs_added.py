"""Bills from elsewhere: stored once, a line of the report that adds up, and one sentence for what is no bill."""

import json
import time
from pathlib import Path

import pytest

from core.errors import ConfigError, RunError
from core.run.reader import read_run
from costs import command
from costs.report import CostReport, build
from costs.sources import ask_others
from tests.golden import preempted_and_resumed


def report_on(url: str) -> CostReport:
    run, now = read_run(url), time.time()
    return build(run, now, outside=ask_others(run, {}, now, offline=True))


def dollars(report: CostReport, phase: str) -> float | None:
    return next((line.usd for line in report.phases if line.name == phase), None)


def test_a_bill_is_a_line_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture):
    url = preempted_and_resumed(tmp_path / "run").url
    before = report_on(url)
    command.main(["add", url, "Hugging Face", "2.00", "--date=2026-11-20"])
    command.main(["add", url, "Label shop", "$10.5", "--date=2026-11-21"])
    assert "$2.00, Hugging Face" in capsys.readouterr().out
    after = report_on(url)
    assert dollars(before, "elsewhere") is None
    assert dollars(after, "elsewhere") == pytest.approx(12.5)
    assert after.total.usd == pytest.approx(before.total.usd + 12.5)
    assert sum(line.usd for line in after.phases) == pytest.approx(after.total.usd)
    assert "2026-11-21" in {line.name for line in after.by["day"]}
    assert {"Hugging Face, added by hand", "Label shop, added by hand"} <= {each.source for each in after.origins}


def test_a_bill_is_not_added_twice(tmp_path: Path):
    url = preempted_and_resumed(tmp_path / "run").url
    same = ["add", url, "Hugging Face", "2.00", "--date=2026-11-20"]
    command.main(same)
    with pytest.raises(RunError, match=r"a bill of Hugging Face over \$2\.00 of 2026-11-20 already exists; if it is"):
        command.main(same)
    command.main([*same[:-1], "--date=2026-11-22"])
    assert dollars(report_on(url), "elsewhere") == pytest.approx(4.0)


def test_what_is_no_bill_is_left_out_and_named(tmp_path: Path):
    run = preempted_and_resumed(tmp_path / "run")
    good = {"format": "bill", "version": 1, "supplier": "x", "usd": 1.0, "time": 1.79e9}
    for number, damage in enumerate(({"usd": -1}, {"usd": "1"}, {"time": None}, {"version": 2}, {"supplier": 3})):
        run.write(f"bills/{number}.json", json.dumps(good | damage))
    run.write("bills/x.json", "{")
    found = report_on(run.url)
    assert dollars(found, "elsewhere") is None
    assert sum("not a bill" in note for note in found.notes) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["RUN", "Hugging Face"],
            'give a run, a supplier and dollars: python cost_report.py add RUN_URL "Hugging Face"',
        ),
        (["RUN", "x", "two"], "the dollars are 'two', must be a number above zero"),
        (["RUN", "x", "0"], "the dollars are '0', must be a number above zero"),
        (["RUN", "x", "nan"], "the dollars are 'nan', must be a number above zero"),
        (["RUN", " ", "2"], "the supplier is ' ', must be a name"),
        (["RUN", "x", "2", "--date=today"], "--date is 'today', must be a day such as 2026-11-30"),
        (["RUN", "x", "2", "--day=2026-11-30"], "give a run, a supplier and dollars"),
    ],
)
def test_bad_input_is_one_sentence_and_stores_nothing(arguments: list[str], said: str, tmp_path: Path):
    url = preempted_and_resumed(tmp_path / "run").url
    with pytest.raises(ConfigError) as error:
        command.main(["add", url, *arguments[1:]])
    assert said in str(error.value)
    assert not (tmp_path / "run/bills").exists()
    with pytest.raises(RunError, match="holds no run to report on"):
        command.main(["add", str(tmp_path / "none"), "x", "2"])
