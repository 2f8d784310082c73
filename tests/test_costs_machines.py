"""Each machine is billed once: among runs, trainers and nodes; an end that no source knows is a range."""

import json
from pathlib import Path

import pytest

from clouds import catalog
from clouds.base import Cloud, MachineRecord, Unavailable
from clouds.providers import CLOUDS
from core.run.reader import read_run
from costs import discover, tables
from costs.report import CostReport, build
from costs.sources import ask_others
from tests.golden import NOON, GoldenRun, span

LATER = NOON + 86400
CLUSTER = {"cluster": "gpt2"}


@pytest.fixture(autouse=True)
def _machines_alone(monkeypatch):
    """Disks and addresses are in tests/test_costs_beside.py."""
    monkeypatch.setattr(catalog, "extras", lambda _: {})
    discover._ledgers_in.cache_clear()


class Silent(Cloud):
    """AWS without an answer to anything but its terms of billing."""

    billing = CLOUDS["aws"].billing


def machine(start: float, end: float | None, **known) -> MachineRecord:
    return MachineRecord("gpt2", start, end, "SkyPilot", usd_per_hour=36.0, **{"cloud": "aws", **known})


def used(folder: Path, *times: tuple[float, float], killed: bool = False, **facts) -> GoldenRun:
    """A run with a segment per interval, at a cent a second."""
    run = GoldenRun(folder)
    for number, (start, end) in enumerate(times, 1):
        events = [span(start, end, train=end - start)]
        if not killed:
            events.append({"event": "end", "time": end, "reason": "finished"})
        run.segment(number, start, events, **{"usd_per_hour": 36.0, "host": "a", "launcher": CLUSTER} | facts)
    return run


def report(run: GoldenRun, *records: MachineRecord, now: float = LATER, clouds=None, **options) -> CostReport:
    read = read_run(run.url)
    clouds = {"aws": Silent()} if clouds is None else clouds
    outside = ask_others(read, {}, now, records=lambda _: list(records), jobs=list, clouds=clouds, **options)
    return build(read, now, outside=outside)


def usd(found: CostReport) -> dict[str, float]:
    return {line.name: line.usd for line in found.phases if line.usd}


def amount(found: CostReport) -> tuple[float, float, bool]:
    return found.total.usd, found.total.usd_most, found.total.complete


def test_runs_that_take_turns_on_a_machine_pay_it_once(tmp_path: Path):
    first = used(tmp_path / "runs/a", (NOON, NOON + 3000))
    second = used(tmp_path / "runs/b", (NOON + 3000, NOON + 7000))
    whole = machine(NOON - 300, NOON + 7200)
    one, two = report(first, whole), report(second, whole)
    assert usd(one) == {"provision": 3.00, "train_kept": 30.00, "idle_until_down": 2.00}
    assert usd(two) == {"train_kept": 40.00}
    assert one.total.usd + two.total.usd == 75.00
    assert "other runs used gpt2 too" in " ".join(one.notes)
    assert "another run asked for gpt2, on which segment 1 ran" in " ".join(two.notes)


def test_runs_that_use_a_machine_at_once_divide_the_time_that_they_share(tmp_path: Path):
    first = used(tmp_path / "runs/a", (NOON, NOON + 3000))
    second = used(tmp_path / "runs/b", (NOON + 2000, NOON + 4000))
    whole = machine(NOON - 100, NOON + 4100)
    one, two = report(first, whole), report(second, whole)
    assert usd(one) == {"provision": 1.00, "train_kept": 25.00, "idle_until_down": 1.00}
    assert usd(two) == {"train_kept": 15.00}
    assert two.ledger_usd == 20.00


def test_two_trainers_of_a_run_on_one_machine_pay_it_once(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 100), (NOON + 40, NOON + 140), killed=True)
    both = report(run, machine(NOON, NOON + 140))
    assert (both.total.usd, both.ledger_usd) == (1.40, 2.00)
    assert [line.usd for line in both.segments] == [0.70, 0.70]
    assert "they shared a machine" in " ".join(both.notes)
    apart = used(tmp_path / "apart/a", (NOON, NOON + 100))
    apart.segment(2, NOON + 40, [span(NOON + 40, NOON + 140, train=100.0)], usd_per_hour=36.0, host="b")
    assert build(read_run(apart.url), LATER).total.usd == 2.00


