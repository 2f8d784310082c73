"""`cost_report.py plan`: the sums by hand, the law, what is refused, and that the printed command makes the plan."""

import csv
import dataclasses
import json
import math
import re
import shlex
import socket
import xml.dom.minidom
from datetime import date
from pathlib import Path

import pytest

from clouds import catalog, providers
from clouds.base import Offer
from clouds.catalog import Catalog, fits
from core.errors import ConfigError
from core.settings import loader
from core.settings.training import PretrainConfig
from core.task import MachineChoice, machine_choice, read_task
from costs import command, discover
from costs.forecast import Assumptions, forecast_of
from costs.plan import chart, law, machines, own, planner, recipes, view
from costs.plan import command as plan_command
from costs.plan.law import Law, Recipe
from costs.plan.machines import Machine, Wanted
from costs.plan.planner import Prices, Question
from costs.throughput import Measured
from tests.conftest import REPOSITORY
from tests.test_costs_estimate import offer

TODAY = date(2026, 11, 30)
RATES = discover.RATES["aws"]  # $0.023 per GB and month, $0.09 per GB of egress
ASSUME = Assumptions(
    provision_seconds=150, image_seconds=180, setup_seconds=30, ready_seconds=90, checkpoint_blocked_seconds=0.3,
    preemptions_per_hour=0.25, controller_usd_per_hour=0.2,
)  # fmt: skip
LAW = Law(
    date="2026-11-30",
    constants={"E": 2.06, "A": 0.409, "a": 0.255, "B": 0.606, "b": 0.296},
    gain=1.52,
    recipes={
        "track3-muon": Recipe(k=1.55, runs=2, smallest=84_934_656, largest=84_934_656, family="muon"),
        "gpt2-adamw": Recipe(k=0.27, runs=1, smallest=84_934_656, largest=84_934_656, family="adamw"),
        "muon-modern": Recipe(k=1.0, runs=2, smallest=84_934_656, largest=1_472_200_704, family="muon"),
        "adam-modern": Recipe(k=0.66, runs=2, smallest=84_934_656, largest=1_472_200_704, family="adamw"),
    },
)
GH200 = offer(cloud="lambda", zone=None, instance_type="gpu_1x_gh200", accelerator="GH200", accelerators=1)
A100S = offer(cloud="lambda", zone=None, instance_type="gpu_8x_a100", accelerator="A100", accelerators=8)
H100S = offer(cloud="aws", zone="usw2-az1", instance_type="p5.48xlarge", accelerator="H100", accelerators=8)


def machine(of: Offer, usd: float, spot: bool = False, idle: float = 120.0) -> Machine:
    return Machine("sky/x.yaml", (), of, spot, usd, usd, usd, TODAY, 0.0 if spot else idle)


MACHINES = {
    "GH200": machine(GH200, 2.29),
    "A100": machine(A100S, 15.92),
    "H100 spot": machine(H100S, 12.97, spot=True),
}


def answer(usd: float, *which: str, **fields) -> planner.Answer:
    buyers, refused = planner.buyers([MACHINES[name] for name in which], Prices(ASSUME, RATES))
    return planner.plan(Question(usd, **fields), buyers, refused, LAW)


# --- nine plans by hand ------------------------------------------------------------------------------------------

