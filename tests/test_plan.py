"""The plans for a sum: nine of them by hand, the law of the loss, and what may be planned."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest

from core.loss import law
from costs.plan import planner, recipes
from costs.plan.planner import Prices, Question
from costs.throughput import Measured
from tests.plans import ASSUME, LAW, MACHINES, RATES, answer, machine, offer

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
    ("GH200", 5): ("124M", 3926, 3.2569),
    ("GH200", 20): ("350M", 6473, 2.9969),
    ("GH200", 100): ("774M", 15883, 2.8054),
    ("A100", 5): None,
    ("A100", 20): ("254M", 5686, 3.1128),
    ("A100", 100): ("350M", 18654, 2.8942),
    ("H100 spot", 5): ("124M", 4645, 3.2360),
    ("H100 spot", 20): ("350M", 10257, 2.9483),
    ("H100 spot", 100): ("774M", 26521, 2.7633),
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
    stored = 2 * tokens + 3 * 12 * parameters  # two checkpoints, and the best one
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
