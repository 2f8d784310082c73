"""AdamW with GPT-2's decay groups."""

import torch
from torch import nn

from core.schema import OptimizerConfig


def make(model: nn.Module, config: OptimizerConfig, device: torch.device) -> torch.optim.AdamW:
    """Matrices and embeddings decay; biases and norms do not. Fused on CUDA."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device.type == "cuda",
        foreach=device.type == "cpu",
    )
