"""Fits the law to the user's own runs: the scale of their validation sets, and the multipliers of their recipes.

    fitted, said = refit(law.load(), runs)

The loss of a run differs from the law for two reasons. First, the run's tokens are another set of texts. This shifts
the losses of all runs on one set by the same offset. Second, the multiplier k of the recipe has an error. Offsets and
multipliers are fitted together by least squares, with an expected size for each (SET_ERROR, K_ERROR). One run alone
mostly moves the offset of its set. Runs of several recipes on one set also move the multipliers of these recipes.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from core.loss.law import Law
from core.run.model import Run
from core.settings import loader
from costs.plan import recipes
from costs.plan.recipes import Candidate

# RUN_ERROR: error of the law for one run, in nats (bench/results/2026-11-30-fit-loss.json). SET_ERROR: expected size of
# the offset of another set of texts, in nats.
RUN_ERROR, SET_ERROR = 0.0104, 0.5
# The expected error of the logarithm of k. For a run of three billion tokens, it equals 0.015 nats, which is the law's
# error for a recipe at the model sizes of its public runs.
K_ERROR = 0.15
ROUNDS = 5  # rounds of linearization


@dataclass(frozen=True)
class OwnRun:
    """A finished run with the recipe of a plan. `data` is the URL of its tokens, `loss` its last validation loss."""

    url: str
    candidate: Candidate
    tokens: float
    loss: float
    data: str


@dataclass(frozen=True)
class Refit:
    """A law with multipliers from the user's own runs.

    `offsets` holds, by the URL of the tokens, the pair (nats above the law, error).
    """

    law: Law
    offsets: Mapping[str, tuple[float, float]]
    notes: tuple[str, ...] = ()


def own_run(run: Run) -> OwnRun | None:
    """The run as a data point of the fit. None if the run is unfinished, or does not have the recipe of a plan."""
    ended = run.segments[-1].end if run.segments else None
    losses, trained = run.points("eval"), run.points("train")
    candidate = _candidate(run.config)
    if candidate is None or not losses or not trained or not ended or ended.get("reason") != "finished":
        return None
    last, tokens = losses[-1], trained[-1].values["tokens"]
    data = run.config.get("data")
    url = data.get("url") if isinstance(data, Mapping) else None
    is_last = run.last_step is not None and last.step == run.last_step
    if not (is_last and tokens and math.isfinite(last.values["val_loss"]) and isinstance(url, str)):
        return None
    return OwnRun(run.url, candidate, float(tokens), float(last.values["val_loss"]), url)


def _candidate(config: Mapping[str, object]) -> Candidate | None:
    """The candidate with the model and the optimizer of a run."""
    model, optimizer = config.get("model"), config.get("optimizer")
    if not isinstance(model, Mapping) or not isinstance(optimizer, Mapping):
        return None
    for each in recipes.candidates():
        theirs = loader.to_dict(each.settings)
        same_model = all(model.get(key) == value for key, value in theirs["model"].items() if key in model)
        rates = ("name", "lr", "muon_lr")
        if same_model and model and all(optimizer.get(key) == theirs["optimizer"][key] for key in rates):
            return each
    return None


def refit(law: Law, runs: Sequence[OwnRun]) -> Refit:
    """The law with multipliers that were fitted to the user's runs, and the offsets of the runs' token sets."""
    if not runs:
        return Refit(law, {})
    sets = list(dict.fromkeys(each.data for each in runs))
    names = list(dict.fromkeys(each.candidate.in_law for each in runs))
    known = np.zeros(len(names))  # changes of log k for each recipe
    offsets, covariance = np.zeros(len(sets)), np.zeros((0, 0))
    for _ in range(ROUNDS):
        fitted = _with_k(law, names, known)
        rows, wanted = [], []
        for each in runs:
            candidate = each.candidate
            predicted = fitted.loss(candidate.in_law, candidate.non_embedding, each.tokens)
            row = np.zeros(len(sets) + len(names))
            row[sets.index(each.data)] = 1.0
            at = names.index(candidate.in_law)
            row[len(sets) + at] = _slope(fitted, candidate, each.tokens)
            rows.append(row / RUN_ERROR)
            wanted.append((each.loss - predicted + row[len(sets) + at] * known[at]) / RUN_ERROR)
        beliefs = np.concatenate([np.full(len(sets), 1 / SET_ERROR), np.full(len(names), 1 / K_ERROR)])
        matrix = np.vstack([np.array(rows), np.diag(beliefs)])
        right = np.concatenate([wanted, np.zeros(len(beliefs))])
        covariance = np.linalg.inv(matrix.T @ matrix)
        found = covariance @ matrix.T @ right
        offsets, known = found[: len(sets)], found[len(sets) :]
    errors = np.sqrt(np.diag(covariance))
    by_set = {url: (float(offsets[at]), float(errors[at])) for at, url in enumerate(sets)}
    fitted = _with_k(law, names, known)
    return Refit(fitted, by_set, tuple(_notes(law, fitted, runs, by_set)))


def _with_k(law: Law, names: Sequence[str], changes: Iterable[float]) -> Law:
    changed = {
        name: dataclasses.replace(law.recipes[name], k=law.recipes[name].k * math.exp(change))
        for name, change in zip(names, changes, strict=True)
    }
    return dataclasses.replace(law, recipes={**law.recipes, **changed})


def _slope(law: Law, candidate: Candidate, tokens: float) -> float:
    """The change of the loss in nats when log k grows by 1."""
    by = law.constants
    effective = law.multiplier(candidate.in_law, candidate.non_embedding) * tokens / 1e9
    return -by["b"] * by["B"] * effective ** -by["b"]


def _notes(law: Law, fitted: Law, runs: Sequence[OwnRun], offsets: Mapping[str, tuple[float, float]]) -> Iterable[str]:
    count = f"{len(runs)} finished run{'s' * (len(runs) != 1)}"
    changed = {
        recipe: (law.recipes[name].k, fitted.recipes[name].k)
        for recipe, name in recipes.RECIPES.items()
        if name in {each.candidate.in_law for each in runs}
    }
    said = ", ".join(f"{recipe} {new:.2f} ({old:.2f} by public runs)" for recipe, (old, new) in changed.items())
    yield f"own losses: token multipliers by {count} of yours: {said}"
    for url, (offset, error) in offsets.items():
        where = "/".join(url.rstrip("/").split("/")[-2:])
        yield f"own losses: on {where} they are {offset:+.3f} ± {error:.3f} nats from this scale"
