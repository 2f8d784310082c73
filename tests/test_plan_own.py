"""What the user's own runs change in a plan: multipliers of recipes, the scale of their tokens, and overheads."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from core.run.model import Run
from core.settings import loader
from costs.plan import command, own, planner, recipes
from costs.plan.planner import Prices, Question
from costs.plan.refit import OwnRun, own_run, refit
from costs.throughput import Measured
from tests.golden import NOON, GoldenRun, mark, span, train_metric
from tests.plans import ASSUME, LAW, MACHINES, RATES

SPEEDRUN, GPT2 = (
    next(each for each in recipes.candidates() if (each.recipe, each.size) == (name, "124M"))
    for name in ("speedrun", "gpt2")
)


def run_of(candidate: recipes.Candidate, tokens: float, more: float = 0.0, k: float = 1.0, data: str = "a") -> OwnRun:
    """A run whose recipe has k times the law's multiplier, on a set whose losses are `more` above the law's scale."""
    law = dataclasses.replace(
        LAW,
        recipes={name: dataclasses.replace(each, k=each.k * k) for name, each in LAW.recipes.items()},
    )
    loss = law.loss(candidate.in_law, candidate.non_embedding, tokens) + more
    return OwnRun("s3://b/runs/x", candidate, tokens, loss, f"s3://b/data/{data}")


def test_without_runs_the_law_stays():
    assert refit(LAW, []) == type(refit(LAW, []))(LAW, {})


def test_one_run_moves_the_offset_of_its_set_and_hardly_a_multiplier():
    found = refit(LAW, [run_of(SPEEDRUN, 2e9, more=0.3)])
    offset, error = found.offsets["s3://b/data/a"]
    assert offset == pytest.approx(0.3, abs=0.002)
    assert 0.01 < error < 0.03
    assert found.law.recipes["track3-muon"].k == pytest.approx(1.55, rel=0.005)
    assert "token multipliers by 1 finished run of yours: speedrun 1.54 (1.55 by public runs)" in found.notes[0]
    assert "on data/a they are +0.299 ± 0.022 nats" in found.notes[1]


def test_two_recipes_on_one_set_tell_which_is_better_than_known():
    runs = [run_of(SPEEDRUN, tokens, 0.3, k=1.3) for tokens in (1.5e9, 3e9, 6e9)]
    runs += [run_of(GPT2, tokens, 0.3) for tokens in (3e9, 6e9, 9e9)]
    found = refit(LAW, runs)
    better = found.law.recipes["track3-muon"].k / LAW.recipes["track3-muon"].k
    as_known = found.law.recipes["gpt2-adamw"].k / LAW.recipes["gpt2-adamw"].k
    assert 1.1 < better < 1.3
    assert better / as_known == pytest.approx(1.3, rel=0.1)
    # Every run is now predicted on its own scale, and better than before.
    offset = found.offsets["s3://b/data/a"][0]
    for each in runs:
        known = each.candidate
        said = found.law.loss(known.in_law, known.non_embedding, each.tokens) + offset
        assert said == pytest.approx(each.loss, abs=0.01)
    assert found.law.recipes["muon-modern"] == LAW.recipes["muon-modern"]


def test_a_multiplier_by_hand():
    """Two runs on a set: by the normal equations of three unknowns, written out."""
    runs = [run_of(SPEEDRUN, 2e9, k=1.1), run_of(GPT2, 4e9)]
    change = math.log(refit(LAW, runs).law.recipes["track3-muon"].k / 1.55)
    slopes = [-0.296 * 0.606 * (k * tokens) ** -0.296 for k, tokens in ((1.55, 2.0), (0.27, 4.0))]
    # Both share the offset, so that their difference alone tells: it is d = s1 g1 - s2 g2 with errors .0104 each, and
    # the errors of g are .15 each.
    difference = slopes[0] * math.log(1.1)
    variance = (slopes[0] * 0.15) ** 2 + (slopes[1] * 0.15) ** 2 + 2 * 0.0104**2
    assert change == pytest.approx(0.15**2 * slopes[0] / variance * difference, rel=0.05)


# --- from run folders --------------------------------------------------------------------------------------------


def stored(
    folder: Path, candidate: recipes.Candidate, end: str = "finished", device: str = "cuda", **changes: object
) -> GoldenRun:
    """A finished run of twelve steps, 12e6 tokens in all, at a loss of 3.5."""
    settings = loader.to_dict(candidate.settings)
    settings["data"]["url"] = "s3://b/data/mine"
    settings["model"] |= changes
    settings["train"]["device"] = device
    run = GoldenRun(folder, settings)
    steps = [[step, 10.0, 0.0] for step in range(1, 13)]
    run.segment(
        1,
        NOON,
        [
            span(NOON, NOON + 200, setup=170.0, init=30.0),
            mark("restored", step=0, checkpoint=None, skipped=[]),
            span(NOON + 200, NOON + 320, steps, train=120.0),
            {"event": "end", "time": NOON + 320, "reason": end, "step": 12},
        ],
        usd_per_hour=15.92,
        instance_type="gpu_8x_a100",
    )
    loss = {"kind": "eval", "time": NOON + 320, "step": 12, "tokens": 12e6, "val_loss": 3.5}
    run.metrics(1, [*(train_metric(step, NOON + 200 + 10 * step) for step in range(1, 13)), loss])
    return run


def test_a_finished_run_with_a_planned_recipe_is_one_of_the_fit_and_others_are_not(tmp_path: Path):
    good = stored(tmp_path / "good", SPEEDRUN)
    others = [
        stored(tmp_path / "capped", SPEEDRUN, end="cap"),
        stored(tmp_path / "wider", SPEEDRUN, width=1536),
    ]
    found = own.named([good.url, *(each.url for each in others)])
    [run] = found.losses
    assert (run.url, run.candidate.recipe, run.candidate.size) == (good.url, "speedrun", "124M")
    assert (run.tokens, run.loss, run.data) == (12e6, 3.5, "s3://b/data/mine")
    assert len(found.speeds["gpu_8x_a100"]) == 3
    assert own_run(Run(good)) is None


def test_a_rehearsal_on_the_cpu_of_a_machine_with_gpus_does_not_tell_their_speed(tmp_path: Path):
    found = own.named([stored(tmp_path / name, SPEEDRUN, device=name).url for name in ("cuda", "cpu")])
    [measured] = found.speeds["gpu_8x_a100"]
    assert measured.run == str(tmp_path / "cuda")


def test_a_plan_says_what_own_runs_changed(tmp_path: Path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    stored(runs / "one", SPEEDRUN)
    monkeypatch.setenv("BUCKET", str(tmp_path))
    command.main(["--usd=20", "--gpus=A100:8", "--json"])
    document = json.loads(capsys.readouterr().out)
    said = "\n".join(document["notes"])
    assert "own losses: token multipliers by 1 finished run of yours: speedrun" in said
    assert "own losses: on data/mine they are" in said
    assert "own losses: expected on data/mine: plan 1 " in said


def test_the_time_of_an_own_run_to_get_ready_holds_the_image():
    mine = Measured("s3://b/runs/mine", "gpu_8x_a100", "A100", 8, 1e6, 854_654_976.0, 200.0, 0.1)
    found, _ = planner.buyers([MACHINES["A100"]], Prices(ASSUME, RATES, {"gpu_8x_a100": [mine]}), size="124M")
    parts = planner.plan(Question(20.0), found, [], LAW).plans[0].parts
    assert "image" not in parts
    assert parts["ready"] == pytest.approx(200 / 3600 * 15.92)
