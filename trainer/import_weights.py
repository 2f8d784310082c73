"""Starts a run from existing weights: public GPT-2, a folder in Hugging Face's format, or another run.

    python -m trainer.import_weights gpt2 s3://bucket/runs/from-gpt2 trainer/configs/gpt2-124m.yaml

The program reads the manifest of DATA_URL (or of --data.url), writes RUN_URL/checkpoints/step-00000000 and prints the
model settings of the weights. With the same settings, trainer.train continues from this checkpoint. Evaluation and
export accept it like any other checkpoint. The weights determine the model's settings, except dropout, document_mask
and init. All other settings can be chosen.
"""

import dataclasses
import os
from typing import Any

from core import storage, urls
from core.console import run_entry, set_up_logging
from core.data import manifest
from core.errors import ConfigError, RunError
from core.settings import loader
from core.settings.model import ModelConfig
from core.settings.training import PretrainConfig

USAGE = "python -m trainer.import_weights MODEL RUN_URL [CONFIG.yaml] [--section.key=value ...]"
FREE = ("dropout", "document_mask", "init")  # settings of the model that do not describe its weights


def main(arguments: list[str]) -> None:
    set_up_logging()
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(PretrainConfig, USAGE))
        return
    names = [each for each in arguments if not each.startswith("--") and not each.endswith((".yaml", ".yml"))]
    if len(names) != 2:
        raise ConfigError(f"give a model and a run, not {len(names)} names: {USAGE}")
    where, run_url = names
    urls.check_model(where)
    urls.check(run_url)
    rest = [each for each in arguments if each not in names]
    import torch

    from trainer.weights.open import open_weights

    trained = open_weights(where, torch.device("cpu"))
    given, defaults = loader.to_dict(trained.model.config), loader.to_dict(ModelConfig())
    # These flags override the file, which may describe a model of another size. `check_same` refuses a user's flag
    # that contradicts the weights.
    sized = [(key, value) for key, value in given.items() if key not in FREE]
    sizes = [f"--model.{key}={value}" for key, value in sized]
    flags = [each for each in rest if each.startswith("--")]
    files = [each for each in rest if not each.startswith("--")]
    settings = loader.load(PretrainConfig, [*files, *sizes, *flags, f"--run.url={run_url}"], os.environ)
    check_same(given, loader.to_dict(settings.model), where)
    data_url = storage.lasting(settings.data.url)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, url=data_url))
    data = manifest.read(data_url)
    folder = write_first_checkpoint(settings, trained.model, trained.name, data.fingerprint)
    print(f"{folder}: {trained.model.parameter_count():,} parameters of {trained.name}")
    # A config file may override a default, so all settings are printed if a file is given.
    shown = [flag for flag, (key, value) in zip(sizes, sized, strict=True) if files or value != defaults[key]]
    print(f"train with the settings given here, --run.url={run_url} and")
    print(" ".join(shown))


def check_same(weights: dict, wanted: dict, where: str) -> None:
    """Raises ConfigError if a flag describes a model that differs from the model of the weights."""
    for key, value in wanted.items():
        if key not in FREE and weights[key] != value:
            raise ConfigError(f"model.{key} is {value}, the weights of {where} have {weights[key]}; leave it out")


def write_first_checkpoint(settings: PretrainConfig, model, origin: str, data_fingerprint: str) -> str:
    """Stores `model` as the checkpoint of step 0, with a fresh optimizer. Returns the checkpoint's folder.

    `origin` names the source of the weights. Raises RunError if the run's folder holds objects.
    """
    import torch

    from trainer.checkpoint import layout
    from trainer.checkpoint.blocks import StagedFile
    from trainer.optim.optimizer import BlockOptimizer

    run_url, segment = settings.run.url, 0  # no segment stores this checkpoint; segments count from 1
    if storage.list_objects(run_url):
        raise RunError(f"{run_url}: holds objects already; give the import a new run.url")
    optimizer = BlockOptimizer(model, settings.optimizer, 0, 1)
    staged = StagedFile(optimizer.blocks())
    staged.fill(optimizer.blocks())
    name = layout.payload_name(segment, 0, 1)
    storage.write_bytes(storage.join(layout.folder_of(run_url, 0), name), staged.data)
    state: dict[str, Any] = {
        "step": 0,
        "tokens": 0,
        "rng": {"rule": "seeded per micro-batch from (train.seed, step, index)", "seed": settings.train.seed},
        "config": loader.to_dict(settings),
        "data_fingerprint": data_fingerprint,
        "torch": torch.__version__,
        "origin": origin,
    }
    file = layout.PayloadFile(name, len(staged.data), layout.checksum(staged.data))
    layout.write_marker(run_url, layout.CheckpointManifest(0, segment, (file,), state))
    return layout.folder_of(run_url, 0)


if __name__ == "__main__":
    run_entry(main)
