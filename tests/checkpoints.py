"""Small checkpoints, stored as a run stores its own."""

import safetensors.torch
import torch

from core import storage
from core.settings import loader
from core.settings.model import ModelConfig
from trainer.checkpoint import layout
from trainer.checkpoint.blocks import key_of
from trainer.model.gpt import GPT

# Threads wait for each other at the end of every product, on a busy machine far longer than a small one takes.
torch.set_num_threads(1)
SMALL = ModelConfig(layers=1, heads=2, width=16, context=128, padded_vocab_size=50304)


def random_model(model_config: ModelConfig = SMALL, seed: int = 0) -> GPT:
    """Weights so large that every choice in the model matters to the logits."""
    model = GPT(model_config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + ("ln_" in name))
    return model.eval()


def store(run_url: str, model: GPT, step: int = 1, **state) -> str:
    """A complete checkpoint with more `state`; returns the run's URL."""
    blocks = {f"model.{key_of(name, 0, len(values))}": values.data for name, values in model.named_parameters()}
    data = safetensors.torch.save(blocks)
    file = layout.PayloadFile(layout.payload_name(1, 0, 1), len(data), layout.checksum(data))
    storage.write_bytes(storage.join(layout.folder_of(run_url, step), file.name), data)
    state = {"config": {"model": loader.to_dict(model.config), "data": {"url": ""}}, **state}
    layout.write_marker(run_url, layout.CheckpointManifest(step, 1, (file,), state))
    return run_url
