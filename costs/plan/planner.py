"""Finds the machine, model size, tokens and recipe with the lowest expected loss for a sum of dollars.

    found, refused = buyers(machines, Prices(Assumptions(), rates))
    answer = plan(Question(usd=20.0), found, refused, law.load())
    answer.plans[0].loss, answer.plans[0].tokens

The dollars of a run come from costs/forecast.py, as in `cost_report.py estimate`. They are a linear function of the
tokens, so the dollars of two runs give the number of tokens that a sum buys. All functions are pure.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from core.figures import dollars, quantity
from core.loss.law import LEAST_TOKENS, Law
from core.settings.model import flops_per_token
from core.settings.training import PretrainConfig
from core.task import Workload
from costs import forecast, throughput
from costs.forecast import Assumptions, Effort, ForecastRow
from costs.model import StorageRates
from costs.plan import recipes
from costs.plan.machines import Machine, Refusal
from costs.plan.recipes import Candidate
from costs.throughput import Measured, Throughput

# Tokens per trained parameter. The law was fitted to runs with 5 to 89, and has no data outside of this range.
LEAST_RATIO, MOST_RATIO = 8.0, 80.0
MOST_EPOCHS = 4.0  # up to here, repeated tokens are almost as good as new ones (Muennighoff et al., arXiv 2305.16264)
CONTROLLER, RESERVE = "jobs controller", "reserve"
PREPARATION, EVALUATION, EXPORT = "preparation", "evaluation", "export"
CONTROLLER_HOURS = 0.25  # the controller's start, and the ten minutes until it stops
SAME_DOLLARS = 0.05  # two sums of dollars that differ by less than this share count as equal


@dataclass(frozen=True)
class Question:
    """A sum in dollars and the constraints on its use.

    `reserve` is the share of the sum that a plan does not spend. Without a reserve, the cap would end a run that costs
    more than expected before its learning rates have fallen.
    """

    usd: float
    reserve: float = 0.1
    unique_tokens: float = 10e9
    deadline_hours: float | None = None


@dataclass(frozen=True)
class Line:
    """A linear function of tokens."""

    fixed: float
    per_token: float

    def at(self, tokens: float) -> float:
        return self.fixed + self.per_token * tokens

    def tokens_for(self, amount: float) -> float:
        """The tokens at which the line reaches an amount; negative if the fixed part exceeds the amount."""
        return (amount - self.fixed) / self.per_token


@dataclass(frozen=True)
class Prices:
    """The sources of dollars and speeds. `own` holds measurements of the user's runs by instance type.

    `beside` holds the dollars of the stages on other machines: PREPARATION, EVALUATION and EXPORT.
    """

    assume: Assumptions
    rates: StorageRates | None
    own: Mapping[str, Sequence[Measured]] = field(default_factory=dict)
    beside: Mapping[str, Line] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A run that can be launched. `usd` is the sum of the dollars in `parts`, which include the reserve.

    `loss` is the expected loss and `error` the error of the law. `best` and `worst` are the bounds of the loss under
    the most and the least favourable price, speed and number of preemptions, with the error included. `worst` is None
    if the run could not train under the least favourable conditions.
    """

    machine: Machine
    candidate: Candidate
    flags: tuple[str, ...]
    tokens: float
    steps: int
    hours: float
    usd: float
    parts: Mapping[str, float]
    restarts: float
    loss: float
    error: float
    best: float
    worst: float | None
    speed: Throughput
    k: float
    limit: str  # what limits the number of tokens: money, deadline or data

    @property
    def spent(self) -> float:
        return self.usd - self.parts[RESERVE]

    @property
    def is_extrapolated(self) -> bool:
        return self.tokens < LEAST_TOKENS

    @property
    def machines_usd(self) -> float:
        """The dollars for the machines of all stages. Storage, egress and the jobs controller are left out."""
        return self.usd - sum(self.parts.get(name, 0.0) for name in ("storage", "egress", CONTROLLER))

    @property
    def cap_usd(self) -> float:
        """MAX_USD of the training: a cap for the machines of the training only."""
        return (
            int(
                (self.machines_usd - sum(self.parts.get(name, 0.0) for name in (PREPARATION, EVALUATION, EXPORT))) * 100
            )
            / 100
        )


@dataclass(frozen=True)
class Answer:
    """The plans, one per machine, the best first. `others` are the next best models on each of these machines.

    `equal` is the number of leading plans that differ from the best by less than their errors. `least` is the smallest
    sum for which a plan exists, with a description of that plan.
    """

    question: Question
    plans: list[Plan]
    others: Mapping[str, Plan]
    equal: int
    refusals: list[Refusal]
    least: tuple[float, str] | None


