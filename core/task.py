"""Parses a SkyPilot task: the requested machines, the variables, and the program of this project that it runs.

    task = read_task("sky/pretrain-8xa100.yaml", os.environ, MachineChoice(gpus="A100:2"))
    task.requests, task.workload, task.envs["RUN"]

Reads only fields that SkyPilot documents. Launches and forecasts use the same TaskSpec.
"""

import argparse
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from core import bucket
from core.errors import ConfigError, one_line
from core.settings import evaluation, loader
from core.settings.inference import ExportConfig, ServeConfig
from core.settings.model import ModelConfig, public_model
from core.settings.preparation import FetchConfig, PrepConfig
from core.settings.stages import training_schema, written_out
from core.settings.training import PretrainConfig, TrainingConfig
from core.settings.tuning import DistilConfig, FinetuneConfig, SynthesisConfig

_COMMAND = re.compile(r"-m\s+(trainer|data_prep)\.(\w+)([^\S\n][^\n;&|]*)?")
_VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^}]*))?\}|\$(\w+)")
_EMPTY_VARIABLE = re.compile(r"=\$\{?\w+\}?$")
_IMAGE = re.compile(r"container\.sh image (\w+)")
_BUILD = re.compile(r"container\.sh build\b")
MORE = "--more="
# Stage of each program. The config of trainer.train may declare another stage.
_PROGRAMS = {
    "trainer.train": "pretrain",
    "trainer.evaluate": "evaluate",
    "trainer.synthesize": "synthesize",
    "trainer.export": "export",
    "trainer.serve": "serve",
    "data_prep.prepare": "prep",
    "data_prep.fetch": "prep",
}
# The required setting of a stage. A launch must give it. A forecast replaces a missing value by a placeholder.
_STARTS = {"finetune": "start.weights", "dpo": "start.weights", "distil": "teacher.weights"}
_SCHEMAS = {"prep": PrepConfig, "synthesize": SynthesisConfig, "export": ExportConfig, "serve": ServeConfig}
# URLs for a task that has no BUCKET. Such a task can be forecast but not launched.
_PLACEHOLDER = {"RUN_URL": "s3://forecast/run", "DATA_URL": "s3://forecast/data"}


@dataclass(frozen=True)
class MachineChoice:
    """Options of a launch that replace values of the task. `gpus` is NAME or NAME:COUNT, `nodes` a number.

    `infra` is a place in SkyPilot's form, such as `lambda` or `aws/us-east-1`.
    """

    gpus: str | None = None
    nodes: int | None = None
    infra: str | None = None


@dataclass(frozen=True)
class MachineRequest:
    """One kind of machine that a task accepts. A field that is None accepts any value.

    `cpus` and `memory_gb` are (amount, whether a larger amount is accepted too).
    """

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
class Workload:
    """The program that a task runs: its stage ("image" for a build of images) and its settings.

    `config` is None if the settings cannot be read; `problem` says why. `assumed` names an assumption about `model` or
    about the `teacher` of a distillation. `programs` lists all modules of this project that the task's commands run.
    """

    stage: str | None
    config: Any = None
    problem: str = ""
    model: ModelConfig | None = None
    teacher: ModelConfig | None = None
    assumed: str = ""
    programs: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSpec:
    """A parsed task.

    `envs` maps each declared variable to its value, or to "" if it has none. `required` names the variables without a
    default. `derived` holds the variables whose value follows from the config. `secrets` are names of variables.
    `images` names the Docker targets that the task's `setup` builds. `idle_seconds` is the time from the last job's end
    to the machine's shutdown, or None if nothing shuts the machine down.
    """

    path: str
    name: str
    nodes: int
    managed: bool
    requests: tuple[MachineRequest, ...]
    workload: Workload
    envs: Mapping[str, str]
    idle_seconds: float | None
    required: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    derived: Mapping[str, str] = field(default_factory=dict)


def read_task(path: str, environment: Mapping[str, str], choice: MachineChoice | None = None) -> TaskSpec:
    """Parse a task file. Values of `environment` replace the defaults of its envs; an empty value counts as absent.

    Raises ConfigError.
    """
    choice = choice or MachineChoice()
    document = _document(path)
    declared = document.get("envs") or {}
    envs = {name: environment.get(name) or ("" if value is None else str(value)) for name, value in declared.items()}
    resources = document.get("resources") or {}
    setup, run = (str(document.get(part) or "") for part in ("setup", "run"))
    workload = _workload(path, f"{setup}\n{run}", envs)
    derived = _derived(workload, envs, environment)
    return TaskSpec(
        path=path,
        name=str(document.get("name") or Path(path).stem),
        nodes=choice.nodes or int(document.get("num_nodes") or 1),
        managed=resources.get("job_recovery") is not None,
        requests=tuple(dict.fromkeys(_requests(path, resources, choice))),
        workload=workload,
        envs={**envs, **derived},
        derived=derived,
        idle_seconds=idle_seconds(resources),
        required=tuple(name for name, value in declared.items() if value is None),
        secrets=tuple(document.get("secrets") or {}),
        images=tuple(_IMAGE.findall(setup)),
    )


