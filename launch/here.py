"""Prepares data and trains on this computer, with the variables of a launch: BUCKET, RUN, DATA, CONFIG, TRAIN_ARGS, …

    SOURCE=input.txt python -m launch.here prep        text or other documents → token shards
    SOURCE=FILES.bin python -m launch.here fetch       ready-made token shards → a token set
    python -m launch.here train                        trains CONFIG on all GPUs of this computer, or on its CPU

If BUCKET is empty, all data is below the current folder, in data/DATA and runs/RUN. Training runs the same program as a
rented node (launch.node). This program checks the GPUs, starts one process per GPU, supervises the processes, stores
their output in the run's logs, and writes the same ledger. USD_PER_HOUR is the price of an hour on this computer.
"""

import importlib.metadata
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from clouds import machine
from clouds.base import Gpu
from core import bucket, environment, storage
from core.console import run_entry
from core.data import manifest
from core.errors import ConfigError

HERE = "./"  # the value of BUCKET if the user gives none
CONFIGS = {
    "prep": "data_prep/configs/text.yaml",
    "fetch": "data_prep/configs/fineweb-edu-10bt-ready.yaml",
    "train": "trainer/configs/gpt2-124m.yaml",
}
SOURCES = {"prep": "source.url", "fetch": "source.train_url"}
USAGE = "usage: python -m launch.here prep, fetch or train, with settings as variables (docs/own-gpu.md)"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in CONFIGS:
        raise ConfigError(USAGE)
    environment.adopt()
    given = {**os.environ, "BUCKET": os.environ.get("BUCKET") or HERE}
    if arguments[0] == "train":
        command, added = training(given, machine.gpus())
    else:
        command, added = preparation(arguments[0], given)
    print(f"$ {' '.join(f'{name}={shlex.quote(value)}' for name, value in added.items())} {shlex.join(command)}")
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *command[1:]], {**os.environ, **added})


def preparation(kind: str, given: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """The command that turns SOURCE into a token set, and the variables that it needs. Raises ConfigError.

    SOURCE names files, or a config of data_prep (.yaml). DATA is the name of the set, by default derived from SOURCE.
    """
    source = given.get("SOURCE", "").strip()
    if not source:
        raise ConfigError("SOURCE is empty; name a text file or other documents, as SOURCE=input.txt")
    is_config = source.endswith((".yaml", ".yml"))
    name = given.get("DATA") or Path(source.rstrip("/")).name.split(".")[0].replace("*", "").replace("?", "")
    if not name:
        raise ConfigError(f"SOURCE is {source!r}, which gives the token set no name; add DATA=NAME")
    config = source if is_config else given.get("CONFIG") or CONFIGS[kind]
    chosen = [] if is_config else [f"--{SOURCES[kind]}={source}"]
    if kind == "fetch" and not is_config and not given.get("CONFIG"):
        config = ""  # the sources of a config would be mixed with SOURCE
    program = {"prep": "data_prep.prepare", "fetch": "data_prep.fetch"}[kind]
    words = [config] if config else []
    command = ["python", "-m", program, *words, *chosen, *split(given, "PREP_ARGS")]
    return command, {"DATA_URL": bucket.url({**given, "DATA": name}, "DATA")}


def training(given: Mapping[str, str], gpus: Sequence[Gpu]) -> tuple[list[str], dict[str, str]]:
    """The command that trains CONFIG on all GPUs, and the variables that it needs. Raises ConfigError."""
    check_torch(len(gpus), torch_version())
    config = given.get("CONFIG") or CONFIGS["train"]
    data_url = given.get("DATA_URL") or bucket.url({**given, "DATA": given.get("DATA") or only_set(given)}, "DATA")
    run_url = bucket.url({**given, "RUN": given.get("RUN") or Path(config).stem}, "RUN")
    added = {
        "RUN_URL": run_url,
        "DATA_URL": data_url,
        "DEVICE": "cuda" if gpus else "cpu",
        "RANKS_PER_NODE": given.get("RANKS_PER_NODE") or str(max(1, len(gpus))),
    }
    if not given.get("USD_PER_HOUR"):
        print("the price of this computer is not known, so the report shows ? for dollars; set USD_PER_HOUR=0.40, say")
    if not gpus:
        print("no NVIDIA GPU answers (nvidia-smi); training runs on the CPU")
    return ["python", "-m", "launch.node", "-m", "trainer.train", config, *split(given, "TRAIN_ARGS")], added


def check_torch(gpus: int, version: str) -> None:
    """Raises ConfigError if there are GPUs that the installed torch cannot use."""
    if not version:
        raise ConfigError("torch is not installed in this environment; run `make setup`")
    if gpus and version.endswith("+cpu"):
        raise ConfigError(
            f"this computer has {gpus} NVIDIA GPU{'s' * (gpus != 1)}, but torch {version} is the build for CPUs; "
            "run `make setup GPU=1`"
        )


def torch_version() -> str:
    """The version of the installed torch, without importing it; "" if there is none."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def only_set(given: Mapping[str, str]) -> str:
    """The name of the only token set below BUCKET/data.

    Raises ConfigError if there is no token set, or if there are several.
    """
    folder = storage.join(bucket.root(given), bucket.FOLDERS["DATA"])
    names = [name for name in sorted(storage.list_names(folder)) if manifest.exists(storage.join(folder, name))]
    if len(names) == 1:
        return names[0]
    if not names:
        raise ConfigError(f"{folder}: holds no token set; make one first: `make prep-data SOURCE=input.txt`")
    raise ConfigError(f"{folder}: holds {len(names)} token sets; choose one, as DATA={names[0]}: {', '.join(names)}")


def split(given: Mapping[str, str], variable: str) -> list[str]:
    """The words of a variable that holds more settings. Raises ConfigError for an unclosed quote."""
    try:
        return shlex.split(given.get(variable, ""))
    except ValueError as error:
        raise ConfigError(f"{variable} is {given[variable]!r}, which a shell could not read ({error})") from error


if __name__ == "__main__":
    run_entry(main)
