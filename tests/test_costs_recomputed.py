"""Ten ledgers of unusual shape: every figure of JSON, CSV, tables and page is what tests/recompute.py finds."""

import ast
import csv
import io
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from core.run.reader import read_run
from costs import page, render
from costs.report import build
from tests import recompute
from tests.golden import NOON, GoldenRun, mark, preempted_and_resumed, span, train_metric

LATER = NOON + 10 * 86400
FINISHED = {"event": "end", "reason": "finished", "step": 9}


def machine(run: GoldenRun, number: int, start: float, *events: dict, **facts) -> None:
    run.segment(number, start, list(events), **{"usd_per_hour": 7.77, "spot": True} | facts)
    steps = [step[0] for event in events if event["event"] == "span" for step in event["steps"]]
    if steps:
        run.metrics(number, [train_metric(step, start + 10 * index) for index, step in enumerate(steps)])


def steps(first: int, last: int, train: float = 9.9, wait: float = 0.7) -> list[list[float]]:
    return [[step, train + step / 100, wait] for step in range(first, last + 1)]


def fell_back_twice(run: GoldenRun) -> None:
    for number, restored, last in ((1, 0, 6), (2, 4, 8), (3, 2, 9)):
        start = NOON + 1000.3 * number
        own = steps(restored + 1, last)
        used = sum(step[1] for step in own)
        events = [span(start, start + 33.3, setup=21.1, restore=12.2), mark("restored", step=restored)]
        events.append(span(start + 33.3, start + 133.3, own, train=used, data_wait=0.7 * len(own)))
        machine(run, number, start, *events, *([FINISHED] if number == 3 else []), zone=f"us-east-1{'abc'[number - 1]}")


def shared_a_machine(run: GoldenRun) -> None:
    for number, start in ((1, NOON), (2, NOON + 47.5), (3, NOON + 90.25)):
        events = [span(start, start + 20, setup=20.0), span(start + 20, start + 101.5, train=81.5)]
        machine(run, number, start, *events, FINISHED, host="a" if number < 3 else "b")


def clock_went_back(run: GoldenRun) -> None:
    events = [span(NOON, NOON + 50, setup=50.0), span(NOON - 1000, NOON - 950, train=50.0)]
    events += [span(NOON + 50, NOON + 20, train=30.0), span(NOON + 44, NOON + 99.9, steps(1, 4), train=44.0)]
    machine(run, 1, NOON, *events, span(NOON + 44, NOON + 99.9, steps(1, 4), train=44.0))


def lost_objects(run: GoldenRun) -> None:
    events = [span(NOON + 30, NOON + 55.5, init=25.5), span(NOON + 155.5, NOON + 190, steps(1, 3), train=31.0)]
    machine(run, 1, NOON, *events, FINISHED, usd_per_hour=0.311)


def without_a_price(run: GoldenRun) -> None:
    machine(run, 1, NOON, span(NOON, NOON + 77, setup=70.0), FINISHED)
    machine(run, 2, NOON + 100, span(NOON + 100, NOON + 200, train=100.0), FINISHED, usd_per_hour=None, spot=None)
    machine(run, 3, NOON + 300, span(NOON + 300, NOON + 400, train=99.0), FINISHED, usd_per_hour=5.0, currency="EUR")


def over_midnight(run: GoldenRun) -> None:
    start = NOON + 12 * 3600 - 100
    events = [span(start, start + 40, setup=40.0), span(start + 40, start + 100, steps(1, 4), train=55.5)]
    events += [
        span(start + 100, start + 160, steps(5, 8), train=50.0, eval=10.0),
        span(start + 160, start + 190, train=30.0),
    ]
    machine(run, 1, start, *events)
    machine(run, 2, start + 500, span(start + 500, start + 599, steps(4, 9), train=90.0), FINISHED, region="eu-west-1")


def lost_its_mark(run: GoldenRun) -> None:
    preempted_and_resumed(run.path)
    path = run.path / "ledger/segment-000002/events/00000000-00000003.jsonl"
    first, _, *rest = path.read_text().splitlines(keepends=True)
    path.unlink()
    run.write("ledger/segment-000002/events/00000000-00000000.jsonl", first)
    run.write("ledger/segment-000002/events/00000002-00000003.jsonl", "".join(rest))


def without_a_heartbeat(run: GoldenRun) -> None:
    machine(run, 1, NOON, usd_per_hour=12.5)
    machine(run, 2, NOON + 60, span(NOON + 60, NOON + 160, setup=33.3, train=60.0), usd_per_hour=12.5)
    run.write("ledger/segment-000003/start.jsonl", '{"event":"start","ver')
    run.write("ledger/segment-000003/events/00000000-00000000.jsonl", "")


def paid_an_endpoint(run: GoldenRun) -> None:
    for number, paid in ((1, 1.27), (2, None), (3, 3.01)):
        start = NOON + 500 * number
        marks = [mark("api", usd=paid, answers=1)] if paid else []
        machine(
            run, number, start, span(start, start + 99, sample=44.4, distil=20.2), *marks, FINISHED, gpus_per_node=0
        )


