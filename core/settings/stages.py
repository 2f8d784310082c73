"""Finds the schema of the stage that a training config names."""

from collections.abc import Sequence

from core.errors import ConfigError
from core.settings import loader
from core.settings.training import PretrainConfig, TrainingConfig

STAGES = ("pretrain", "finetune", "dpo", "distil")
OF_OTHER_STAGES = ("--start.", "--lora.", "--dpo.beta", "--dpo.label_smoothing", "--teacher.")


def training_schema(arguments: Sequence[str]) -> type[TrainingConfig]:
    """The schema of the stage that `--stage=...` or the config file names; without either, pretraining's.

    Raises ConfigError for an unknown stage and for a file that cannot be read.
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
