"""What a SkyPilot task YAML asks for and runs, as far as its cost depends on it. Reads the documented fields only.

task = load("sky/pretrain-8xa100.yaml")
task.wants, task.work
"""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from core.errors import ConfigError
from core.settings import loader
from core.settings.model import ModelConfig, public_model
from core.settings.preparation import PrepConfig
from core.settings.stages import training_schema
from core.settings.training import PretrainConfig, TrainingConfig
from core.settings.tuning import DistilConfig, FinetuneConfig

_COMMAND = re.compile(r"-m\s+(trainer|data_prep)\.(\w+)([^\S\n][^\n;&|]*)?")
_VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")
# Stage of each program; trainer.train has several, and the settings of evaluate hardly change its cost.
_PROGRAMS = {"trainer.train": "pretrain", "trainer.evaluate": "evaluate", "data_prep.prepare": "prep"}
_BUILDS = re.compile(r"container\.sh build\b")
# Settings without which a config does not load, and which only a launch gives.
_STARTS = {"finetune": "start.weights", "dpo": "start.weights", "distil": "teacher.weights"}


@dataclass(frozen=True)
class Want:
    """One acceptable kind of machine. None is "any"."""

    cloud: str | None = None
    region: str | None = None
    zone: str | None = None
    instance_type: str | None = None
    accelerator: str | None = None
    accelerators: int = 0
    cpus: tuple[float, bool] | None = None
    memory_gb: tuple[float, bool] | None = None
    spot: bool = False
    max_usd_per_hour: float | None = None


@dataclass(frozen=True)
class Work:
    """What the task does: a stage, or "image" for the images themselves. `config` is None where its command names none
    that can be read. `assumed` says what was taken for granted about `model`."""

    stage: str | None
    config: TrainingConfig | PrepConfig | None
    why_not: str = ""
    model: ModelConfig | None = None
    assumed: str = ""


@dataclass(frozen=True)
class Task:
    path: str
    name: str
    nodes: int
    wants: tuple[Want, ...]
    work: Work
    envs: Mapping[str, str]
    idle_seconds: float | None


def load(path: str) -> Task:
    """Raises ConfigError."""
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such task file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a task: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or not {"resources", "run", "setup"} & document.keys():
        raise ConfigError(f"{path}: is no SkyPilot task (no resources, setup or run)")
    envs = {key: str(value) for key, value in (document.get("envs") or {}).items() if value is not None}
    envs |= {key: os.environ[key] for key in document.get("envs") or {} if key in os.environ}
    resources = document.get("resources") or {}
    return Task(
        path=path,
        name=str(document.get("name") or Path(path).stem),
        nodes=int(document.get("num_nodes") or 1),
        wants=tuple(_wants(path, resources)),
        work=_work(path, document, envs),
        envs=envs,
        idle_seconds=_idle_seconds(resources),
    )


def _idle_seconds(resources: Mapping[str, Any]) -> float | None:
    """How long a machine idles until it is shut down: none for a managed job, None if nobody would shut it down."""
    autostop = resources.get("autostop")
    if resources.get("job_recovery") is not None:
        return 0.0
    if isinstance(autostop, Mapping):
        return 60.0 * float(autostop.get("idle_minutes", 5))  # 5 is SkyPilot's default
    return 60.0 * autostop if isinstance(autostop, int | float) and not isinstance(autostop, bool) else None


def _wants(path: str, resources: Mapping[str, Any]) -> Iterator[Want]:
    """Each entry of any_of or ordered over what stands beside it; accelerators may be a choice as well."""
    base = {key: value for key, value in resources.items() if key not in ("any_of", "ordered")}
    for entry in resources.get("any_of") or resources.get("ordered") or [{}]:
        merged = base | (entry or {})
        cloud, region, zone = _place(merged)
        for accelerator, count in _accelerators(path, merged.get("accelerators")):
            yield Want(
                cloud=cloud,
                region=region,
                zone=zone,
                instance_type=merged.get("instance_type"),
                accelerator=accelerator,
                accelerators=count,
                cpus=_at_least(path, "cpus", merged.get("cpus")),
                memory_gb=_at_least(path, "memory", merged.get("memory")),
                spot=bool(merged.get("use_spot")),
                max_usd_per_hour=merged.get("max_hourly_cost"),
            )


