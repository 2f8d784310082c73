"""Fits the law of the loss to public runs, and measures how well it predicts runs that were not fitted.

    python -m bench.fit_loss                                  print the fit and its errors
    python -m bench.fit_loss --write                          … and store the constants in core/loss/law.json
    python -m bench.fit_loss --out=bench/results/DATE-fit-loss.json      … and a record

Reads core/loss/runs.csv. Rows marked `fit` take part in the fit. Rows marked `check` are only predicted. The constants
are found by damped Gauss-Newton, which minimises the squared residuals, each divided by the noise of a run. Some
recipes have only one run, so there are weak priors: E is 1.7 ± 0.2, the exponents are 0.34 ± 0.1, and ln k is 0 ± 0.5.
The ratio of the exponents follows the minima of nanochat's iso-FLOP curves, which are in the same file. The losses of
these curves are on another scale, but their minima show how compute is divided between size and tokens. The multiplier
k of the recipe REFERENCE is 1.

To measure errors, each run is left out in turn, and everything is fitted again. If the left-out run is the only run of
its recipe, the k of this recipe is that of the prior, 1. The slope over tokens is determined by only two runs of one
recipe (1.7B and 10B tokens). If one of them is left out, the slope is a guess. So the errors are also computed with the
`check` rows in the fit.
"""

import csv
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np

from bench import harness
from core.loss import law
from core.loss.law import Law, Recipe

REFERENCE = "muon-modern"
ON_ADAMW = "adam-modern"  # the recipe with REFERENCE's architecture and tuning, but with Adam
NOISE = 0.003  # difference in nats between runs that differ in the seed or in details
PRIORS = {"E": (1.7, 0.2), "a": (0.34, 0.1), "b": (0.34, 0.1)}
PRIOR_LN_K = 0.5
ISO_FLOP = "nanochat-iso-"
SHAPE_SD = 0.15  # of ln(b / a)
SHAPE = ("E", "ln A", "ln B", "a", "b")
START = (1.9, math.log(0.4), math.log(0.6), 0.34, 0.3)
_FAMILIES = (("soap", "soap"), ("muon", "muon"), ("shampoo", "shampoo"), ("adam", "adamw"))


@dataclass(frozen=True)
class Row:
    """A run of the table. `size` and `tokens` are in billions."""

    name: str
    recipe: str
    family: str
    size: float
    tokens: float
    loss: float


def main() -> None:
    parser = harness.options(__doc__)
    parser.add_argument("--write", action="store_true", help="store the fitted constants for `make plan`")
    options = parser.parse_args()
    rows, unseen = read("fit"), read("check")
    found = fit(rows)
    results = {
        **harness.header("numpy"),
        "command": "python -m bench.fit_loss " + " ".join(sys.argv[1:]),
        "runs": len(rows),
        "recipes": len({row.recipe for row in rows}),
        "constants": found.constants,
        "in_sample": [_error(found, row) for row in rows],
        "checked": [_error(found, row) for row in unseen],
        "left_out": left_out(rows),
        "left_out_with_checks": left_out([*rows, *unseen]),
        "variants": [_variant(rows, unseen, noise, shape) for noise in (0.003, 0.01) for shape in (True, False)],
        "multipliers": {name: recipe.k for name, recipe in found.recipes.items()},
    }
    if options.write:
        law.LAW.write_text(json.dumps(document(found), indent=1) + "\n", encoding="utf-8")
    harness.finish(results, show, options.out)


def read(use: str) -> list[Row]:
    """The runs of the table that are marked `use`."""
    with law.RUNS.open(newline="", encoding="utf-8") as file:
        return [
            Row(
                each["name"],
                each["recipe"],
                _family(each["optimizer"]),
                float(each["params_nonembed"]) / 1e9,
                float(each["tokens"]) / 1e9,
                float(each["val_loss"]),
            )
            for each in csv.DictReader(file)
            if each["use"] == use
        ]


