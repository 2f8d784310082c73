"""The forecast of a run's final loss and dollars, made while it trains."""

from types import SimpleNamespace

import numpy as np
import pytest

from core.loss import law
from core.run.course import Change
from core.run.folder import RunFolder
from core.run.model import Run, Segment
from core.settings.training import OptimizerConfig
from costs.notes import notes_on_money
from trainer.loop.forecast import ERRORS, USUAL_GAIN, LossHistory, law_error, sums
from trainer.loop.outlook import Outlook, with_cooldown
from trainer.optim.schedule import Schedule

WSD = OptimizerConfig(schedule="wsd", warmup_steps=20)
LAW = {"floor": 2.4, "scale": 9.0, "exponent": 0.43}


def true_loss(schedule: Schedule, end: int, steps, gain: float) -> np.ndarray:
    """Losses by the law, whose whole cooldown gains `gain`."""
    heat, fallen = sums(schedule, end, [*steps, end])
    found = LAW["floor"] + LAW["scale"] * heat ** -LAW["exponent"] - gain * fallen / fallen[-1]
    return found[:-1]


def history(schedule: Schedule, end: int, until: int, gain: float, noise: float = 0.02) -> LossHistory:
    made, random = LossHistory(), np.random.default_rng(1)
    steps = range(1, until + 1)
    for step, loss in zip(steps, true_loss(schedule, end, steps, gain), strict=True):
        made.add(step, loss + noise * random.standard_normal())
    return made


@pytest.mark.parametrize("end", [2000, 20_000])
def test_the_end_of_a_run_that_has_not_cooled_is_forecast_with_the_usual_gain(end: int):
    schedule = Schedule(WSD, end, [Change("anneal", int(0.8 * end), end - int(0.8 * end))])
    [came] = true_loss(schedule, end, [end], gain=USUAL_GAIN)
    found = history(schedule, end, int(0.7 * end), USUAL_GAIN).forecast(Schedule(WSD, end, schedule.changes), end, 20)
    assert found.ratio == pytest.approx(1 / 0.7, rel=0.02)
    assert found.loss == pytest.approx(came, abs=found.error)
    assert 0.03 < found.error < 0.035, "the gain of the cooldown has not been seen yet"
    assert found.is_training


def test_a_cooldown_shows_its_gain_while_it_runs():
    """Twice the usual gain: the forecast moves to it, and its error shrinks."""
    end, schedule = 10_000, Schedule(WSD, 10_000, [Change("anneal", 8000, 2000)])
    [came] = true_loss(schedule, end, [end], gain=0.24)
    early, late = (
        history(schedule, end, until, gain=0.24, noise=0.005).forecast(schedule, end, 20) for until in (7000, 9700)
    )
    assert abs(late.loss - came) < 0.02 < abs(early.loss - came)
    assert late.error < 0.5 * early.error


def test_the_newest_validation_gives_the_level():
    end, schedule = 5000, Schedule(WSD, 5000, [Change("anneal", 4000, 1000)])
    made = history(schedule, end, 4000, USUAL_GAIN)
    [at_4000, came] = true_loss(schedule, end, [4000, end], USUAL_GAIN)
    made.validated(4000, at_4000 + 0.05)  # text that is harder than the training text
    found = made.forecast(schedule, end, 20)
    assert found.loss == pytest.approx(came + 0.05, abs=0.02)
    assert not found.is_training


def test_the_error_grows_with_what_has_not_been_seen():
    assert law_error(1.0) == law_error(1.7) == ERRORS[0][1]
    assert law_error(2.0) < law_error(4.2) == pytest.approx(0.043)
    assert law_error(6.0) == pytest.approx(0.068)
    assert law_error(12.0) > 0.1