@dataclass(frozen=True)
class Buyer:
    """A candidate on a machine, with settings that fit its GPUs, and the price of tokens there.

    `cheap` and `expensive` are the dollars under the most and the least favourable price, speed and preemptions.
    """

    machine: Machine
    candidate: Candidate
    settings: PretrainConfig
    flags: tuple[str, ...]
    speed: Throughput
    measured: Measured | None
    prices: Prices
    usd: Line
    hours: Line
    cheap: Line
    expensive: Line

    @property
    def least_tokens(self) -> float:
        return LEAST_RATIO * self.candidate.trained

    def most_tokens(self, question: Question) -> float:
        return min(MOST_RATIO * self.candidate.trained, MOST_EPOCHS * question.unique_tokens)

    def loss(self, law: Law, tokens: float) -> float:
        return law.loss(self.candidate.in_law, self.candidate.non_embedding, tokens)

    def error(self, law: Law, tokens: float) -> float:
        return law.error(self.candidate.in_law, self.candidate.non_embedding, tokens)


def bill(
    machine: Machine,
    settings: PretrainConfig,
    speed: Throughput,
    measured: Measured | None,
    prices: Prices,
    tokens: float,
    usd_per_hour: float,
) -> ForecastRow:
    """The hours and dollars of a run, as `estimate` gives them. The jobs controller and the other stages are added."""
    assume = prices.assume
    if assume.shutdown_seconds is None:
        assume = dataclasses.replace(assume, shutdown_seconds=machine.idle_seconds)
    workload = Workload("pretrain", settings, model=settings.model)
    row = ForecastRow(machine.offer, machine.spot, 1, usd_per_hour)
    found = forecast.price(row, Effort(workload, tokens, speed), assume, prices.rates, measured)
    more = {name: line.at(tokens) for name, line in prices.beside.items()}
    if machine.spot:
        more[CONTROLLER] = (found.hours + CONTROLLER_HOURS) * assume.controller_usd_per_hour
    added = {name: getattr(found, name) + sum(more.values()) for name in ("usd", "usd_low", "usd_high")}
    return dataclasses.replace(found, **added, parts=found.parts | more)


def buyers(
    machines: Iterable[Machine], prices: Prices, size: str | None = None, recipe: str | None = None
) -> tuple[list[Buyer], list[Refusal]]:
    """All candidates on all machines, and a refusal for each machine without a candidate.

    Raises ConfigError if a preset of the project cannot be read.
    """
    found, refused = [], []
    for machine in machines:
        reasons = []
        for candidate in recipes.candidates():
            if size in (None, candidate.size) and recipe in (None, candidate.recipe):
                each = _buyer(machine, candidate, prices)
                (reasons if isinstance(each, str) else found).append(each)
        if reasons and not any(each.machine is machine for each in found):
            refused.append(Refusal(machine.name, reasons[0]))
    return found, refused


def _buyer(machine: Machine, candidate: Candidate, prices: Prices) -> Buyer | str:
    """A candidate on a machine, or the reason why it is refused."""
    offer = machine.offer
    flops = flops_per_token(candidate.settings.model)
    measured = throughput.nearest(prices.own.get(offer.instance_type, ()), offer, 1, flops)
    rate = throughput.rate_of(offer, 1, flops, measured)
    if rate is None or rate.kind == "assumed":
        return "its speed was neither measured nor published; give --like RUN_URL of a run on it"
    if measured is None and "pcie" in offer.instance_type:
        return "its GPUs use PCIe, but the published speeds are of SXM; give --like RUN_URL of a run on it"
    fit = recipes.fit(candidate, offer.accelerator or "", offer.accelerators)
    if isinstance(fit, str):
        return f"{candidate.recipe} {candidate.size} {fit}"
    speed = rate.times(fit.speed)

    def line(amount: str, usd_per_hour: float) -> Line:
        one, two = (
            getattr(bill(machine, fit.settings, speed, measured, prices, tokens, usd_per_hour), amount)
            for tokens in (1e9, 2e9)
        )
        return Line(2 * one - two, (two - one) / 1e9)

    lines = (
        line("usd", machine.usd),
        line("hours", machine.usd),
        line("usd_low", machine.low),
        line("usd_high", machine.high),
    )
    return Buyer(machine, candidate, fit.settings, fit.flags, speed, measured, prices, *lines)


def plan(question: Question, buyers: Iterable[Buyer], refused: Iterable[Refusal], law: Law) -> Answer:
    """The best plans for a sum, one per machine."""
    by_machine: dict[str, list[Buyer]] = {}
    for each in buyers:
        by_machine.setdefault(each.machine.name, []).append(each)
    best, others, refusals, least = [], {}, list(refused), []
    for name, group in by_machine.items():
        choices, reasons = _choices(group, question, law)
        if choices:
            choices.sort(key=lambda each: each[0])
            best.append(_plan(*choices[0][1:], question, law))
            others.update((name, _plan(*each[1:], question, law)) for each in choices[1:2])
        else:
            refusals.append(Refusal(name, reasons[0]))
        least += _least(group, question, law)
    ordered, equal = _ordered(best)
    return Answer(question, ordered, others, equal, refusals, min(least, default=None))