# Layers and width of the speedrun recipe; dollars per hour, FLOP/s at the published MFU, and what is paid beside.
SHAPES = {"124M": (12, 768), "254M": (12, 1024), "350M": (24, 1024), "774M": (36, 1280), "1.5B": (52, 1536)}
RENTED = {
    "GH200": {"usd": 2.29, "speed": 0.33 * 989e12, "idle": 120, "is_spot": False, "egress": 0.09},
    "A100": {"usd": 15.92, "speed": 0.51 * 312e12 * 8, "idle": 120, "is_spot": False, "egress": 0.09},
    "H100 spot": {"usd": 12.97, "speed": 0.41 * 989e12 * 8, "idle": 0, "is_spot": True, "egress": 0.0},
}
# Size, steps of 524,288 tokens, and loss of the best plan; None if the sum buys none. From the arithmetic below.
BY_HAND = {
    ("GH200", 5): ("124M", 3970, 3.2555),
    ("GH200", 20): ("350M", 6515, 2.9962),
    ("GH200", 100): ("774M", 15925, 2.8051),
    ("A100", 5): None,
    ("A100", 20): ("254M", 5712, 3.1123),
    ("A100", 100): ("350M", 18678, 2.8941),
    ("H100 spot", 5): ("124M", 4724, 3.2340),
    ("H100 spot", 20): ("350M", 10329, 2.9476),
    ("H100 spot", 100): ("774M", 26591, 2.7631),
}


def cost_by_hand(rented: dict, layers: int, width: int, tokens: float) -> float:
    """Dollars of a run. Times in seconds."""
    flops = 6 * (12 * layers * width**2 + 50304 * width) + 12 * layers * 1024 * width
    train = tokens * flops / rented["speed"]
    validations = tokens / 524288 / 250
    validation = validations * 10485760 * flops / 3 / rented["speed"]
    checkpoints = train / 60 * 0.3
    paid = 150 + 180 + 30 + 90 + train + validation + checkpoints + rented["idle"]
    if rented["is_spot"]:
        restarts = 0.25 * paid / 3600
        paid += restarts * (150 + 180 + 30 + 90 + 60 / 2)
    parameters = 12 * layers * width**2 + 2 * 50304 * width  # norms of this preset have a weight each, as good as none
    stored = 2 * tokens + 2 * 12 * parameters
    usd = paid / 3600 * rented["usd"] + stored / 1e9 * 0.023 + 2 * tokens / 1e9 * rented["egress"]
    return usd + (paid / 3600 + 0.25) * 0.2 * rented["is_spot"]


def loss_by_hand(layers: int, width: int, tokens: float) -> float:
    size = 12 * layers * width**2 / 1e9
    share = math.log(min(max(size, 0.084934656), 1.2) / 0.084934656) / math.log(1.2 / 0.084934656)
    k = 1.55 * 1.52 ** (-0.5 * share)
    return 2.06 + 0.409 / size**0.255 + 0.606 / (k * tokens / 1e9) ** 0.296


def best_by_hand(rented: dict, usd: float) -> tuple[str, int, float] | None:
    found = []
    for name, (layers, width) in SHAPES.items():
        trained = 12 * layers * width**2 + 50304 * width
        least, most = 0.0, 80.0 * trained
        for _ in range(100):  # bisection: the most tokens that nine tenths of the sum pay for
            middle = (least + most) / 2
            if cost_by_hand(rented, layers, width, middle) <= 0.9 * usd:
                least = middle
            else:
                most = middle
        if least >= 8 * trained:
            steps = int(least // 524288)
            found.append((loss_by_hand(layers, width, steps * 524288), name, steps))
    return (min(found)[1], min(found)[2], min(found)[0]) if found else None


@pytest.mark.parametrize(("which", "usd"), BY_HAND)
def test_a_plan_is_the_arithmetic_of_its_inputs(which: str, usd: float):
    by_hand, expected = best_by_hand(RENTED[which], usd), BY_HAND[which, usd]
    plans = answer(usd, which).plans
    if expected is None:
        assert by_hand is None
        assert not plans
        return
    size, steps, loss = expected
    assert by_hand == (size, steps, pytest.approx(loss, abs=1e-4))
    [best] = plans
    assert (best.candidate.recipe, best.candidate.size) == ("speedrun", size)
    assert best.steps == pytest.approx(steps, abs=2)  # by hand a norm has no weights
    assert best.loss == pytest.approx(loss, abs=2e-4)
    assert sum(best.parts.values()) == pytest.approx(best.usd)
    assert 0.999 * usd < best.usd <= usd
    assert best.parts[planner.RESERVE] == pytest.approx(0.1 * best.usd)


# --- the law -----------------------------------------------------------------------------------------------------


def test_the_law_predicts_the_runs_that_were_never_fitted():
    """Their rows are no part of the fit; the record says how far it is off without each of the fitted runs."""
    with law.RUNS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["use"] == "check"]
    fitted = law.load()
    errors = [
        fitted.loss(row["recipe"], float(row["params_nonembed"]), float(row["tokens"])) - float(row["val_loss"])
        for row in rows
    ]
    assert len(errors) == 3
    assert math.sqrt(sum(error**2 for error in errors) / len(errors)) <= law.KNOWN_RECIPE