def _place(resources: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    """From cloud, region and zone, or from `infra: cloud/region/zone`, where `*` is any."""
    parts = [None if part in ("*", "") else part for part in str(resources.get("infra") or "").split("/")]
    cloud, region, zone = [*parts, None, None, None][:3]
    cloud = resources.get("cloud") or cloud
    return (cloud.lower() if cloud else None), resources.get("region") or region, resources.get("zone") or zone


def _accelerators(path: str, value: Any) -> list[tuple[str | None, int]]:
    """`A100:8`, `{A100: 8}`, or a list of such, of which any will do."""
    if value is None:
        return [(None, 0)]
    if isinstance(value, Mapping):
        return [(str(name), int(count or 1)) for name, count in value.items()]
    choices = value if isinstance(value, list | tuple | set) else [value]
    found = []
    for choice in choices:
        name, _, count = str(choice).partition(":")
        if count and not count.strip().isdigit():
            raise ConfigError(f"{path}: resources.accelerators is {choice!r}, must be NAME or NAME:COUNT")
        found.append((name.strip(), int(count or 1)))
    return found


def _at_least(path: str, key: str, value: Any) -> tuple[float, bool] | None:
    """`8` is exactly 8, `8+` at least 8."""
    if value is None:
        return None
    match = re.fullmatch(r"([\d.]+)(\+)?", str(value).strip().removesuffix("GB").removesuffix("gb"))
    if not match:
        raise ConfigError(f"{path}: resources.{key} is {value!r}, must be a number or a number with +")
    return float(match.group(1)), bool(match.group(2))


def _work(path: str, document: Mapping[str, Any], envs: Mapping[str, str]) -> Work:
    """The program of this project that the task runs, with its settings; of several, training costs most."""
    commands = f"{document.get('setup') or ''}\n{document.get('run') or ''}".replace("\\\n", " ")
    matches = list(_COMMAND.finditer(commands))
    match = next((each for each in matches if each.group(1) == "trainer"), matches[0] if matches else None)
    if match is None:
        stage = "image" if _BUILDS.search(commands) else None
        return Work(stage, None, "" if stage else "its commands run no program of this project")
    package, program, rest = match.groups()
    stage = _PROGRAMS.get(f"{package}.{program}")
    if stage in (None, "evaluate"):
        said = "" if stage else f"{package}.{program} has settings that a forecast does not read"
        return _with_model(Work(stage, None, said), envs)
    try:
        words = shlex.split(_expand(rest or "", envs))
    except ValueError:
        words = []
    # A flag whose variable is empty here gets its value at launch; addresses do not change what it costs.
    flags = [word for word in words if word.startswith("--") and word.partition("=")[2]]
    arguments = [word for word in words if word.endswith((".yaml", ".yml")) and not word.startswith("--")] + flags
    environment = {"RUN_URL": "s3://forecast/run", "DATA_URL": "s3://forecast/data"}
    environment |= {name: value for name, value in envs.items() if value}
    try:
        arguments = _near(path, arguments)
        schema = PrepConfig if stage == "prep" else training_schema(arguments)
        stage = "prep" if schema is PrepConfig else schema.stage
        if stage in _STARTS and not any(flag.startswith(f"--{_STARTS[stage]}=") for flag in flags):
            arguments.append(f"--{_STARTS[stage]}=?")
        return _with_model(Work(stage, loader.load(schema, arguments, environment)), envs)
    except ConfigError as error:
        return Work(stage, None, str(error))


def _with_model(work: Work, envs: Mapping[str, str]) -> Work:
    """The model of the settings, or the public one that they begin with; any other is taken for GPT-2 124M."""
    if work.stage in (None, "prep"):
        return work
    if isinstance(work.config, DistilConfig):
        return replace(work, model=work.config.model, assumed="what the teacher computes is not counted")
    if isinstance(work.config, PretrainConfig):
        return replace(work, model=work.config.model)
    start = work.config.start.weights if isinstance(work.config, FinetuneConfig) else envs.get("MODEL", "")
    if (model := public_model(start)) is not None:
        return replace(work, model=model)
    return replace(work, model=ModelConfig(), assumed="the model that it begins with is taken for GPT-2 124M")


def _expand(text: str, envs: Mapping[str, str]) -> str:
    """Shell variables that the task's envs define; others stay empty, as in a shell."""
    return _VARIABLE.sub(lambda m: envs.get(m.group(1) or m.group(3)) or m.group(2) or "", text)


def _near(path: str, arguments: list[str]) -> list[str]:
    """Config files are named from the repository's root, which is where the task runs, or beside the task."""
    roots = [Path(), Path(path).parent, Path(path).parent.parent, Path(__file__).parent.parent]
    return [
        next((str(root / word) for root in roots if (root / word).is_file()), word)
        if not word.startswith("--")
        else word
        for word in arguments
    ]
