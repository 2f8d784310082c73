"""The presets in trainer/configs, and each one made small: all its choices, few dimensions."""

import dataclasses
import functools
from pathlib import Path

from core.settings import loader
from core.settings.model import ModelConfig
from core.settings.training import PretrainConfig

FOLDER = Path(__file__).parent.parent / "trainer" / "configs"
EOT_ROWS = 50257  # documents are told apart by the last token id, so that even a small model needs its row


@functools.cache
def pretraining() -> dict[str, PretrainConfig]:
    """Name → settings of every preset that pretrains."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        if "\nmodel:" in path.read_text():
            found[path.stem] = loader.load(PretrainConfig, [str(path), "--run.url=unused", "--data.url=unused"], {})
    return found


def small(model: ModelConfig, padded_vocab_size: int = 64) -> ModelConfig:
    return dataclasses.replace(
        model,
        layers=2,
        heads=2,
        width=16,
        context=12,
        padded_vocab_size=padded_vocab_size,
        mlp_width=24 if model.mlp_width else 0,
    )


# Choices that no preset makes.
OTHERS = {
    "skips": ModelConfig(embedding_skip=True, value_skip=True, init="zero_out", tie_embeddings=False),
    "documents": ModelConfig(document_mask=True),
    "rope-gelu": ModelConfig(position="rope", qk_norm=True, embedding_norm=True),
}


def architectures() -> dict[str, ModelConfig]:
    """Small models of every preset and of the remaining choices."""
    presets = {name: small(settings.model) for name, settings in pretraining().items()}
    return presets | {name: small(model, EOT_ROWS if model.document_mask else 64) for name, model in OTHERS.items()}