def of_many_dollars_and_books_too_much(run: GoldenRun) -> None:
    events = [span(NOON, NOON + 60, setup=61.0, init=31.0), mark("restored", step=0)]
    events += [span(NOON + 60, NOON + 5460, steps(1, 9, 590.0), train=5350.0, data_wait=50.0)]
    machine(run, 1, NOON, *events, usd_per_hour=98765.4321, nodes=16, spot=False)


SHAPES = [
    fell_back_twice,
    shared_a_machine,
    clock_went_back,
    lost_objects,
    without_a_price,
    over_midnight,
    lost_its_mark,
    without_a_heartbeat,
    paid_an_endpoint,
    of_many_dollars_and_books_too_much,
]


class Tables(HTMLParser):
    """The rows of all tables of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "wbr":  # a place where a cell's text may be broken, inside of the cell
            return
        if tag == "tr":
            self.rows.append([])
        self._open = tag in ("td", "th")
        if self._open:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._open = False

    def handle_data(self, data):
        if self._open:
            self.rows[-1][-1] += data


def money(line: dict, places: int) -> str:
    if line["usd"] is None:
        return "?"
    low, high = f"{line['usd']:,.{places}f}", f"{line['usd_most']:,.{places}f}"
    return (low if low == high else f"{low} to {high}") + ("" if line["complete"] else " + ?")


COLUMNS = {"phase": "x_Phase", "segment": "x_Segment", "stage": "x_Stage", "day": "ChargePeriodStart"}
COLUMNS |= {"cloud": "ProviderName", "region": "RegionId", "zone": "AvailabilityZone", "instance": "ResourceType"}
MARKETS = {"Standard": "on demand", "Dynamic": "spot"}


def charges_by(rows: list[dict[str, str]], table: str) -> dict[str, tuple[list[str], float]]:
    """The amounts and the seconds of the CSV's charges by line of a table."""
    found: dict[str, tuple[list[str], float]] = {}
    for row in rows:
        if table == "total":
            name = "total"
        elif table == "market":
            name = MARKETS.get(row["PricingCategory"], "?")
        else:
            name = row[COLUMNS[table]] or "?"
        name = name.partition("T")[0] if table == "day" else name
        amounts, seconds = found.get(name, ([], 0.0))
        found[name] = ([*amounts, row["BilledCost"]], seconds + 3600 * float(row["ConsumedQuantity"] or 0))
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_every_figure_is_what_another_computation_finds(shape: Callable[[GoldenRun], None], tmp_path: Path):
    run = GoldenRun(tmp_path)
    shape(run)
    report = build(read_run(run.url), LATER)
    wanted = recompute.recompute(tmp_path, LATER)
    places = wanted["places"]
    found = json.loads(render.as_json([report]))
    rows = list(csv.DictReader(io.StringIO(render.as_csv([report]))))
    markdown = [[c.strip() for c in line.strip("|").split("|")] for line in render.as_markdown(report).splitlines()]
    shown = {"markdown": markdown, "page": Tables(page.as_html(report, LATER)).rows}

    assert found["places"] == places
    tables = {"phase": (found["phases"], wanted["phases"]), "segment": (found["segments"], wanted["segments"])}
    tables["total"] = ([found["total"]], {"total": wanted["total"]})
    tables |= {group: (found["by"][group], lines) for group, lines in wanted["by"].items()}
    for name, (lines, ours) in tables.items():
        assert [line["name"] for line in lines] == list(ours), name
        in_csv = charges_by(rows, name)
        for line in lines:
            own = ours[line["name"]]
            assert line["seconds"] == pytest.approx(own["seconds"], abs=1e-6)
            assert (line["usd"], line["usd_most"]) == (own["usd"], own["usd_most"]), (name, line["name"])
            assert line["complete"] == own["complete"]
            amounts, seconds = in_csv.get(line["name"], ([], 0.0))
            assert ("?" in amounts) != own["complete"]
            known = [float(amount) for amount in amounts if amount != "?"]
            # The charges are not rounded; the lines of a table are, so that they add up.
            assert math.fsum(known) == pytest.approx(own["usd"] or 0.0, abs=10**-places)
            assert seconds == pytest.approx(own["seconds"], abs=1e-6)
            if name in ("phase", "segment", "total") or len(lines) > 1:
                label = line["name"].replace("_", " ") if name == "phase" else line["name"]
                for form, printed in shown.items():
                    title = f"**{label}**" if form == "markdown" and name == "total" else label
                    text = f"**{money(own, places)}**" if form == "markdown" and name == "total" else money(own, places)
                    assert any(title in cells and text in cells for cells in printed), (form, name, label, text)
    assert [line["steps_lost"] for line in found["segments"]] == wanted["steps_lost"]
    for name, value in wanted["units"].items():
        assert found["units"][name] == (value if value is None else pytest.approx(value, rel=1e-9)), name


def test_the_other_computation_uses_none_of_our_code():
    tree = ast.parse(Path(recompute.__file__).read_text())
    used = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    used |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert used <= {"datetime", "itertools", "json", "math", "sys", "fractions", "pathlib"}