def _iso_flop_shape() -> float:
    """ln(b / a), from the minima of iso-FLOP curves.

    For compute C, the best N grows as C^(b / (a + b)), and the best D as C^(a / (a + b)).
    """
    with law.RUNS.open(newline="", encoding="utf-8") as file:
        minima = [each for each in csv.DictReader(file) if each["name"].startswith(ISO_FLOP)]
    compute = [math.log(float(each["name"].removeprefix(ISO_FLOP))) for each in minima]
    by_size, by_tokens = (
        np.polyfit(compute, [math.log(float(each[column])) for each in minima], 1)[0]
        for column in ("params_nonembed", "tokens")  # N in these curves includes the output layer
    )
    return float(math.log(by_size / by_tokens))


def _family(optimizer: str) -> str:
    return next(family for word, family in _FAMILIES if re.search(word, optimizer, re.I))


def fit(rows: Sequence[Row], noise: float = NOISE, has_shape: bool = True) -> Law:
    """The law that is fitted to these runs. If `has_shape` is true, the prior from nanochat's curves is used."""
    shape = _iso_flop_shape() if has_shape else None
    free = sorted({row.recipe for row in rows} - {REFERENCE})
    values = np.array([*START, *np.zeros(len(free))])
    damping = 1e-3
    for _ in range(500):
        residuals, slopes = _residuals(rows, free, values, noise, shape)
        now = float(residuals @ residuals)
        normal = slopes.T @ slopes
        step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -slopes.T @ residuals)
        after = _residuals(rows, free, values + step, noise, shape)[0]
        if float(after @ after) < now:
            values, damping = values + step, damping / 3
            if now - float(after @ after) < 1e-12 * now:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    by = dict(zip(SHAPE, values[:5].tolist(), strict=True))
    k = {REFERENCE: 1.0} | {name: math.exp(ln_k) for name, ln_k in zip(free, values[5:].tolist(), strict=True)}
    constants = {"E": by["E"], "A": math.exp(by["ln A"]), "B": math.exp(by["ln B"])}
    constants |= {name: by[name] for name in ("a", "b")}
    return Law(
        date=date.today().isoformat(),
        constants=constants,
        gain=1 / k.get(ON_ADAMW, 1.0),
        recipes={name: _recipe([row for row in rows if row.recipe == name], k[name]) for name in sorted(k)},
    )


def _recipe(rows: Sequence[Row], k: float) -> Recipe:
    sizes = [row.size * 1e9 for row in rows]
    return Recipe(k, len(rows), min(sizes, default=0.0), max(sizes, default=0.0), rows[0].family if rows else "muon")