def test_the_shipped_law_is_what_the_fit_gives(capsys):
    from bench import fit_loss

    again = fit_loss.document(fit_loss.fit(fit_loss.read("fit")))
    stored = json.loads(law.LAW.read_text())
    assert again["constants"] == pytest.approx(stored["constants"], rel=1e-3)
    for name, known in stored["recipes"].items():
        assert again["recipes"][name]["k"] == pytest.approx(known["k"], rel=1e-3), name
    record = json.loads(sorted(Path("bench/results").glob("*-fit-loss.json"))[-1].read_text())
    assert record["constants"] == pytest.approx(stored["constants"], rel=1e-3)
    seen = [each for each in record["left_out_with_checks"] if each["recipe_seen"]]
    assert fit_loss.rms(seen) <= law.KNOWN_RECIPE
    assert len(seen) == 14
    fit_loss.show(record)
    assert "never fitted: rms 0.0" in capsys.readouterr().out


def test_every_run_has_a_source_and_what_is_fitted_is_on_one_scale():
    with law.RUNS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(row["source"] and row["date"] for row in rows)
    for row in rows:
        if row["use"]:
            assert (row["tokenizer"], row["dataset"]) == ("gpt2", "FineWeb10B"), row["name"]
    [reference] = [row for row in rows if row["name"] == "llmc-124M"]
    assert float(reference["val_loss"]) == pytest.approx(3.27, abs=0.005)  # the notes of a plan quote it


def test_the_optimizer_s_advantage_shrinks_beyond_the_sizes_of_its_runs():
    assert LAW.multiplier("track3-muon", 85e6) == pytest.approx(1.55, rel=1e-3)
    assert LAW.multiplier("track3-muon", 1.2e9) == pytest.approx(1.55 / math.sqrt(1.52))
    assert LAW.multiplier("track3-muon", 5e9) == pytest.approx(1.55 / math.sqrt(1.52))
    middle = math.sqrt(0.084934656 * 1.2) * 1e9
    assert LAW.multiplier("track3-muon", middle) == pytest.approx(1.55 / 1.52**0.25)
    assert LAW.multiplier("muon-modern", 1.4e9) == 1.0  # measured there
    assert LAW.multiplier("gpt2-adamw", 1.2e9) == 0.27  # no advantage to lose


def test_the_error_grows_with_the_distance_from_the_data():
    assert LAW.error("track3-muon", 85e6, 2e9) == 0.015
    assert LAW.error("track3-muon", 300e6, 2e9) == 0.02
    assert LAW.error("track3-muon", 3e9, 30e9) == 0.04
    assert LAW.error("track3-muon", 85e6, 1.2e9) == 0.04
    assert LAW.error("another", 85e6, 2e9) == 0.09


# --- what may be planned -----------------------------------------------------------------------------------------


def test_plans_stay_inside_the_data():
    for usd in (3.0, 7.0, 30.0, 300.0, 3000.0):
        for each in answer(usd, *MACHINES).plans:
            ratio = each.tokens / each.candidate.trained
            assert 7.99 <= ratio <= 80
            assert each.tokens <= 4 * 10e9
            assert each.is_extrapolated == (each.tokens < 1.6e9) == (each.error == 0.04)


