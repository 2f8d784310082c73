"""Loads settings from dataclass defaults, one YAML file, the environment and `--section.key=value` flags.

A schema is a frozen dataclass whose fields are sections (dataclasses) or settings (`setting(default, help)`). Values
are converted to the declared type: `lr: 6e-4`, which PyYAML reads as text, becomes a float. An unknown key is an error
with file, line and the nearest name. Secrets are not settings; they stay in the environment.

    config = load(PretrainConfig, ["trainer/configs/gpt2-124m.yaml", "--batch.micro_batch_size=16"], environment)
"""

import dataclasses
import difflib
import math
import operator
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from core.errors import ConfigError
from core.settings.convert import convert
from core.settings.renamed import ELSEWHERE, REMOVED, RENAMED

Schema = TypeVar("Schema")


_ZERO = ("0", "0.0")


def setting(
    default: Any,
    help: str,
    *,
    env: str | None = None,
    identity: bool | Literal["unless default"] = True,
    check: Callable[[str], str | None] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    replaces: tuple[str, ...] = (),
) -> Any:
    """Declare one setting.

    `env` names an environment variable, which overrides the default and the file. If `identity` is False, the setting
    may differ between the segments of a run, because it does not change the result. Examples are paths, intervals and
    prices. `identity="unless default"` is for a setting that is newer than some runs. These runs do not name it, and
    were made with its default. `check` returns the problem of a text, or None (see `core.urls`); it is called for each
    item of a list. `ge`, `gt`, `le` and `lt` bound a number, which must then be finite. A schema that derives from
    Bounded checks these bounds. `replaces` names settings of the same section. If this setting is given, it drops the
    values of those settings that have a lower precedence (see `load`).
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {"help": help, "env": env, "identity": identity, "check": check, "bounds": bounds, "replaces": replaces}
    return dataclasses.field(default=default, metadata=metadata)


def section(schema: type) -> Any:
    """A nested group of settings."""
    return dataclasses.field(default_factory=schema)


class SettingError(ConfigError):
    """A check in a schema's `__post_init__` failed on `key`; `load` adds the place where `key` was set."""

    def __init__(self, key: str, problem: str):
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


class Bounded:
    """Base of a schema: raises SettingError for a setting outside of the bounds that it declares."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, bounds = getattr(self, field.name), field.metadata.get("bounds") or {}
            known = {name: bound for name, bound in bounds.items() if bound is not None}
            if known and isinstance(value, int | float):
                holds = math.isfinite(value) and all(getattr(operator, name)(value, known[name]) for name in known)
                require(holds, field.name, f"is {value}, must be {_range(known)}")


def _range(bounds: Mapping[str, float]) -> str:
    """{"ge": 0, "lt": 1} → "at least 0 and below 1"."""
    if bounds.keys() == {"ge", "le"}:
        return f"between {bounds['ge']:g} and {bounds['le']:g}"
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    return " and ".join(f"{words[name]} {_shown(bound)}" for name, bound in bounds.items())


def _shown(bound: float) -> str:
    return f"{bound:,.0f}" if abs(bound) >= 1e5 else f"{bound:g}"


def require(holds: bool, key: str, problem: str) -> None:
    """Raise SettingError unless `holds`. A schema's `__post_init__` calls this."""
    if not holds:
        raise SettingError(key, problem)


@dataclasses.dataclass
class _Sources:
    """The value of each dotted key, its place for error messages, and its layer: 0 file, 1 environment, 2 flags."""

    values: dict[str, Any]
    where: dict[str, str]
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    layer: int = 0

    def put(self, key: str, value: Any, where: str) -> None:
        self.values[key] = value
        self.where[key] = where
        self.layers[key] = self.layer

    def drop_replaced(self, known: Mapping[str, dataclasses.Field]) -> None:
        """Unset each setting that a setting of higher precedence names in `replaces`.

        A setting with the value 0 unsets no other setting. Raises ConfigError if two settings of equal precedence
        replace each other.
        """
        for key in [key for key, value in self.values.items() if value and str(value) not in _ZERO]:
            for name in known[key].metadata["replaces"] if key in self.values else ():
                section, last = key.rpartition(".")[::2]
                other = f"{section}.{name}"
                if other not in self.values:
                    continue
                if self.layers[other] < self.layers[key]:
                    del self.values[other]
                elif self.layers[other] == self.layers[key] and known[key].type in (int, float):
                    excludes = last in known[other].metadata["replaces"] and str(self.values[other]) not in _ZERO
                    if excludes:
                        places = f"{self.where[key]} and {self.where[other]}"
                        raise ConfigError(f"{places}: {key} and {other} are both set; give one of them")