def machine_choice(options: Sequence[str]) -> MachineChoice:
    """Reads `--gpus`, `--num-nodes` and `--infra` from the options of `sky launch`. Raises ConfigError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--gpus")
    parser.add_argument("--num-nodes")
    parser.add_argument("--infra")
    try:
        found, _ = parser.parse_known_args(options)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; give --gpus NAME:COUNT or --num-nodes NUMBER") from None
    if found.num_nodes is not None and not (found.num_nodes.isdecimal() and int(found.num_nodes)):
        raise ConfigError(f"--num-nodes is {found.num_nodes!r}, must be a whole number above 0")
    return MachineChoice(found.gpus, found.num_nodes and int(found.num_nodes), found.infra)


def with_more(words: Sequence[str]) -> list[str]:
    """The words of a command line, with `--more=TEXT` replaced by the words of TEXT, as a shell splits them.

    So a variable of a task, such as TRAIN_ARGS, can hold values with blanks in quotes. Raises ConfigError.
    """
    found: list[str] = []
    for word in words:
        if not word.startswith(MORE):
            found.append(word)
            continue
        try:
            found += shlex.split(word.removeprefix(MORE))
        except ValueError as error:
            text = word.removeprefix(MORE)
            raise ConfigError(
                f"{text!r} cannot be split into words ({str(error).lower()}); quote a value with blanks, "
                "such as --train.sample_prompts='[\"Once upon a time\"]'"
            ) from None
    return found


def urls(envs: Mapping[str, str]) -> dict[str, str]:
    """RUN_URL and DATA_URL of a task's program. If BUCKET is not set, they are placeholders. Raises ConfigError."""
    found = dict(_PLACEHOLDER)
    for variable in bucket.FOLDERS:
        if envs.get(f"{variable}_URL") or (envs.get("BUCKET") and envs.get(variable)):
            found[f"{variable}_URL"] = bucket.url(envs, variable)
    return found


def _document(path: str) -> Mapping[str, Any]:
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in Path("sky").glob("*.yaml")))
        raise ConfigError(f"{path}: no such task file" + (f"; sky/ has {known}" if known else "")) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as a task: {one_line(error)}") from None
    if not isinstance(document, dict) or not {"resources", "run", "setup"} & document.keys():
        raise ConfigError(f"{path}: is not a SkyPilot task; it has no resources, setup or run")
    return document


def idle_seconds(resources: Mapping[str, Any]) -> float | None:
    """Seconds from the end of the last job to the shutdown of the machine.

    The result is 0 for a managed job, and None if the task has no autostop.
    """
    autostop = resources.get("autostop")
    if resources.get("job_recovery") is not None:
        return 0.0
    if isinstance(autostop, Mapping):
        return 60.0 * float(autostop.get("idle_minutes", 5))  # 5 is SkyPilot's default
    return 60.0 * autostop if isinstance(autostop, int | float) and not isinstance(autostop, bool) else None