def _residuals(
    rows: Sequence[Row], free: Sequence[str], values: np.ndarray, noise: float, shape: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The residuals of the runs and of the priors, each divided by its error.

    The second array holds the derivatives of the residuals by each value.
    """
    E, ln_A, ln_B, a, b = values[:5]
    place = {name: 5 + index for index, name in enumerate(free)}
    residuals, slopes = [], []
    for row in rows:
        ln_kD = math.log(row.tokens) + (values[place[row.recipe]] if row.recipe in place else 0.0)
        by_size, by_tokens = math.exp(ln_A - a * math.log(row.size)), math.exp(ln_B - b * ln_kD)
        slope = np.zeros(len(values))
        slope[:5] = 1.0, by_size, by_tokens, -math.log(row.size) * by_size, -ln_kD * by_tokens
        if row.recipe in place:
            slope[place[row.recipe]] = -b * by_tokens
        residuals.append((E + by_size + by_tokens - row.loss) / noise)
        slopes.append(slope / noise)
    priors = [(SHAPE.index(name), *prior) for name, prior in PRIORS.items()]
    priors += [(index, 0.0, PRIOR_LN_K) for index in place.values()]
    for index, mean, sd in priors:
        slope = np.zeros(len(values))
        slope[index] = 1 / sd
        residuals.append((values[index] - mean) / sd)
        slopes.append(slope)
    if shape is not None:
        slope = np.zeros(len(values))
        slope[3:5] = -1 / a / SHAPE_SD, 1 / b / SHAPE_SD
        residuals.append((math.log(b / a) - shape) / SHAPE_SD if min(a, b) > 0 else math.inf)
        slopes.append(slope)
    return np.array(residuals), np.array(slopes)


def _error(found: Law, row: Row) -> dict[str, Any]:
    """The predicted loss of a run minus its measured loss. k is 1 for a recipe that was not fitted."""
    k = found.recipes[row.recipe].k if row.recipe in found.recipes else 1.0
    by = found.constants
    predicted = by["E"] + by["A"] * row.size ** -by["a"] + by["B"] * (k * row.tokens) ** -by["b"]
    return {"run": row.name, "recipe": row.recipe, "measured": row.loss, "error": predicted - row.loss}


def left_out(rows: Sequence[Row], noise: float = NOISE, has_shape: bool = True) -> list[dict[str, Any]]:
    """For each run, the error of the law that was fitted to all other runs.

    `recipe_seen` says whether another run has the same recipe.
    """
    counts = Counter(row.recipe for row in rows)
    return [
        _error(fit([other for other in rows if other is not row], noise, has_shape), row)
        | {"recipe_seen": counts[row.recipe] > 1}
        for row in rows
    ]


def _variant(rows: Sequence[Row], unseen: Sequence[Row], noise: float, has_shape: bool) -> dict[str, Any]:
    """The errors of a variant of the fit, which shows the effect of one choice. `make plan` does not use it."""
    found, without = fit(rows, noise, has_shape), left_out(rows, noise, has_shape)
    return {
        "noise": noise,
        "iso_flop_shape": has_shape,
        "constants": found.constants,
        "left_out_recipe_seen_rms": rms([each for each in without if each["recipe_seen"]]),
        "checked_rms": rms([_error(found, row) for row in unseen]),
    }


def document(found: Law) -> dict[str, Any]:
    rounded = {name: round(value, 6) for name, value in found.constants.items()}
    return {
        "format": "loss-law",
        "version": 1,
        "date": found.date,
        "scale": "nats per GPT-2 token on the FineWeb validation tokens of modded-nanogpt; N and D in billions",
        "constants": rounded,
        "muon_over_adamw": round(found.gain, 4),
        "recipes": {name: vars(each) | {"k": round(each.k, 4)} for name, each in found.recipes.items()},
    }


def rms(errors: Sequence[Mapping[str, Any]]) -> float:
    return math.sqrt(sum(each["error"] ** 2 for each in errors) / len(errors))


def show(results: Mapping[str, Any]) -> None:
    by = results["constants"]
    print(f"{results['runs']} runs of {results['recipes']} recipes")
    print("L = {E:.3f} + {A:.3f} / N^{a:.3f} + {B:.3f} / (k D)^{b:.3f}, N and D in billions".format(**by))
    print("k  " + ", ".join(f"{name} {k:.2f}" for name, k in results["multipliers"].items()))
    print("errors in nats, predicted minus measured")
    _print("in the sample", results["in_sample"], False)
    _print("never fitted", results["checked"], True)
    for key, table in (("left_out", "the table"), ("left_out_with_checks", "the table with the check rows")):
        for title, seen in (("recipe seen in other runs", True), ("recipe not seen", False)):
            errors = [each for each in results[key] if each["recipe_seen"] is seen]
            _print(f"left out of {table}, {title}", errors, seen)
    for each in results["variants"]:
        print(
            "with noise {noise} and{0} the shape of iso-FLOP curves: left out, recipe seen: rms "
            "{left_out_recipe_seen_rms:.4f}; never fitted: rms {checked_rms:.4f}".format(
                "" if each["iso_flop_shape"] else " without", **each
            )
        )


def _print(title: str, errors: Sequence[Mapping[str, Any]], has_rows: bool) -> None:
    print(f"{title}: rms {rms(errors):.4f} over {len(errors)} runs")
    for each in errors if has_rows else ():
        print(f"  {each['run']:<24} {each['measured']:.4f}  {each['error']:+.4f}")


if __name__ == "__main__":
    main()
