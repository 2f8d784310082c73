"""bf16 autocast on CUDA, plain fp32 elsewhere."""

import contextlib

import torch


def autocast(device: torch.device):
    """The context in which forward passes run."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()
