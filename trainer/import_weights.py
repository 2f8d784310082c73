"""Begin a run with weights that are there already: of public GPT-2, of a folder in Hugging Face's form, of another run.

    python -m trainer.import_weights gpt2 s3://bucket/runs/from-gpt2 trainer/configs/gpt2-124m.yaml

Reads DATA_URL's manifest (or --data.url). Writes RUN_URL/checkpoints/step-00000000, which trainer.train with the same
settings continues from, and which evaluation and export take like any other; it prints the settings of the weights.
The model's settings are those of the weights; dropout, document_mask and everything that is not `model.` may be given.
"""

import os

from core import urls
from core.console import run_entry, set_up_logging
from core.data import manifest
from core.errors import ConfigError
from core.settings import loader
from core.settings.model import ModelConfig
from core.settings.training import PretrainConfig

USAGE = "python -m trainer.import_weights MODEL RUN_URL [CONFIG.yaml] [--section.key=value ...]"
# What training may choose anew without being another model.
FREE = ("dropout", "document_mask", "init")


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

    from trainer.weights.begin import write_first_checkpoint
    from trainer.weights.open import open_weights

    opened = open_weights(where, torch.device("cpu"))
    given, usual = loader.to_dict(opened.model.config), loader.to_dict(ModelConfig())
    # Flags win over the file, whose sizes are those of another model; what a flag itself says is compared below.
    sized = [(key, value) for key, value in given.items() if key not in FREE]
    sizes = [f"--model.{key}={value}" for key, value in sized]
    flags = [each for each in rest if each.startswith("--")]
    files = [each for each in rest if not each.startswith("--")]
    settings = loader.load(PretrainConfig, [*files, *sizes, *flags, f"--run.url={run_url}"], os.environ)
    check_same(given, loader.to_dict(settings.model), where)
    data = manifest.read(settings.data.url)
    folder = write_first_checkpoint(settings, opened.model, opened.name, data.fingerprint)
    print(f"{folder}: {opened.model.parameter_count():,} parameters of {opened.name}")
    # A file may set what is a default elsewhere: then all of them are told.
    told = [flag for flag, (key, value) in zip(sizes, sized, strict=True) if files or value != usual[key]]
    print(f"train with the settings given here, --run.url={run_url} and")
    print(" ".join(told))


def check_same(weights: dict, wanted: dict, where: str) -> None:
    """Raise ConfigError for a flag that asks for another model than these weights are."""
    for key, value in wanted.items():
        if key not in FREE and weights[key] != value:
            raise ConfigError(f"model.{key} is {value}, the weights of {where} have {weights[key]}; leave it out")


if __name__ == "__main__":
    run_entry(main)
