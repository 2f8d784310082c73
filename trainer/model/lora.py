"""Adds low-rank adapters (Hu et al. 2021, "LoRA"): y = W x + (alpha / rank) B A x. Only A and B are trained.

The adapters of a layer are two parameters, such as `h.0.attn.c_attn.lora_a` (rank, in) and `h.0.attn.c_attn.lora_b`
(out, rank). The layer's own weights keep their names. B starts at zero, so training starts from the unchanged model.
"""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from core.xxh3 import xxh3_128
from trainer.model.gpt import GPT

_MARK = ".lora_"


class LoraLinear(nn.Linear):
    """A linear layer with frozen weights, and its adapter."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_b = nn.Parameter(torch.empty(self.out_features, rank, **like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def attach(model: GPT, rank: int, alpha: float, targets: Iterable[str]) -> None:
    """Add adapters to the layers `targets` ("attn.c_attn", ...) of every block, and freeze all other weights."""
    model.requires_grad_(False)
    for block in model.h:
        for target in targets:
            parent, _, name = target.rpartition(".")
            module = block.get_submodule(parent)
            setattr(module, name, LoraLinear(getattr(module, name), rank, alpha))


@torch.no_grad()
def initialise(model: GPT, seed: int) -> None:
    """Set A to N(0, 1 / in), drawn on the CPU from `seed` alone like the model's weights, and B to zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters(model).items():
        if name.endswith("lora_a"):
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn / math.sqrt(parameter.shape[1]))
        else:
            parameter.zero_()


@torch.no_grad()
def merge(model: GPT) -> None:
    """Add each adapter to the weights that it adapts, in place; the result is a plain model."""
    for block in model.h:
        for name, module in list(block.named_modules()):
            if isinstance(module, LoraLinear):
                has_bias = module.bias is not None
                plain = nn.Linear(module.in_features, module.out_features, has_bias, device="meta")
                module.weight.add_(module.lora_b @ module.lora_a, alpha=module.scale)
                plain.weight, plain.bias = module.weight, module.bias
                block.set_submodule(name, plain)
    model.requires_grad_(True)


def adapters(model: GPT) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if _MARK in name}


def base(model: GPT) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if _MARK not in name}


def digest(parameters: Mapping[str, torch.Tensor]) -> str:
    """An XXH3-128 hash of the weights. It identifies the weights that adapters were trained on."""
    checksum = xxh3_128()
    for name in sorted(parameters):
        checksum.update(name.encode())
        checksum.update(parameters[name].detach().float().contiguous().cpu().numpy())
    return checksum.hexdigest()
