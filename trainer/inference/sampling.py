"""Declares the settings of text generation and parses command lines. Imports no torch."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from core import urls
from core.errors import ConfigError
from core.settings import loader
from core.settings.loader import Bounded, require, setting


@dataclass(frozen=True)
class Sampling(Bounded):
    """Sampling settings of one request, applied in this order, as in `transformers`."""

    max_tokens: int = setting(128, "maximum number of new tokens; a text also ends at the model's context", ge=1)
    repetition_penalty: float = setting(
        1.0,
        "divides the logits of tokens that the text contains (multiplies negative logits) (Keskar et al. 2019); 1: off",
        ge=0.01,
        le=100,
    )
    temperature: float = setting(0.8, "divides the logits; 0: always choose the likeliest token", ge=0)
    top_k: int = setting(50, "choose among the k likeliest tokens; 0: all", ge=0)
    top_p: float = setting(
        1.0, "choose among the likeliest tokens with this total probability (Holtzman et al. 2020)", gt=0, le=1
    )
    min_p: float = setting(
        0.0,
        "least probability of a token, as a fraction of the likeliest token's (Nguyen et al. 2024); 0: off",
        ge=0,
        le=1,
    )
    seed: int | None = setting(None, "the same seed gives the same text; none: a new seed each time")
    stop: tuple[str, ...] = setting((), "texts before which generation stops, separated by commas; \\n is a line break")

    def __post_init__(self):
        super().__post_init__()
        require(all(self.stop), "stop", f"is {self.stop}, must not hold an empty text")


@dataclass(frozen=True)
class InferenceOptions(Bounded):
    """Device, precision and batch size of inference."""

    device: Literal["auto", "cuda", "cpu"] = setting("auto", "auto: a GPU if there is one")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "auto: bf16 on a GPU, fp32 on a CPU")
    max_batch_size: int = setting(16, "number of texts computed together; further requests wait", ge=1)


def split_arguments(arguments: Sequence[str], usage: str) -> tuple[str, list[str]]:
    """Splits a command line into its model and its flags. Raises ConfigError unless there is exactly one model."""
    names = [argument for argument in arguments if not argument.startswith("--")]
    if len(names) != 1:
        raise ConfigError(f"give exactly one checkpoint or run, not {len(names)}: {usage}")
    urls.check_model(names[0])
    return names[0], [argument for argument in arguments if argument.startswith("--")]


def load(schema: type, flags: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Loads settings, with \\n and \\t in stop texts unescaped. Raises ConfigError."""
    return _unescaped(loader.load(schema, flags, environment))


def changed(sampling: Sampling, key: str, text: str, where: str) -> Sampling:
    """Replaces one setting by a value that a user typed. Raises ConfigError that names `where`."""
    found = _unescaped(loader.from_dict(Sampling, {key: text}, where))
    return dataclasses.replace(sampling, **{key: getattr(found, key)})


def sampling_of(settings: Sampling, **changes: Any) -> Sampling:
    """The sampling settings among all settings of a program, with `changes`."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Sampling)}
    return Sampling(**fields | changes)


def _unescaped(settings: Any) -> Any:
    stop = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in settings.stop)
    return dataclasses.replace(settings, stop=stop)
