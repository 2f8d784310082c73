"""Lists the models that a plan chooses from: the project's recipes in several sizes, with their settings.

Each model is a preset of trainer/configs with flags, so that a user can type the command of a plan. In the law, a
recipe has the name of the public runs that the preset follows.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.gpus import memory_bytes
from core.loss import law
from core.settings import loader, memory
from core.settings.model import matrix_parameters, parameters
from core.settings.training import PretrainConfig

ROOT = Path(__file__).parents[2]
CONFIGS = "trainer/configs"
SIZES = ("124M", "254M", "350M", "774M", "1.5B")
# Largest useful number of tokens per step (nanochat #850, 2026-09): 2^19 up to 350M parameters, and 2^20 above.
_BATCH_CAPS = ((360e6, 1 << 19), (float("inf"), 1 << 20))
RECOMPUTE_SPEED = 3 / 4  # computing activations again takes a third more work


@dataclass(frozen=True)
class Candidate:
    """A recipe in one size. `in_law` is its name in the law; `flags` change the preset `config`."""

    recipe: str
    in_law: str
    size: str
    config: str
    flags: tuple[str, ...]
    settings: PretrainConfig

    @property
    def trained(self) -> float:
        """The number of parameters in matrices of the blocks and the output layer. Tokens per parameter refer to it."""
        return float(matrix_parameters(self.settings.model))

    @property
    def non_embedding(self) -> float:
        model = self.settings.model
        return self.trained - model.padded_vocab_size * model.width

    @property
    def parameters(self) -> int:
        return parameters(self.settings.model)

    @property
    def batch_cap(self) -> int:
        return next(cap for most, cap in _BATCH_CAPS if self.parameters <= most)


@dataclass(frozen=True)
class Fit:
    """Settings with which a candidate fits a GPU.

    `flags` are added to the candidate's flags. `speed` is the share of the candidate's speed that remains.
    """

    settings: PretrainConfig
    flags: tuple[str, ...]
    speed: float


# Layers and width of the speedrun recipe by size. The recipe was published at 124M only. Larger sizes keep its learning
# rates and its head size of 128, and were not tuned. 52 x 1536 is the shape of the public 1.5B runs.
_SPEEDRUN = {"124M": (12, 768), "254M": (12, 1024), "350M": (24, 1024), "774M": (36, 1280), "1.5B": (52, 1536)}
_GPT2 = {"124M": "gpt2-124m", "350M": "gpt2-350m", "774M": "gpt2-774m", "1.5B": "gpt2-1.5b"}
RECIPES = {"speedrun": "track3-muon", "gpt2": "gpt2-adamw"}


@functools.cache
def candidates() -> tuple[Candidate, ...]:
    """All recipes in all sizes, smallest first. Raises ConfigError if a preset is missing or wrong."""
    return tuple(_candidates())


def _candidates() -> Iterator[Candidate]:
    for size in SIZES:
        layers, width = _SPEEDRUN[size]
        flags = (f"--model.layers={layers}", f"--model.width={width}", f"--model.heads={width // 128}")
        yield _candidate("speedrun", size, "speedrun-162m", () if size == "124M" else flags)
        if size in _GPT2:
            yield _candidate("gpt2", size, _GPT2[size], ())


def _candidate(recipe: str, size: str, preset: str, flags: tuple[str, ...]) -> Candidate:
    config = f"{CONFIGS}/{preset}.yaml"
    flags = (*flags, "--batch.micro_batch_size=0")
    places = ["--run.url=plan", "--data.url=plan"]  # required settings, which a plan does not use
    settings = loader.load(PretrainConfig, [str(ROOT / config), *flags, *places], {})
    return Candidate(recipe, RECIPES[recipe], size, config, flags, settings)


def fit(candidate: Candidate, gpu: str, world: int) -> Fit | str:
    """The fastest settings with which a candidate fits `world` GPUs of a kind, or the reason why no settings fit."""
    if candidate.settings.batch.tokens_per_step > candidate.batch_cap:
        return f"batch.tokens_per_step is above {candidate.batch_cap}, which wastes tokens at this size"
    if memory_bytes(gpu) is None:
        return f"the memory of {gpu} is not known (core/gpus.py)"
    recompute = {"train.activation_checkpointing": True}
    tries: list[dict[str, object]] = [{}, recompute]
    if world > 1:
        tries = [{}, *({"optimizer.zero": 1} | more for more in ({}, recompute)), {"optimizer.zero": 2} | recompute]
    said = ""
    for changes in tries:
        settings = candidate.settings
        for key, value in changes.items():
            settings = memory.changed_to(settings, key, value)
        fits, said = memory.verdict(settings, settings.model, gpu, world) or (False, "")
        if fits:
            flags = tuple(f"--{key}={str(value).lower()}" for key, value in changes.items())
            return Fit(settings, flags, RECOMPUTE_SPEED if settings.train.activation_checkpointing else 1.0)
    return f"does not fit: {said.partition(';')[0]}"


def known_to(found: law.Law) -> dict[str, str]:
    """A line about each recipe that can be planned: its multiplier, and the runs that the multiplier comes from."""
    lines = {}
    for recipe, name in RECIPES.items():
        known = found.recipes[name]
        sizes = f"{known.smallest / 1e6:.0f}M" + (
            f" to {known.largest / 1e6:.0f}M" if known.largest > known.smallest else ""
        )
        runs = f"{known.runs} public run{'s' * (known.runs != 1)}"
        preset = next(each.config for each in candidates() if each.recipe == recipe)
        lines[recipe] = (
            f"{recipe}: the recipe of {preset}; a token counts {known.k:.2f} times as much as with the law's reference "
            f"recipe, by {runs} of {sizes} parameters without embeddings"
        )
    return lines