def load(schema: type[Schema], arguments: Sequence[str], environment: Mapping[str, str]) -> Schema:
    """Build `schema` from command-line arguments: at most one YAML file, any number of `--section.key=value`.

    Precedence, lowest first: defaults, file, environment, flags. Raises ConfigError.
    """
    known = dict(_walk(schema))
    sources = _Sources({}, {})
    files = [argument for argument in arguments if not argument.startswith("--")]
    flags = [argument for argument in arguments if argument.startswith("--")]
    if len(files) > 1:
        raise ConfigError(
            f"more than one config file: {', '.join(files)}; give one, and the rest as --section.key=value"
        )
    for file in files:
        root = _compose(Path(file))
        if root is not None:
            _read_node(root, "", Path(file), known, sources)
    sources.layer = 1
    for key, field in known.items():
        name = field.metadata["env"]
        if name and environment.get(name):
            sources.put(key, environment[name], f"environment variable {name}")
    sources.layer = 2
    for flag in flags:
        key, separator, text = flag[2:].partition("=")
        key = key.replace("-", "_")  # --num-nodes means --num_nodes
        if not separator:
            field = known.get(key)
            if field is None or field.type is not bool:
                _check_known(key, known, f"flag {flag}")
                raise ConfigError(f"flag {flag}: no value; write --{key}=VALUE")
            text = "true"
        _check_known(key, known, f"flag {flag}")
        sources.put(key, text, f"flag --{key}")
    sources.drop_replaced(known)
    converted = {key: convert(value, known[key].type, key, sources.where[key]) for key, value in sources.values.items()}
    for key, value in converted.items():
        check = known[key].metadata["check"]
        for item in (value if isinstance(value, tuple) else (value,)) if check else ():
            if item and (problem := check(item)):
                raise ConfigError(f"{sources.where[key]}: {key} is {item!r}, which {problem}")
    return _build(schema, "", converted, sources.where)


def peek(key: str, arguments: Sequence[str]) -> tuple[str, str] | None:
    """The value, as text, of a top-level setting, and the place where it was set: a flag, or else the YAML file.

    None if it is not set. Programs call this for the setting that decides which schema to load. Raises ConfigError for
    a file that cannot be read.
    """
    for argument in reversed(arguments):
        if argument.startswith(f"--{key}="):
            return argument.partition("=")[2].strip("\r\n"), f"flag --{key}"
    for file in (argument for argument in arguments if not argument.startswith("--")):
        root = _compose(Path(file))
        for name, value in root.value if isinstance(root, yaml.MappingNode) else ():
            if name.value == key and isinstance(value, yaml.ScalarNode):
                return value.value, f"{file}:{name.start_mark.line + 1}"
    return None