def _requests(path: str, resources: Mapping[str, Any], choice: MachineChoice) -> Iterator[MachineRequest]:
    """One request for each entry of `any_of` or `ordered`, and for each alternative accelerator of the entry.

    If an entry lacks a field, the field of `resources` itself is taken.
    """
    base = {key: value for key, value in resources.items() if key not in ("any_of", "ordered")}
    for entry in resources.get("any_of") or resources.get("ordered") or [{}]:
        merged = base | (entry or {})
        cloud, region, zone = _place(merged)
        if choice.infra:  # cloud, region or zone of the launch replaces that of the task
            chosen = _place({"infra": choice.infra})
            cloud, region, zone = (new or old for new, old in zip(chosen, (cloud, region, zone), strict=True))
        for accelerator, count in _accelerators(path, choice.gpus or merged.get("accelerators")):
            yield MachineRequest(
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
    """Cloud, region and zone, from fields with these names or from `infra: cloud/region/zone`, where `*` means any."""
    parts = [None if part in ("*", "") else part for part in str(resources.get("infra") or "").split("/")]
    cloud, region, zone = [*parts, None, None, None][:3]
    cloud = resources.get("cloud") or cloud
    return (cloud.lower() if cloud else None), resources.get("region") or region, resources.get("zone") or zone


def _accelerators(path: str, value: Any) -> list[tuple[str | None, int]]:
    """(name, count) of each alternative in `A100:8`, `{A100: 8}`, or a list of such."""
    if value is None:
        return [(None, 0)]
    if isinstance(value, Mapping):
        return [(str(name), int(count or 1)) for name, count in value.items()]
    choices = value if isinstance(value, list | tuple | set) else [value]
    found = []
    for choice in choices:
        name, _, count = str(choice).partition(":")
        if count and not count.strip().isdecimal():
            raise ConfigError(f"{path}: resources.accelerators is {choice!r}, must be NAME or NAME:COUNT")
        found.append((name.strip(), int(count or 1)))
    return found


def _at_least(path: str, key: str, value: Any) -> tuple[float, bool] | None:
    """(8.0, False) for `8`, exactly eight; (8.0, True) for `8+`, at least eight."""
    if value is None:
        return None
    match = re.fullmatch(r"([\d.]+)(\+)?", str(value).strip().removesuffix("GB").removesuffix("gb"))
    if not match:
        raise ConfigError(f"{path}: resources.{key} is {value!r}, must be a number or a number with +")
    return float(match.group(1)), bool(match.group(2))


def _workload(path: str, commands: str, envs: Mapping[str, str]) -> Workload:
    """The workload of the first training program in the commands. If there is none, the first program is used."""
    matches = list(_COMMAND.finditer(commands.replace("\\\n", " ")))
    programs = tuple(f"{match[1]}.{match[2]}" for match in matches)
    if not programs:
        if _BUILD.search(commands):
            return Workload("image")
        return Workload(None, problem="its commands run no program of this project")
    chosen = next((at for at, name in enumerate(programs) if name.startswith("trainer.")), 0)
    stage = _PROGRAMS.get(programs[chosen])
    if stage is None:
        return Workload(None, problem=f"a forecast does not read the settings of {programs[chosen]}", programs=programs)
    try:
        arguments = _arguments(path, matches[chosen][3] or "", envs)
        variables = urls(envs) | {name: value for name, value in envs.items() if value}
        if stage == "evaluate":
            evaluation.parse(arguments, variables)
            config = None
        elif stage in _SCHEMAS:
            schema = FetchConfig if programs[chosen] == "data_prep.fetch" else _SCHEMAS[stage]
            config = loader.load(schema, arguments, variables)
        else:
            arguments = written_out(arguments)
            schema = training_schema(arguments)
            stage = schema.stage
            if stage in _STARTS and not any(word.startswith(f"--{_STARTS[stage]}=") for word in arguments):
                arguments.append(f"--{_STARTS[stage]}=?")
            config = loader.load(schema, arguments, variables)
    except ConfigError as error:
        return Workload(stage, problem=str(error), programs=programs)
    return _with_model(Workload(stage, config, programs=programs), envs)


def _derived(workload: Workload, envs: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """MAX_USD as the config suggests it. Empty if the user gave MAX_USD, or if the task's is not lower."""
    if "MAX_USD" not in envs or environment.get("MAX_USD") or not isinstance(workload.config, TrainingConfig):
        return {}
    usual = workload.config.run.usual_max_usd
    return {"MAX_USD": f"{usual:g}"} if usual > float(envs["MAX_USD"] or 0) else {}


def _with_model(workload: Workload, envs: Mapping[str, str]) -> Workload:
    """Add the model, and the teacher of a distillation, that the settings define or name.

    If they name no model, GPT-2 124M is assumed.
    """
    if workload.stage in (None, "prep", "synthesize", "export", "serve"):
        return workload
    if isinstance(workload.config, DistilConfig):
        teacher = public_model(workload.config.teacher.weights)
        unknown = "" if teacher else "the teacher's computation is not counted"
        return replace(workload, model=workload.config.model, teacher=teacher, assumed=unknown)
    if isinstance(workload.config, PretrainConfig):
        return replace(workload, model=workload.config.model)
    start = workload.config.start.weights if isinstance(workload.config, FinetuneConfig) else envs.get("MODEL", "")
    if (model := public_model(start)) is not None:
        return replace(workload, model=model)
    return replace(workload, model=ModelConfig(), assumed="the model to start from is GPT-2 124M")


def _arguments(path: str, text: str, envs: Mapping[str, str]) -> list[str]:
    """Config files and flags of a command line, with variables replaced by their values in `envs`.

    A flag with an empty variable as its value is left out, because only the launch sets such a variable.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        return []
    found = []
    for word in with_more(_expanded(word, envs) if word.startswith(MORE) else word for word in words):
        expanded = _expanded(word, envs)
        is_unset = _EMPTY_VARIABLE.search(word) and expanded.endswith("=")
        if word.startswith("$"):
            found += expanded.split()
        elif expanded.endswith((".yaml", ".yml")) or (word.startswith("--") and not is_unset):
            found.append(expanded)
    return [word if word.startswith("--") else _config_file(path, word) for word in found]


def _expanded(word: str, envs: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: envs.get(match[1] or match[3]) or match[2] or "", word)


def _config_file(path: str, name: str) -> str:
    """The path of a config file.

    `name` is relative to the repository's root, where the task runs, or to the task file.
    """
    roots = [Path(), Path(path).parent, Path(path).parent.parent, Path(__file__).parent.parent]
    return next((str(root / name) for root in roots if (root / name).is_file()), name)
