"""Chooses the number format of the matrix products in forward and backward passes. Weights stay in float32.

bf16 uses autocast (Micikevicius et al. 2018, mixed precision). fp8 uses torchao's conversion of the blocks' linear
layers (Micikevicius et al. 2022, "FP8 formats for deep learning"): e4m3 in the forward pass, e5m2 for gradients, and a
scale per tensor.
"""

import contextlib

import torch
from torch import nn

from core.errors import ConfigError

BF16_FROM = (8, 0)  # lowest compute capability with bf16 (Ampere)
FP8_FROM = (8, 9)  # lowest compute capability with fp8 (Ada)
FP8_MULTIPLE = 16  # both sides of a matrix in an fp8 product must be multiples of this


def resolve(precision: str, device: torch.device) -> str:
    """Replace `auto` by a precision for this device. Raises ConfigError if the device does not support `precision`."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if precision == "auto":
        return "bf16" if capability >= BF16_FROM else "fp32"
    if precision == "fp8" and device.type != "cuda":
        raise ConfigError("train.precision is fp8, but training runs on a CPU; set fp32 or auto")
    since, instead = {"fp8": (FP8_FROM, "bf16"), "bf16": (BF16_FROM, "fp32")}.get(precision, ((0, 0), ""))
    if device.type == "cuda" and capability < since:
        raise ConfigError(
            f"train.precision is {precision}, but {torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]} and no {precision} units (from {since[0]}.{since[1]} on); set {instead}"
        )
    return precision


def check_residual(residual: str, precision: str) -> None:
    """Raises ConfigError if the residual stream would be rounded more than the products that are added to it."""
    if residual == "bf16" and precision == "fp32":
        raise ConfigError(
            "train.residual is bf16, but the products are fp32 on this device; bf16 would round them; set "
            "train.precision=bf16, or train.residual=fp32"
        )


def autocast(device: torch.device, precision: str = "auto"):
    """The context manager for forward passes."""
    if (resolve(precision, device) if precision == "auto" else precision) == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def use_fp8(blocks: nn.Module, emulate: bool = False) -> None:
    """Convert the linear layers of `blocks` to fp8, in place; names and weights stay. Raises ConfigError."""
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError("train.precision is fp8, which needs torchao: pip install torchao") from error

    def fits(layer: nn.Module, _: str) -> bool:
        return not isinstance(layer, nn.Linear) or all(side % FP8_MULTIPLE == 0 for side in layer.weight.shape)

    convert_to_float8_training(blocks, config=Float8LinearConfig(emulate=emulate), module_filter_fn=fits)