def test_far_beyond_what_was_seen_the_public_law_says_how_tokens_help():
    """A tenth of 10B tokens is seen: 1.7 times of it by the run's own law, the rest by B / D^b, the gain as always."""
    schedule = Schedule(WSD, 20_000, [Change("anneal", 16_000, 4000)])
    made, public = history(schedule, 20_000, 2000, USUAL_GAIN, noise=0.005), law.load()
    far = made.forecast(schedule, 20_000, 20, tokens_per_step=500_000, public=public)
    near = made.forecast(Schedule(WSD, 3400, [Change("anneal", 2720, 680)]), 3400, 20)
    by = public.constants
    gain = by["B"] * (1.7 ** -by["b"] - 10.0 ** -by["b"])
    assert near.loss - far.loss == pytest.approx(gain, abs=0.02)
    small = made.forecast(schedule, 20_000, 20, tokens_per_step=500, public=public)
    assert small == made.forecast(schedule, 20_000, 20), "10M tokens are outside of the public runs"


def test_too_few_steps_and_constant_losses():
    made = LossHistory()
    for step in range(1, 8):
        made.add(step, 5.0)
    assert made.forecast(Schedule(WSD, 100), 100, 20) is None
    for step in range(8, 2000):
        made.add(step, 5.0)
    found = made.forecast(Schedule(WSD, 2500), 2500, 20)
    assert found.loss == pytest.approx(5.0, abs=0.01), "no cooldown is in this schedule"
    assert len(made._means) < 128


def stage_of(schedule: Schedule, target: float = 0.0) -> SimpleNamespace:
    train = SimpleNamespace(overfit=False, target_loss=target)
    batch = SimpleNamespace(tokens_per_step=512)
    settings = SimpleNamespace(train=train, optimizer=WSD, batch=batch, run=SimpleNamespace(url="/nowhere"))
    return SimpleNamespace(name="pretrain", schedule=schedule, steps=schedule.end, settings=settings)


def test_an_outlook_says_where_the_money_ends_and_compares_in_the_end():
    schedule = Schedule(WSD, 100_000)
    end = 5000  # where the money ends
    planned = with_cooldown(schedule, end)
    assert planned.cooldown == Change("anneal", 4000, 1000)
    assert schedule.changes == []
    outlook = Outlook(stage_of(schedule, target=LAW["floor"] + 0.5), lambda step: (end, 12.5), first_step=0)
    steps = range(1, end + 1)
    losses = true_loss(planned, end, steps, USUAL_GAIN)
    reached = None
    for step, loss in zip(steps, losses, strict=True):
        outlook.add(step, loss)
        if step == 200:
            outlook.validated(step, loss)
        if step % 10 == 0:
            outlook.refreshed(step)
        if outlook.target_reached and reached is None:
            reached = step
            assert loss - USUAL_GAIN < LAW["floor"] + 0.52, "a cooldown from here ends at the target"
    assert 200 < reached < end
    assert 90 <= len(outlook._views) <= 100, "one per hundredth of the steps"
    outlook.validated(end, losses[-1])
    said = outlook.compared(12.31)
    assert said.startswith("forecast at step 2")
    assert f"at step {end} for $12.50; it came to loss {losses[-1]:.3f}, $12.31" in said


def test_a_report_shows_the_newest_forecast_and_in_the_end_what_came():
    segment = Segment(1, started_at=0.0)
    forecasts = [(100, 3.5, 9.0), (500, 3.4, 10.0), (900, 3.3, 11.0)]
    segment.metrics["forecast"] = [
        {"step": step, "time": float(step), "val_loss": loss, "error": 0.02, "end": 1000.0, "usd": usd}
        for step, loss, usd in forecasts
    ]
    run = Run(RunFolder("/run"), [segment])
    found = [note for note in notes_on_money(run) if note.startswith("forecast")]
    assert found == ["forecast at step 900: validation loss 3.300 ± 0.020 at step 1000, $11.00"]
    segment.metrics["eval"] = [{"step": 1000, "time": 1000.0, "tokens": 1.0, "val_loss": 3.38}]
    segment.end = {"reason": "finished"}
    [note] = [note for note in notes_on_money(run) if note.startswith("forecast")]
    assert note.startswith("forecast at step 500: validation loss 3.400 ± 0.020 at step 1000, $10.00; it came to 3.380")
