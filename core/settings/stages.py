"""Finds the schema of the stage that a training config names."""

from collections.abc import Sequence

from core.errors import ConfigError
from core.settings import loader
from core.settings.training import PretrainConfig, TrainingConfig

STAGES = ("pretrain", "finetune", "dpo", "distil")
# Short forms of flags. A flag that ends with = takes a value.
SHORT = {"--overfit": "--train.overfit=true", "--extend": "--train.extend=true", "--from=": "--run.branch_from="}
OF_OTHER_STAGES = ("--start.", "--lora.", "--dpo.beta", "--dpo.label_smoothing", "--teacher.")


def written_out(arguments: Sequence[str]) -> list[str]:
    """The arguments of a training command, with each short form of a flag replaced by its long form."""
    found = []
    for each in arguments:
        name, equals, value = each.partition("=")
        long = SHORT.get(f"{name}=") if equals else SHORT.get(name)
        found.append(f"{long}{value}" if long else each)
    return found


def training_schema(arguments: Sequence[str]) -> type[TrainingConfig]:
    """The schema of the stage that `--stage=...` or the config file names.

    If neither names a stage, it is the schema of pretraining. Raises ConfigError for an unknown stage and for a file
    that cannot be read.
    """
    name, where = loader.peek("stage", arguments) or ("pretrain", "")
    if name not in STAGES:
        raise ConfigError(f"{where}: stage is {name!r}, must be one of {', '.join(STAGES)}")
    if name == "pretrain":
        for flag in arguments:
            if flag.startswith(OF_OTHER_STAGES):
                raise ConfigError(f"flag {flag}: is not a setting of pretraining; add --stage=finetune, dpo or distil")
        return PretrainConfig
    from core.settings import tuning  # imported here, because pretraining does not need it

    return {"finetune": tuning.FinetuneConfig, "dpo": tuning.DpoConfig, "distil": tuning.DistilConfig}[name]