def test_a_machine_that_never_opened_the_run_belongs_to_the_run_that_launched_it(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 100))
    own, long_ago = machine(NOON, NOON + 100), (NOON - 9000, NOON - 8000)
    assert report(run, own, machine(*long_ago, run=run.url)).total.usd == 11.00
    others = report(run, own, machine(*long_ago, run=f"{tmp_path}/runs/b"))
    assert (others.total.usd, others.notes) == (1.00, [])
    unknown = report(run, own, machine(*long_ago))
    assert unknown.total.usd == 1.00
    assert "no ledger in this bucket says for which run, so it is not counted" in unknown.notes[0]
    just_before = report(run, own, machine(NOON - 1500, NOON - 500))
    assert usd(just_before) == {"provision": 10.00, "train_kept": 1.00}


def test_a_machine_that_is_used_again_the_next_day_is_idle_in_between(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 100), (NOON + 86400, NOON + 86500))
    found = report(run, machine(NOON, NOON + 86500), now=NOON + 10 * 86400)
    assert usd(found) == {"train_kept": 2.00, "idle": 863.00}
    assert [line.name for line in found.by["day"]] == ["2026-11-20", "2026-11-21"]


def test_nodes_with_a_ledger_each_have_their_own_boot_and_end(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 100))
    run.segment(
        2,
        NOON + 10,
        [span(NOON + 10, NOON + 60, train=50.0), {"event": "end", "time": NOON + 60, "reason": "finished"}],
        usd_per_hour=36.0,
        host="b",
        launcher=CLUSTER,
    )
    three = machine(NOON - 100, NOON + 200, nodes=3)
    found = report(run, MachineRecord(**vars(three) | {"usd_per_hour": 108.0}))
    assert found.total.usd == 9.00
    assert "1 of 3 nodes of gpt2 wrote no ledger" in " ".join(found.notes)


def record_of_node(
    run: GoldenRun, name: str, host: str, start: float, seen: float, ended: float | None, alive: float | None = None
) -> None:
    document = {"started_at": start, "time": seen, "usd_per_hour": 36.0, "host": host}
    run.write(f"machines/{name}/start.json", json.dumps(document))
    for kind, at in (("end", ended), ("alive", alive)):
        if at:
            run.write(f"machines/{name}/{kind}.json", json.dumps({"time": at}))


def test_a_refused_machine_is_paid_and_one_without_an_end_is_a_range(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 100), launcher=None)
    record_of_node(run, "one", "a", NOON, NOON + 9, NOON + 100)  # that of the segment
    record_of_node(run, "two", "b", NOON - 500, NOON - 400, NOON - 300)
    assert amount(report(run)) == (3.00, 3.00, True)
    record_of_node(run, "three", "c", NOON - 900, NOON - 800, None)
    assert amount(report(run)) == (4.00, 22.00, True)  # killed within the 30 minutes that a start may take
    assert "machine c: was paid for 1 min 40 s but opened no segment" in " ".join(report(run).notes)


def test_the_end_that_a_node_records_closes_the_range(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 100), killed=True, launcher=None)
    found = report(run)
    assert amount(found) == (1.00, 1.03, True)
    assert "$1.00 to 1.03 is the bill as known; $1.00 by the ledger; a range" in tables.sums(found)
    record_of_node(run, "one", "a", NOON, NOON + 9, NOON + 102)
    assert amount(report(run)) == (1.02, 1.02, True)


def test_a_source_that_gives_no_answer_leaves_the_bill_incomplete(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 100), spot=True)
    offline = report(run, offline=True)
    assert amount(offline) == (1.00, 1.00, False)
    assert tables.headline(offline).endswith("$1.00 + ?")
    assert len(offline.missing) == 2
    assert "USD per billion tokens" in dict(tables.unit_rows(offline))
    assert [line.complete for line in offline.phases] == [True] * len(offline.phases)

    class Refusing(Silent):
        def instances(self, clusters, region):
            raise Unavailable("NoCredentialsError")

    found = report(run, machine(NOON, NOON + 100, region="us-east-1"), clouds={"aws": Refusing()})
    assert (found.total.complete, found.missing) == (
        False,
        ["start and end of the instances: NoCredentialsError"],
    )


