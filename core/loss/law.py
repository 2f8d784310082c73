"""Predicts the final validation loss of a pretraining run from its size, its tokens and its recipe.

    law = load()
    law.loss("track3-muon", non_embedding=84_934_656, tokens=1.7e9)      3.28

L = E + A / N^a + B / (k D)^b (Hoffmann et al. 2022, with a multiplier k per recipe). N is the number of parameters
without embedding and output layer, and D the number of tokens, both in billions. L is in nats per GPT-2 token on
FineWeb. `python -m bench.fit_loss` fits the other constants to public runs (core/loss/runs.csv).
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).parent
RUNS, LAW = DATA / "runs.csv", DATA / "law.json"
SCALE = "FineWeb"

# The advantage of an optimizer over AdamW shrinks as models grow. Up to the largest size at which a recipe was
# measured, its multiplier is k. Above this size, the logarithm of the advantage falls linearly in the logarithm of the
# number of parameters. At HALF_AT billion parameters, half of this logarithm is left (Wen et al. 2025, arXiv
# 2509.02046: 1.4 at 0.1B, 1.1 at 1.2B; Marin, 2025-06: 1.27 at 130M, 1.24 at 1.2B).
HALF_AT = 1.2
# Expected errors of a prediction, in nats (see `Law.error`). bench.fit_loss measures KNOWN_RECIPE.
KNOWN_RECIPE, KNOWN_CLASS, OUTSIDE, UNKNOWN_RECIPE = 0.015, 0.02, 0.04, 0.09
LEAST_TOKENS = 1.6e9  # a prediction for fewer tokens has the error OUTSIDE; the shortest fitted run has 1.41e9
SIZE_TOLERANCE = 1.1  # a size counts as measured if it is within this factor of a measured size


@dataclass(frozen=True)
class Recipe:
    """The fitted values of a recipe. `k` multiplies the number of tokens.

    `smallest` and `largest` are the sizes of the smallest and the largest measured model; a size is the number of
    parameters without embeddings. `family` is the optimizer of the recipe. A prediction is more reliable for a size
    that other recipes of the same family cover (`Law.error`).
    """

    k: float
    runs: int
    smallest: float
    largest: float
    family: str


@dataclass(frozen=True)
class Law:
    """A fitted law. `gain` is Muon's multiplier over AdamW on the same architecture; `date` is the date of the fit."""

    date: str
    constants: Mapping[str, float]
    gain: float
    recipes: Mapping[str, Recipe]

    def multiplier(self, recipe: str, non_embedding: float) -> float:
        """The multiplier k of a recipe for a size of the model. Raises KeyError for a recipe that was not fitted."""
        known = self.recipes[recipe]
        top = max(HALF_AT, known.largest / 1e9)
        size = min(max(non_embedding, known.largest) / 1e9, top)
        if known.family == "adamw" or top <= known.largest / 1e9:
            return known.k
        fallen = 0.5 * math.log(size * 1e9 / known.largest) / math.log(top * 1e9 / known.largest)
        return known.k * self.gain**-fallen

    def loss(self, recipe: str, non_embedding: float, tokens: float) -> float:
        """Validation loss in nats per token."""
        by = self.constants
        effective = self.multiplier(recipe, non_embedding) * tokens / 1e9
        return by["E"] + by["A"] * (non_embedding / 1e9) ** -by["a"] + by["B"] * effective ** -by["b"]

    def gain_of_tokens(self, seen: float, end: float) -> float:
        """Nats by which the loss falls between two numbers of tokens if k is 1. The size of the model has no effect."""
        by = self.constants
        return by["B"] * ((seen / 1e9) ** -by["b"] - (end / 1e9) ** -by["b"])

    def error(self, recipe: str, non_embedding: float, tokens: float) -> float:
        """Likely error of `loss` in nats."""
        known = self.recipes.get(recipe)
        if known is None:
            return UNKNOWN_RECIPE
        family = [each for each in self.recipes.values() if each.family == known.family]
        smallest, largest = min(each.smallest for each in family), max(each.largest for each in family)
        if tokens < LEAST_TOKENS or not _within(non_embedding, smallest, largest):
            return OUTSIDE
        return KNOWN_RECIPE if _within(non_embedding, known.smallest, known.largest) else KNOWN_CLASS


def _within(size: float, smallest: float, largest: float) -> bool:
    return smallest / SIZE_TOLERANCE <= size <= largest * SIZE_TOLERANCE


@functools.cache
def load(path: Path = LAW) -> Law:
    """The fitted law that is stored in `path`."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    return Law(
        date=stored["date"],
        constants=stored["constants"],
        gain=stored["muon_over_adamw"],
        recipes={name: Recipe(**fields) for name, fields in stored["recipes"].items()},
    )
