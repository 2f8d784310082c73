"""Converts the texts of flags, variables and YAML files to the types that settings declare."""

import difflib
import json
import types
import typing
from typing import Any

from core.errors import ConfigError


def convert(value: Any, kind: Any, key: str, where: str) -> Any:
    """Convert `value` of the setting `key`, given at `where`, to its type `kind`. Raises ConfigError."""
    if isinstance(value, str):
        value = value.strip("\r\n")  # strips line ends of Windows files and of `$(cat file)`
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.strip().lower() in ("none", "null")):
            return None
        kinds = [arm for arm in typing.get_args(kind) if arm is not types.NoneType]
        for arm in kinds[:-1]:
            try:
                return convert(value, arm, key, where)
            except ConfigError:
                continue
        return convert(value, kinds[-1], key, where)
    if origin is typing.Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if str(value) in choices:
            return choices[str(value)]
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise ConfigError(
            f"{where}: {key} is {value!r}, must be one of {', '.join(choices)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    if origin is tuple:
        return tuple(convert(item, typing.get_args(kind)[0], key, where) for item in _items(value, key, where))
    text = str(value).strip() if isinstance(value, str) else value
    problem = ConfigError(f"{where}: {key} is {value!r}, must be {_KIND_NAMES.get(kind, kind)}")
    if kind is bool:
        if isinstance(text, bool):
            return text
        if str(text).lower() in ("true", "yes", "on", "1"):
            return True
        if str(text).lower() in ("false", "no", "off", "0"):
            return False
        raise problem
    if kind is str:
        if isinstance(value, str):
            return value
        raise problem
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise problem
    try:
        number = float(str(text).replace("_", ""))
        if kind is float:
            if number != number:
                raise problem
            return number
        if number != int(number):
            raise problem
        # int() is used where possible, because a float would round integers above 2**53.
        digits = str(text).replace("_", "")
        return int(digits) if digits.lstrip("+-").isdecimal() else int(number)
    except (ValueError, OverflowError):
        raise problem from None


def _items(value: Any, key: str, where: str) -> list[Any]:
    """The items of a list. It may be a YAML list, a JSON list (text that begins with `[`), or a text with commas."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{where}: {key} is {value!r}, which is not a JSON list ({error}); "
                'write ["one, with a comma", "two"], or the items with commas between them'
            ) from None
    if isinstance(value, list | tuple):
        return [item.strip() if isinstance(item, str) else item for item in value]
    return [item.strip() for item in str(value).split(",") if item.strip()]


_KIND_NAMES = {
    int: "a whole number (such as 512, 10_000 or 1e9)",
    float: "a number (such as 0.1 or 6e-4)",
    bool: "true or false",
    str: "text",
}
