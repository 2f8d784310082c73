"""Loads the presets that bench measures. A rehearsal on a CPU replaces a preset's model by a small model."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from bench.harness import REPOSITORY
from core.settings import loader
from core.settings.model import ModelConfig
from core.settings.training import PretrainConfig

if TYPE_CHECKING:
    import torch

CONFIGS = REPOSITORY / "trainer" / "configs"
PLAIN, OTHER = "gpt2-124m", "speedrun-162m"
# A CPU core computes one sequence with this model in milliseconds.
SMALL = {"layers": 2, "heads": 2, "width": 32, "context": 32}


def path(preset: str) -> Path:
    return CONFIGS / f"{preset}.yaml"


def settings_of(preset: str, *flags: str) -> PretrainConfig:
    return loader.load(PretrainConfig, [str(path(preset)), "--run.url=unused", "--data.url=unused", *flags], {})


def small(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, **SMALL)


def small_flags() -> list[str]:
    return [f"--model.{key}={value}" for key, value in SMALL.items()]


def options(description: str | None, *presets: str) -> argparse.ArgumentParser:
    """A parser with the options that all measurements share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if presets:
        parser.add_argument("--preset", default=presets[0], help="a name in trainer/configs")
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU, with a small model")
    return parser


def device_of(parsed: argparse.Namespace) -> "torch.device":
    import torch  # imported here, because bench.train_step loads torch only in its sides

    if parsed.rehearse:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; look at nvidia-smi, or rehearse on a CPU with --rehearse")
    return torch.device("cuda", 0)
