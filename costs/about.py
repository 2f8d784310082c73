"""Collects the facts of a run: its model, tokens, machines, settings, dates, cap and forecast."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.run import timeline
from core.run.budget import Budget
from core.run.model import Run, Segment
from core.settings import model as architecture
from core.settings.model import ModelConfig
from costs.cells import Attributed
from costs.model import OutsideTime, Stretch
from costs.units import model_of

# A phase that took less than this share of the whole time is drawn as a part of the phase before it.
LEAST_SHARE = 1 / 400


@dataclass(frozen=True)
class About:
    """Facts of a run. None means unknown; a text is empty if it does not apply.

    `tokens` is the number of tokens of the whole planned run. `cap_usd` limits the dollars of the run's machines. For a
    run that `make run` launched, it limits the dollars of the whole run. `forecast_usd` and `forecast_loss` come from
    the plan of `make run`. Times are unix seconds.
    """

    model: str = ""
    parameters: int | None = None
    steps: int | None = None
    tokens: int | None = None
    data: str = ""
    machines: str = ""
    config: str = ""
    commit: str = ""
    began_at: float | None = None
    ended_at: float | None = None
    cap_usd: float | None = None
    forecast_usd: float | None = None
    forecast_loss: float | None = None


def about(run: Run, budget: Budget | None = None) -> About:
    """The facts of a run. `budget` is the run's newest budget, if `make run` launched the run."""
    config, last = run.config, run.segments[-1]
    model = model_of(config)
    steps, per_step = _whole(config, "train", "steps"), _whole(config, "batch", "tokens_per_step")
    starts = [segment.started_at for segment in run.segments if segment.started_at is not None]
    ends = [segment.ended_at for segment in run.segments if segment.ended_at is not None]
    parts = [timeline.number(part) for part in _section(budget.forecast if budget else {}, "parts").values()]
    known = [part for part in parts if part is not None]
    data = _section(config, "data").get("url")
    return About(
        model="" if model is None else _shape(model),
        parameters=None if model is None else architecture.parameters(model),
        steps=steps,
        tokens=steps * per_step if steps and per_step else None,
        data=timeline.text(data) or "",
        machines=", ".join(dict.fromkeys(machine_in_words(segment) for segment in run.segments)),
        config=str(last.program.get("config", "")),
        commit=str(last.program.get("git_revision", "")),
        began_at=min(starts, default=None),
        ended_at=max(ends, default=None),
        cap_usd=budget.usd if budget else _cap(run),
        forecast_usd=sum(known) if known else None,
        forecast_loss=timeline.number(budget.forecast.get("loss")) if budget else None,
    )


def machine_in_words(segment: Segment) -> str:
    """A text such as "8x A100, aws us-east-1 spot", without the parts that are unknown."""
    machine = segment.machine
    number = machine.gpus_per_node * machine.nodes
    what = f"{number}x {machine.gpu}" if machine.gpu and number else machine.instance_type or "?"
    where = " ".join(part for part in (machine.cloud, machine.region) if part)
    market = {None: "", True: "spot", False: "on demand"}[machine.spot]
    return f"{what}, {where} {market}".strip(" ,")


def stretches(run: Run, attributed: Attributed, outside: list[OutsideTime]) -> list[Stretch]:
    """The time of each machine, cut into stretches of one phase each.

    A stretch that is too short to be visible is added to the stretch before it.
    """
    pieces: list[tuple[str, str, list[tuple[str, float, float]]]] = []
    for segment in run.segments:
        spans = [
            (max(span.phases, key=span.phases.__getitem__), span.start, span.end)
            for span in reversed(attributed[segment.number])
            if span.phases and span.end > span.start
        ]
        if spans:
            pieces.append((str(segment.number), machine_in_words(segment), spans))
    for time in outside:
        if time.end > time.start:
            name = str(time.segment.number) if time.segment else "–"
            pieces.append((name, time.record.cluster, [(time.phase, time.start, time.end)]))
    if not pieces:
        return []
    whole = max(spans[-1][2] for *_, spans in pieces) - min(spans[0][1] for *_, spans in pieces)
    free: list[float] = []  # for each lane, the time from which it is free
    found = []
    for name, machine, spans in sorted(pieces, key=lambda piece: piece[2][0][1]):
        start, end = spans[0][1], spans[-1][2]
        lane = next((number for number, since in enumerate(free) if since <= start + 1.0), len(free))
        free[lane : lane + 1] = [end]
        found += [Stretch(lane, name, machine, *each) for each in _merged(spans, whole * LEAST_SHARE)]
    return found


def waits(found: list[Stretch]) -> list[tuple[float, float]]:
    """The intervals in which a run had no machine, between its first and its last second."""
    gaps, reached = [], None
    for each in sorted(found, key=lambda stretch: stretch.start):
        if reached is not None and each.start > reached + 1.0:
            gaps.append((reached, each.start))
        reached = each.end if reached is None else max(reached, each.end)
    return gaps


def _merged(spans: list[tuple[str, float, float]], least: float) -> list[tuple[str, float, float]]:
    """Merges neighbours with the same phase. A stretch shorter than `least` seconds is added to the stretch before."""
    joined: list[tuple[str, float, float]] = []
    # After the first pass, two stretches of one phase may be neighbours, because a short stretch between them is gone.
    # The second pass merges them.
    for _ in range(2):
        joined = []
        for phase, group in itertools.groupby(spans, key=lambda span: span[0]):
            own = list(group)
            start, end = own[0][1], own[-1][2]
            if joined and end - start < least:
                phase, start = joined[-1][0], joined[-1][1]
                joined.pop()
            joined.append((phase, start, end))
        spans = joined
    return joined


def _cap(run: Run) -> float | None:
    """The cap in the newest segment's ledger or, if that ledger has no cap, in run.json. None if there is no cap."""
    stated = run.segments[-1].program.get("max_usd")
    try:
        usd = timeline.number(float(stated) if stated else _section(run.config, "run").get("max_usd"))
    except ValueError:
        usd = None
    return usd if usd and usd > 0 else None


def _shape(model: ModelConfig) -> str:
    return f"{model.layers} layers, {model.width} wide, {model.heads} heads, context {model.context:,}"


def _section(nested: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = nested.get(name)
    return found if isinstance(found, Mapping) else {}


def _whole(config: Mapping[str, Any], section: str, name: str) -> int | None:
    return timeline.step_number(_section(config, section).get(name))