def test_more_money_than_tokens_is_not_spent():
    [best] = answer(90_000.0, "A100", unique_tokens=1e9).plans
    assert best.limit == "data"
    assert best.tokens == pytest.approx(4e9, rel=1e-3)
    assert best.usd < 1000


def test_a_deadline_shortens_the_run_and_one_that_is_too_short_refuses_it():
    free, short = answer(100.0, "GH200"), answer(100.0, "GH200", deadline_hours=6.0)
    assert free.plans[0].hours > 30
    assert 5.9 < short.plans[0].hours <= 6.0
    assert short.plans[0].limit == "deadline"
    assert short.plans[0].usd < 20
    assert short.plans[0].loss > free.plans[0].loss
    none = answer(100.0, "GH200", deadline_hours=0.1)
    assert not none.plans
    assert "more than the deadline" in none.refusals[0].why


def test_what_does_not_fit_is_refused_and_what_nearly_fits_costs_speed():
    large = next(each for each in recipes.candidates() if (each.recipe, each.size) == ("gpt2", "1.5B"))
    assert recipes.fit(large, "A10G", 1).startswith("does not fit: A10G")
    eight = recipes.fit(large, "A100", 8)
    assert eight.flags == ("--optimizer.zero=2", "--train.activation_checkpointing=true")
    medium = next(each for each in recipes.candidates() if (each.recipe, each.size) == ("speedrun", "350M"))
    tight = recipes.fit(medium, "A10G", 1)
    assert tight.speed == 0.75
    assert tight.flags == ("--train.activation_checkpointing=true",)


def test_an_unknown_speed_is_refused_until_a_run_of_ours_has_it():
    small = machine(offer(instance_type="g5.xlarge", accelerator="A10G", accelerators=1), 1.0)
    found, [refused] = planner.buyers([small], Prices(ASSUME, RATES))
    assert not found
    assert "neither measured nor published" in refused.why
    mine = Measured("s3://b/runs/mine", "g5.xlarge", "A10G", 1, 20_000.0, 854_654_976.0, 200.0, 0.1)
    found, refused = planner.buyers([small], Prices(ASSUME, RATES, {"g5.xlarge": [mine]}), size="124M")
    assert not refused
    best = planner.plan(Question(100.0), found, [], LAW).plans[0]
    assert best.speed.kind == "measured"
    assert best.speed.expected == pytest.approx(20_000.0, rel=1e-3)
    # The overhead is that of the run: 200 s to get ready, and a tenth of the training.
    assert best.parts["ready"] == pytest.approx(200 / 3600)
    assert best.parts["eval, sample, checkpoint, wait"] == pytest.approx(0.1 * best.parts["train"])


def test_equal_plans_are_ordered_by_dollars_and_then_by_risk():
    [base] = answer(20.0, "GH200").plans

    def like(loss: float, usd: float, spot: bool = False) -> planner.Plan:
        rented = dataclasses.replace(base.machine, spot=spot, usd=loss)
        return dataclasses.replace(base, loss=loss, machine=rented, usd=usd, parts={planner.RESERVE: 0.0})

    best, near, cheap, far = like(2.90, 20.0, True), like(2.915, 20.1), like(2.919, 15.0), like(2.93, 5.0)
    assert planner._ordered([far, near, best, cheap]) == ([cheap, best, near, far], 3)
    assert planner._ordered([near, best]) == ([near, best], 2)  # as many dollars, and no preemption
    assert planner._ordered([]) == ([], 0)


# --- machines and prices -----------------------------------------------------------------------------------------