def test_lambda_bills_no_boot_for_certain_and_whole_minutes(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 1000), cloud="lambda")
    found = report(run, machine(NOON - 100, NOON + 1000, cloud="lambda"), clouds={})
    assert usd(found) == {"train_kept": 10.00}
    assert amount(found) == (10.00, 11.60, True)  # a boot of 100 s, and a minute that is begun
    assert {line.name: line.usd_most for line in found.phases if line.usd_most} == {
        "provision": 1.00,
        "train_kept": 10.00,
        "billing_unit": 0.60,
    }


def test_an_end_that_the_machine_itself_brought_about_is_a_range(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 1000))
    soon = report(run, machine(NOON, NOON + 1200, idle_seconds=120.0))
    assert amount(soon) == (10.60, 12.00, True), "from the first minute in which SkyPilot's autostop may end it"
    assert not soon.notes
    late = report(run, machine(NOON, NOON + 4600, idle_seconds=120.0))
    assert amount(late) == (10.60, 46.00, True)
    assert "was to end itself 2 min 00 s after its last job, and was found gone 1 h 00 min after it" in late.notes[0]
    exact = report(run, machine(NOON, NOON + 1150, idle_seconds=120.0, exact=True))
    assert amount(exact) == (11.50, 11.50, True)


def test_signs_of_life_after_the_program_tell_when_the_machine_ended(tmp_path: Path):
    """The last one, and less than two intervals of ten seconds more, whenever SkyPilot notices the end."""
    run = used(tmp_path / "runs/a", (NOON, NOON + 1000))
    record_of_node(run, "one", "a", NOON, NOON + 9, NOON + 1000, alive=NOON + 1100)
    soon = report(run, machine(NOON, NOON + 1200, idle_seconds=120.0))
    assert usd(soon) == {"train_kept": 10.00, "idle_until_down": 1.00}
    assert (amount(soon), soon.notes) == ((11.00, 11.20, True), [])
    assert amount(report(run, machine(NOON, NOON + 1105))) == (11.00, 11.05, True)
    late = report(run, machine(NOON, NOON + 4600, idle_seconds=120.0))
    assert amount(late) == (11.00, 11.20, True)
    assert "gpt2 was found gone 58 min 20 s after its last sign of life, which is taken for its end" in late.notes[0]
    assert amount(report(run, machine(NOON, NOON + 1150, exact=True))) == (11.50, 11.50, True), "the cloud knows better"
    assert amount(report(run)) == (11.00, 11.20, True), "without SkyPilot"
    listed = report(run, machine(NOON, None), now=NOON + 2000)
    assert amount(listed) == (11.00, 20.00, True)
    assert "gpt2 is still listed 15 min 00 s after its last sign of life" in listed.notes[0]


def test_signs_of_life_after_a_kill_are_paid_too(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 1000), killed=True, cloud="lambda")
    record_of_node(run, "one", "a", NOON, NOON + 9, None, alive=NOON + 1100)
    found = report(run, machine(NOON, NOON + 1130, cloud="lambda"), clouds={})
    assert amount(found) == (11.00, 11.80, True)  # two intervals, and a minute that is begun
    # So soon after the last heartbeat, the program might still run, but only an ended one gives signs of life.
    soon = report(run, machine(NOON, None, cloud="lambda"), clouds={}, now=NOON + 1110)
    assert amount(soon) == (11.00, 11.10, True)


def test_a_machine_that_is_kept_up_gives_no_signs_after_an_hour(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 1000))
    record_of_node(run, "one", "a", NOON, NOON + 9, NOON + 1000, alive=NOON + 4595)
    assert amount(report(run, machine(NOON, NOON + 7000, exact=False))) == (70.00, 70.00, True)


def test_a_machine_of_seconds_costs_the_first_minute(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 20))
    assert usd(report(run, machine(NOON - 10, NOON + 30, exact=True))) == {
        "provision": 0.1000,
        "train_kept": 0.2000,
        "idle_until_down": 0.1000,
        "billing_unit": 0.2000,
    }


def test_every_table_adds_up_with_its_range(tmp_path: Path):
    run = used(tmp_path / "runs/a", (NOON, NOON + 1000), (NOON + 2000, NOON + 2777), killed=True, cloud="lambda")
    found = report(run, machine(NOON - 77, NOON + 1100, cloud="lambda"), machine(NOON + 1900, NOON + 2800), clouds={})
    for rows in (found.phases, found.segments, *found.by.values()):
        for end in ("usd", "usd_most"):
            assert round(sum(getattr(line, end) for line in rows), found.places) == getattr(found.total, end)