def _choices(
    group: Iterable[Buyer], question: Question, law: Law
) -> tuple[list[tuple[float, Buyer, float, str]], list[str]]:
    """Two results for one machine. The first holds (loss, buyer, tokens, limit of tokens) for each possible candidate.

    The second holds the reasons why the other candidates are impossible.
    """
    found, reasons = [], []
    for each in group:
        ends = {"money": each.usd.tokens_for(question.usd * (1 - question.reserve))}
        ends["data"] = each.most_tokens(question)
        if question.deadline_hours is not None:
            ends["deadline"] = each.hours.tokens_for(question.deadline_hours)
        limit, tokens = min(ends.items(), key=lambda item: item[1])
        if tokens >= each.least_tokens:
            found.append((each.loss(law, tokens), each, tokens, limit))
        elif limit == "money":
            usd = each.usd.at(each.least_tokens) / (1 - question.reserve)
            reasons.append((usd, f"needs ${dollars(usd)} at least"))
        elif limit == "deadline":
            hours = each.hours.at(each.least_tokens)
            reasons.append((0.0, f"needs {hours:.1f} h at least, more than the deadline"))
        else:
            epochs = f"more than {MOST_EPOCHS:g} epochs of the set"
            reasons.append((0.0, f"{each.candidate.size} needs {quantity(each.least_tokens)} tokens, {epochs}"))
    return found, [reason for _, reason in sorted(reasons, key=lambda each: each[0])]


def _least(group: Sequence[Buyer], question: Question, law: Law) -> list[tuple[float, str]]:
    """The smallest sum for which a plan is possible on a machine, and a description of that plan.

    The plan meets the other constraints of the question. If no plan does, the result is empty.
    """
    able = [each for each in group if each.least_tokens <= MOST_EPOCHS * question.unique_tokens]
    if question.deadline_hours is not None:
        able = [each for each in able if each.hours.at(each.least_tokens) <= question.deadline_hours]
    if not able:
        return []

    def sum_for(each: Buyer) -> float:
        return each.usd.at(each.least_tokens) / (1 - question.reserve)

    cheapest = min(sum_for(each) for each in able)
    near = [each for each in able if sum_for(each) <= cheapest * (1 + SAME_DOLLARS)]
    best = min(near, key=lambda each: each.loss(law, each.least_tokens))
    model = f"{best.candidate.size} with the {best.candidate.recipe} recipe on {quantity(best.least_tokens)} tokens"
    loss = f"loss {best.loss(law, best.least_tokens):.2f} ± {best.error(law, best.least_tokens):g}"
    return [(sum_for(best), f"{model}, {best.machine.name}: {loss}")]


def _plan(buyer: Buyer, most: float, limit: str, question: Question, law: Law) -> Plan:
    """The plan of a candidate with at most `most` tokens, rounded down to whole steps."""
    machine, candidate = buyer.machine, buyer.candidate
    money = question.usd * (1 - question.reserve)
    per_step = buyer.settings.batch.tokens_per_step
    steps = max(int(most // per_step), 1)
    tokens = float(steps * per_step)
    row = bill(machine, buyer.settings, buyer.speed, buyer.measured, buyer.prices, tokens, machine.usd)
    reserve = row.usd * question.reserve / (1 - question.reserve)
    lucky, unlucky = buyer.cheap.tokens_for(money), buyer.expensive.tokens_for(money)
    highest = buyer.most_tokens(question) if limit == "money" else most
    error = buyer.error(law, tokens)
    return Plan(
        machine=machine,
        candidate=candidate,
        flags=(*candidate.flags, *buyer.flags, f"--train.steps={steps}"),
        tokens=tokens,
        steps=steps,
        hours=row.hours,
        usd=row.usd + reserve,
        parts=row.parts | {RESERVE: reserve},
        restarts=row.restarts,
        loss=buyer.loss(law, tokens),
        error=error,
        best=buyer.loss(law, max(tokens, min(lucky, highest))) - error,
        worst=buyer.loss(law, min(tokens, unlucky)) + error if unlucky > per_step else None,
        speed=buyer.speed,
        k=law.multiplier(candidate.in_law, candidate.non_embedding),
        limit=limit,
    )


def _ordered(plans: Sequence[Plan]) -> tuple[list[Plan], int]:
    """Sorts plans. First come the plans that equal the best plan within their errors, by dollars and then by risk.

    The others follow by loss.
    """
    if not plans:
        return [], 0
    first = min(plans, key=lambda each: each.loss)
    equal = [each for each in plans if each.loss - first.loss < max(each.error, first.error)]
    cheapest = min(each.spent for each in equal)

    def rank(each: Plan) -> tuple[float, bool, float]:
        is_same = each.spent <= cheapest * (1 + SAME_DOLLARS)
        return (0.0 if is_same else each.spent, each.machine.spot, each.loss)

    rest = sorted((each for each in plans if each not in equal), key=lambda each: each.loss)
    return sorted(equal, key=rank) + rest, len(equal)
