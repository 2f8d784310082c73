"""Every consumer of a run gives the same dollars, kept steps and lost work."""

import json
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from core.run.measured import read_measured
from core.run.reader import Detail, read_run, spent_usd_at_most
from costs import page, render
from costs.report import build
from launch.spent import spent_line
from tests.golden import NOON, GoldenRun, mark, preempted_and_resumed, span, train_metric
from trainer.weights import card

LATER = NOON + 86400


def restored_twice(folder: Path) -> GoldenRun:
    """The second machine found its newest checkpoint damaged and fell back: its last `restored` mark counts."""
    run = GoldenRun(folder)
    steps = [[step, 10.0, 0.0] for step in range(1, 7)]
    run.segment(
        1,
        NOON,
        [mark("restored", step=0), span(NOON, NOON + 60, steps, train=60.0)],
        usd_per_hour=36.0,
    )
    again = [[step, 10.0, 0.0] for step in range(3, 9)]
    run.segment(
        2,
        NOON + 100,
        [
            mark("restored", step=5),
            mark("restored", step=2),
            span(NOON + 100, NOON + 160, again, train=60.0),
            {"event": "end", "time": NOON + 160, "reason": "finished", "step": 8},
        ],
        usd_per_hour=72.0,
    )
    run.metrics(1, [train_metric(step, NOON + 10 * step) for step in range(1, 7)])
    run.metrics(2, [train_metric(step, NOON + 100 + 10 * (step - 2)) for step in range(3, 9)])
    return run


def killed_three_times(folder: Path) -> GoldenRun:
    run = GoldenRun(folder)
    for number in (1, 2, 3):
        begun = NOON + 1000 * number
        steps = [[step, 5.0, 1.0] for step in range(2 * number - 1, 2 * number + 3)]
        run.segment(
            number,
            begun,
            [
                span(begun, begun + 7, setup=4.0, init=3.0),
                mark("restored", step=2 * number - 2),
                span(begun + 7, begun + 33.3, steps, train=21.0, data_wait=4.0, checkpoint=1.3),
            ],
            usd_per_hour=7.77,
        )
        run.metrics(number, [train_metric(int(step), begun + 7 + 6 * at) for at, (step, *_) in enumerate(steps, 1)])
    return run


@pytest.mark.parametrize("golden", [preempted_and_resumed, restored_twice, killed_three_times])
def test_all_consumers_agree(golden: Callable[[Path], GoldenRun], tmp_path: Path):
    url = golden(tmp_path / "run").url
    report = build(read_run(url), LATER)
    usd = read_run(url).usd
    cents = f"${usd:.{report.places}f}"
    # Dollars: ledger, report, JSON, page, status, card, plots.
    assert {read_run(url, detail).usd for detail in Detail} == {usd}
    assert report.total.usd == pytest.approx(usd, abs=10**-report.places / 2)
    assert json.loads(render.as_json([report]))["total"]["usd"] == report.total.usd
    assert cents in page.as_html(report, LATER)
    assert f"${usd:.2f} so far" in spent_line(url)
    opened = types.SimpleNamespace(run_url=url, step=10**9, data_url=None)
    facts = card.gather(opened, [])
    assert facts.spent_usd == usd
    measured = read_measured(url)
    assert measured.points("train")[-1].usd <= usd
    assert usd <= spent_usd_at_most(url) <= usd + len(measured.segments) * 3 * 72 / 3600
    # Kept steps and lost work.
    kept = [point.step for point in measured.points("train")]
    assert kept == [step for step, _ in facts.train] == list(range(1, kept[-1] + 1))
    assert report.units.last_step == kept[-1]
    assert sum(line.steps_kept for line in report.segments) == len(kept)
    lost = measured.lost(LATER)
    assert [line.steps_lost for line in report.segments] == [each.steps for each in lost.values()]
    [line] = [line for line in report.phases if line.name == "train_lost"]
    assert line.seconds == pytest.approx(sum(each.seconds for each in lost.values()))


def test_the_last_restored_mark_counts(tmp_path: Path):
    run = read_run(restored_twice(tmp_path).url, Detail.ALL)
    assert run.boundaries()[0] == 2
    assert [each.steps for each in run.lost(LATER).values()] == [4, 0]
    assert [(point.step, round(point.usd, 2)) for point in run.points("train")][:4] == [
        (1, 0.10), (2, 0.20), (3, 0.60 + 0.20), (4, 0.60 + 0.40),
    ]  # fmt: skip