def test_machines_are_what_the_tasks_launch():
    found, refused = machines.machines(providers.snapshot(), machines.tasks(), Wanted(), TODAY)
    by_name = {each.name: each for each in found}
    gh200 = by_name["1 x GH200, lambda on demand"]
    assert (gh200.task, gh200.options, gh200.usd, gh200.idle_seconds) == ("sky/pretrain-gh200.yaml", (), 2.29, 120)
    spot = by_name["8 x A100, aws spot"]
    assert (spot.task, spot.usd, spot.low, spot.high) == (
        "sky/pretrain-8xa100-spot.yaml",
        pytest.approx((7.8799 + 8.1203) / 2),  # the middle of the zones of us-east-1, its first region
        2.4655,
        9.7315,
    )
    assert "max_hourly_cost: 30" in next(each.why for each in refused if each.what.startswith("8 x H100, lambda"))
    only, _ = machines.machines(
        providers.snapshot(), machines.tasks(), Wanted(on_demand=True, gpus="a100", cloud="lambda"), TODAY
    )
    assert {each.gpus for each in only} == {"A100:1", "A100:2", "A100:4", "A100:8"}
    assert not any(each.spot for each in only)


def test_known_dates_of_prices_are_shown_and_old_prices_can_be_refused():
    found, refused = machines.machines(providers.snapshot(), machines.tasks(), Wanted(stale_days=30), TODAY)
    assert {each.name for each in found if each.gpus == "A100:8"} == {"8 x A100, lambda on demand"}
    assert all(each.priced == date(2026, 11, 9) for each in found)
    why = {each.what: each.why for each in refused}
    assert why["1 x GH200, lambda on demand"].startswith("its price is without a date")
    assert why["8 x A100-80GB, lambda on demand"].startswith("its price is of 2026-09-20")


def test_dates_of_the_snapshot_are_of_prices_in_it():
    offers = providers.snapshot().offers
    for (cloud, instance_type, market), seen in catalog._seen().items():
        for region, usd, _ in seen:
            assert any(
                (each.cloud, each.instance_type) == (cloud, instance_type)
                and region in ("", each.region)
                and (each.usd_spot if market == "spot" else each.usd_on_demand) == usd
                for each in offers
            ), instance_type


