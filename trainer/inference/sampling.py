"""Parses command lines of text generation. Imports no torch."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from core import urls
from core.errors import ConfigError
from core.settings import loader
from core.settings.inference import Sampling


def split_arguments(arguments: Sequence[str], usage: str) -> tuple[str, list[str]]:
    """Splits a command line into its model and its flags. Raises ConfigError unless there is exactly one model."""
    names = [argument for argument in arguments if not argument.startswith("--")]
    if len(names) != 1:
        raise ConfigError(f"give exactly one checkpoint or run, not {len(names)}: {usage}")
    urls.check_model(names[0])
    return names[0], [argument for argument in arguments if argument.startswith("--")]


def load(schema: type, flags: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Loads settings. In stop texts, \\n becomes a line break and \\t a tab. Raises ConfigError."""
    return _unescaped(loader.load(schema, flags, environment))


def changed(sampling: Sampling, key: str, text: str, where: str) -> Sampling:
    """Replaces one setting by a value that a user typed. Raises a ConfigError that names `where`."""
    found = _unescaped(loader.from_dict(Sampling, {key: text}, where))
    return dataclasses.replace(sampling, **{key: getattr(found, key)})


def sampling_of(settings: Sampling, **changes: Any) -> Sampling:
    """The sampling settings out of all settings of a program, with `changes` applied."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Sampling)}
    return Sampling(**fields | changes)


def _unescaped(settings: Any) -> Any:
    stop = tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in settings.stop)
    return dataclasses.replace(settings, stop=stop)
