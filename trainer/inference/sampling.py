"""How the next token is chosen, and when to stop. Torch-free: read before a model is opened."""

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
    """One request's settings, applied in the order in which they stand here, as `transformers` does."""

    tokens: int = setting(128, "most new tokens; prompt and answer end at the model's context", ge=1)
    repetition_penalty: float = setting(
        1.0,
        "above 1: logits of tokens already there are divided (if negative, multiplied) by it (Keskar et al. 2019)",
        gt=0,
    )
    temperature: float = setting(0.8, "logits are divided by it; 0: always the likeliest token", ge=0)
    top_k: int = setting(50, "only the k likeliest tokens; 0: all", ge=0)
    top_p: float = setting(
        1.0, "the likeliest tokens that have this probability together (Holtzman et al. 2020)", gt=0, le=1
    )
    min_p: float = setting(
        0.0, "only tokens with this share of the likeliest one's probability (Nguyen et al. 2024)", ge=0, le=1
    )
    seed: int | None = setting(None, "the same seed gives the same text; none: another one each time")
    stop: tuple[str, ...] = setting((), "texts, by commas, before which to stop; \\n is a line break")

    def __post_init__(self):
        super().__post_init__()
        require(all(self.stop), "stop", f"is {self.stop}, must not hold an empty text")


@dataclass(frozen=True)
class Machine(Bounded):
    """Where and in which numbers a model runs."""

    device: Literal["auto", "cuda", "cpu"] = setting("auto", "auto: a GPU if there is one")
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", "auto: bf16 on a GPU, fp32 on a CPU")
    rows: int = setting(16, "texts that are computed together; more wait", ge=1)


def split_arguments(arguments: Sequence[str], usage: str) -> tuple[str, list[str]]:
    """The one checkpoint, and the flags. Raises ConfigError."""
    names = [argument for argument in arguments if not argument.startswith("--")]
    if len(names) != 1:
        raise ConfigError(f"give exactly one checkpoint or run, not {len(names)}: {usage}")
    urls.check_model(names[0])
    return names[0], [argument for argument in arguments if argument.startswith("--")]


def load(schema: type, flags: Sequence[str], environment: Mapping[str, str]) -> Any:
    """`config.load`, with \\n and \\t in stop texts as what they stand for. Raises ConfigError."""
    return _unescaped(loader.load(schema, flags, environment))


def changed(sampling: Sampling, key: str, text: str, where: str) -> Sampling:
    """One setting replaced by what a user wrote. Raises ConfigError naming `where`."""
    found = _unescaped(loader.from_dict(Sampling, {key: text}, where))
    return dataclasses.replace(sampling, **{key: getattr(found, key)})


def sampling_of(settings: Sampling, **changes: Any) -> Sampling:
    """The part of larger settings that is about sampling."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Sampling)}
    return Sampling(**fields | changes)


def _unescaped(settings: Any) -> Any:
    stop = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in settings.stop)
    return dataclasses.replace(settings, stop=stop)