def test_the_catalog_that_skypilot_keeps_is_read_without_skypilot(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    file = tmp_path / ".sky/catalogs/v8/lambda/vms.csv"
    file.parent.mkdir(parents=True)
    head, *rows = (catalog.FOLDER / "lambda/vms.csv").read_text().splitlines()
    file.write_text("\n".join([head, *(row.replace(",2.29,", ",1.99,") for row in rows if "gh200" in row)]) + "\n")
    found = providers.dated()
    [gh200] = {each.usd_on_demand for each in found.offers if each.accelerator == "GH200"}
    assert gh200 == 1.99
    assert found.fetched.keys() == {"lambda"}
    assert found.price_date(next(each for each in found.offers if each.accelerator == "GH200"), False) is not None
    assert any(each.cloud == "aws" for each in found.offers), "the snapshot stands in for the other cloud"
    assert not providers.dated(offline=True).fetched


# --- the command -------------------------------------------------------------------------------------------------


def run(capsys, *arguments: str) -> str:
    command.main(["plan", "--offline", *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("extra", [(), ("--on-demand",), ("--gpus=A100:8", "--cloud=aws", "--on-demand")])
def test_the_printed_command_launches_the_plan(extra: tuple[str, ...], capsys, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a plan needs no network"))
    document = json.loads(run(capsys, "--usd=40", "--json", *extra))
    assert document["plans"]
    for each in document["plans"][:3]:
        words = shlex.split(each["command"])
        given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
        task = f"sky/{given['TASK']}.yaml" if "TASK" in given else each["machine"]["task"]
        assert task == each["machine"]["task"]
        choice = MachineChoice(gpus=given.get("GPUS"), infra=given.get("INFRA"))
        spec = read_task(str(REPOSITORY / task), given, choice)
        launched = {
            (offer.cloud, f"{offer.accelerator}:{offer.accelerators}", request.spot)
            for offer in providers.snapshot().offers
            for request in spec.requests
            if fits(offer, request)
        }
        rented = each["machine"]
        assert launched == {(rented["cloud"], rented["gpus"], rented["spot"])}
        settings = spec.workload.config
        assert settings.train.steps * settings.batch.tokens_per_step == each["tokens"]
        assert recipes.parameters(settings.model) == each["parameters"]
        assert float(given["MAX_USD"]) == each["max_usd"] < 40
        assert each["usd"] == pytest.approx(sum(each["parts"].values()))
        estimated = forecast_of(spec, providers.snapshot(), Assumptions(), RATES).rows
        hours = [row.hours for row in estimated if row.offer.instance_type == rented["instance_type"]]
        assert each["hours"] == pytest.approx(hours[0]), "estimate says the same of this command"


def test_targets_of_the_command_are_those_of_the_makefile():
    text = (REPOSITORY / "launch/targets.mk").read_text()
    for task, words in view._TARGETS.items():
        recipe = text.partition(f"\n{words.removeprefix('make ')}: ")[2].partition("\n\n")[0]
        assert f"sky/{task}.yaml" in recipe.replace("$(TASK)", "pretrain-8xa100")
    assert "$(if $(INFRA),--infra $(INFRA))" in text
    assert machine_choice(["--infra", "aws/us-east-1"]) == MachineChoice(infra="aws/us-east-1")


def test_the_first_screen_says_what_is_bought_and_what_to_type(capsys):
    said = run(capsys, "--usd=20")
    first = said.splitlines()[0]
    assert re.match(r"\$20.00 buys a \S+ model .* parameters.* trained on .* tokens, in .*: validation loss \d", first)
    for word in ("FineWeb-Edu", "no conversion is known", "all in", "reserve", "not planned", "runner-up", "prices:"):
        assert word in said, word
    columns = [line.split()[-3:] for line in said.splitlines() if line.strip().startswith("all in")]
    assert columns == [["20.00", "20.00", "20.00"]]
    assert re.search(r"^  make pretrain\S* .*MAX_USD=", said, re.M)


def test_an_assumption_of_the_estimate_is_one_of_the_plan(capsys):
    usual, calm = (
        json.loads(run(capsys, "--usd=20", "--gpus=A100:8", "--json", *flags))["plans"][0]
        for flags in ((), ("--preemptions-per-hour=0",))
    )
    assert usual["parts"]["restarts and lost work"] > 0
    assert "restarts and lost work" not in calm["parts"]
    assert calm["tokens"] > usual["tokens"]


def test_a_sum_that_is_not_needed_is_named(capsys):
    said = run(capsys, "--usd=1000", "--gpus=GH200", "--deadline=10h")
    assert re.match(r"\$\d\d\.\d\d of \$1,000\.00 buys", said)
    assert re.search(r"^plan 1: the deadline ends it, so that \$\d\d\.\d\d are enough", said, re.M)


def test_dollars_by_line_add_up_to_the_cent(capsys):
    document = json.loads(run(capsys, "--usd=20", "--json"))
    assert document["loss_scale"] == "FineWeb"
    given = answer(20.0, *MACHINES)
    sheet = view.bill(given, TODAY)
    for column in range(1, 4):
        cells = [row[column] for row in sheet.rows[3:] if row[column] != "–"]
        assert sum(round(100 * float(cell)) for cell in cells) == round(100 * float(sheet.foot[column]))


def test_the_chart_is_one_svg_with_a_line_per_machine(tmp_path: Path, capsys):
    run(capsys, "--usd=20", f"--svg={tmp_path / 'loss.svg'}", "--gpus=A100")
    drawing = xml.dom.minidom.parse(str(tmp_path / "loss.svg"))
    lines = [each for each in drawing.getElementsByTagName("path") if "line" in each.getAttribute("class")]
    names = {each.firstChild.data for each in drawing.getElementsByTagName("text") if each.firstChild}
    assert 1 < len(lines) <= chart.LINES
    assert {"8 x A100, aws spot", "$5", "$500"} <= names
    losses = [re.search(r"loss ([\d.]+)", each.firstChild.data)[1] for each in drawing.getElementsByTagName("title")]
    assert len(losses) > chart.POINTS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--usd is empty; give the dollars to spend, such as --usd=20 (make plan USD=20)"),
        (("--usd=0",), "--usd is '0', must be a number of dollars above zero"),
        (("--usd=-5",), "--usd is '-5', must be a number of dollars above zero"),
        (("--usd=20 USD",), "--usd is '20 USD', must be a number of dollars above zero without a currency"),
        (("--usd=inf",), "--usd is 'inf', must be a number"),
        (("--usd=1e9",), "--usd is '1e9', above 100,000"),
        (("--usd=1",), r"--usd=1 is less than any plan here needs; the least that works is \$\d\.\d\d: 124M .* loss"),
        (("--usd=20", "--gpus=H900"), "--gpus is 'H900', must be one of A100-80GB:8, "),
        (("--usd=20", "--gpus=A100:3"), "--gpus is 'A100:3', must be one of A100:1, A100:2, A100:4, A100:8, or"),
        (("--usd=20", "--gpus=L4"), "no plan is possible; 2 of 2 machines: its speed was neither measured"),
        (
            ("--usd=20", "--gpus=A100:1", "--size=1.5B"),
            "no plan is possible; 1 of 1 machine: speedrun 1.5B does not fit: A100: batch.micro_batch_size = 1 needs",
        ),
        (("--usd=20", "--cloud=gcp"), "--cloud is 'gcp', must be one of aws, lambda"),
        (("--usd=20", "--size=7B"), "--size is '7B', must be one of 124M, 254M, 350M, 774M, 1.5B"),
        (("--usd=20", "--recipe=lion"), "--recipe is 'lion', must be one of speedrun, gpt2"),
        (("--usd=20", "--deadline=6"), "--deadline is '6', must be a time above zero such as 90min, 6h or 2d"),
        (("--usd=20", "--deadline=3min"), r"--deadline: no run here is as short; the shortest takes \d+min, on"),
        (("--usd=20", "--refuse-stale=x"), "--refuse-stale is 'x', must be a whole number of days"),
        (("--usd=20", "--reserve=1"), "--reserve is '1', must be a share from 0 to below 1"),
        (("--usd=20", "--unique-tokens=-1"), "--unique-tokens is '-1', must be a number above zero"),
        (("--usd=20", "--svg=s3://b/x.svg"), "--svg is 's3://b/x.svg', which"),
    ],
)
def test_bad_input_gets_one_sentence(arguments: tuple[str, ...], said: str, capsys):
    with pytest.raises(ConfigError) as problem:
        run(capsys, *arguments)
    text = str(problem.value)
    assert text.startswith(said) or re.match(said, text), text
    assert "\n" not in text


def test_a_catalog_without_prices_gets_one_sentence(capsys, monkeypatch):
    bare = tuple(dataclasses.replace(each, usd_on_demand=None, usd_spot=None) for each in providers.snapshot().offers)
    monkeypatch.setattr(providers, "dated", lambda offline: Catalog(bare, "a catalog of today"))
    with pytest.raises(ConfigError, match="no machine has a price in a catalog of today; run `sky check`"):
        run(capsys, "--usd=20")


def test_a_bucket_that_cannot_be_read_only_leaves_out_own_runs(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setenv("BUCKET", str(tmp_path / "nothing"))
    command.main(["plan", "--usd=20"])
    assert "own runs: none in BUCKET has trained" in capsys.readouterr().out
    monkeypatch.setenv("BUCKET", "../x")
    assert own.in_bucket({"BUCKET": "s3://"})[1].startswith("own runs: BUCKET cannot be read (BUCKET is 's3://'")


def test_sizes_are_settings_that_the_trainer_takes():
    for each in recipes.candidates():
        flags = [*each.flags, "--run.url=unused", "--data.url=unused"]
        settings = loader.load(PretrainConfig, [str(REPOSITORY / each.config), *flags], {})
        assert settings.batch.tokens_per_step <= each.batch_cap
        assert each.trained - each.non_embedding == 50304 * settings.model.width
        assert plan_command.recipes.RECIPES[each.recipe] == each.in_law