def from_dict(schema: type[Schema], nested: Mapping[str, Any], where: str) -> Schema:
    """Build `schema` from the nested mappings of a stored run or checkpoint. Raises ConfigError."""
    known = dict(_walk(schema))
    flat = flatten(nested)
    for key in flat:
        _check_known(key, known, where)
    converted = {key: convert(value, known[key].type, key, where) for key, value in flat.items()}
    return _build(schema, "", converted, dict.fromkeys(flat, where))


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as nested plain values, for JSON or YAML."""
    return {
        field.name: to_dict(value)
        if dataclasses.is_dataclass(value)
        else list(value)
        if isinstance(value, tuple)
        else value
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=False)


def describe(config: Any, others: str) -> str:
    """The settings that differ from their defaults, a line per section.

    `others` is a text that says where the other settings can be found.
    """
    known = dict(_walk(type(config)))
    sections: dict[str, list[str]] = {}
    for key, value in flatten(to_dict(config)).items():
        default = known[key].default
        if value != (list(default) if isinstance(default, tuple) else default):
            section, _, name = key.rpartition(".")
            shown = ",".join(map(str, value)) if isinstance(value, list) else value
            sections.setdefault(section, []).append(f"{name}={shown}")
    lines = [
        f"  {section}: {', '.join(items)}" if section else f"  {', '.join(items)}"
        for section, items in sections.items()
    ]
    return "\n".join([f"settings that differ from the defaults ({others}):", *lines])


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def identity(config: Any) -> dict[str, Any]:
    """The settings that define the result of a run, by dotted key (see `identity` of `setting`)."""
    known = dict(_walk(type(config)))
    return {
        key: value
        for key, value in flatten(to_dict(config)).items()
        if known[key].metadata["identity"] is True
        or (known[key].metadata["identity"] == "unless default" and value != known[key].default)
    }


def help_text(schema: type, usage: str) -> str:
    """The text of --help: usage, and each setting with its default and meaning."""
    lines = [usage.strip(), "", "Settings (defaults < YAML file < environment < --section.key=value):"]
    heading = None
    for key, field in _walk(schema):
        group = key.rpartition(".")[0]
        if group != heading:
            lines.append("")
            heading = group
        default = "none" if field.default is None else field.default if field.default != "" else '""'
        variable = f" [{field.metadata['env']}]" if field.metadata["env"] else ""
        lines.append(f"  --{key}={default}{variable}")
        lines.append(f"        {field.metadata['help']}")
    return "\n".join(lines)


# --- inside ----------------------------------------------------------------------------------------------------


def _walk(schema: type, prefix: str = "") -> typing.Iterator[tuple[str, dataclasses.Field]]:
    """The dotted key and the field of each setting; sets `field.type` to the resolved type."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        field.type = hints[field.name]
        if dataclasses.is_dataclass(field.type):
            yield from _walk(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field


def _check_known(key: str, known: Mapping[str, Any], where: str) -> None:
    if key in known:
        return
    if today := RENAMED.get(key):
        name, _, stage = today.partition(" with ")
        if "stage" in known if stage else name.partition("=")[0] in known:
            raise ConfigError(f"{where}: {key} is an old name; write {today}")
    if key in REMOVED:
        raise ConfigError(f"{where}: {key} is gone; remove it: {REMOVED[key]}")
    if key in ELSEWHERE:
        raise ConfigError(f"{where}: {key} is a setting of another program; run {ELSEWHERE[key]} with it")
    sections = {name.rpartition(".")[0] for name in known}
    if key in sections:
        raise ConfigError(
            f"{where}: {key} is a section, not a setting; set one of "
            + ", ".join(name for name in known if name.startswith(f"{key}."))
        )
    # The most frequent mistake is a right name in a wrong section, so the last part of the key is compared first.
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    near = (
        same
        or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        or [
            n
            for n in known
            if n.rpartition(".")[2] in difflib.get_close_matches(last, [k.rpartition(".")[2] for k in known], n=1)
        ]
    )
    hint = f"did you mean {near[0]}?" if near else f"known settings: {', '.join(known)}"
    raise ConfigError(f"{where}: unknown setting {key}; {hint}")


def _compose(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a config file: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error


def _read_node(node: yaml.Node, prefix: str, path: Path, known: Mapping[str, Any], sources: _Sources) -> None:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{path}:{node.start_mark.line + 1}: {prefix.rstrip('.') or 'the file'} must be a mapping of settings"
        )
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        where = f"{path}:{key_node.start_mark.line + 1}"
        if key not in known and any(name.startswith(f"{key}.") for name in known):
            _read_node(value_node, f"{key}.", path, known, sources)
            continue
        _check_known(key, known, where)
        if key in sources.values:
            raise ConfigError(f"{where}: {key} is set twice; the first is at {sources.where[key]}")
        sources.put(key, _plain(value_node), where)


def _plain(node: yaml.Node) -> Any:
    """A scalar becomes text, which is converted to the declared type later.

    A list becomes a list of text. null becomes None.
    """
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key.value: _plain(value) for key, value in node.value}
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def _build(schema: type[Schema], prefix: str, values: Mapping[str, Any], where: Mapping[str, str]) -> Schema:
    arguments = {}
    for field in dataclasses.fields(schema):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            arguments[field.name] = _build(field.type, f"{key}.", values, where)
        elif key in values:
            arguments[field.name] = values[key]
    try:
        return schema(**arguments)
    except SettingError as error:
        key = error.key if error.key.startswith(prefix) else f"{prefix}{error.key}"
        raise ConfigError(f"{where.get(key, 'default')}: {key}: {error.problem}") from None
