"""Chooses the kernel of scaled_dot_product_attention for a device.

`train.attention: auto` takes the order that was measured for this kind of GPU (MEASURED). If this kind was not
measured, torch's own order is used: flash, memory-efficient, plain products, cuDNN. `python -m bench.gpu.attention`
measures the kernels.
"""

import contextlib
from collections.abc import Mapping

import torch
from torch.nn import attention
from torch.nn.attention import SDPBackend

from core.errors import ConfigError

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,  # FlashAttention 3 replaces torch's own flash kernels
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
NOT_DETERMINISTIC = ("cudnn",)
# For each compute capability, the kernels of a record in bench/results, the fastest first. Nothing was measured on a
# GPU yet.
MEASURED: Mapping[tuple[int, int], tuple[str, ...]] = {}

_for_good = contextlib.ExitStack()  # never closed, because torch would then restore its own order of kernels


def order(name: str, capability: tuple[int, int], deterministic: bool) -> tuple[str, ...]:
    """The kernels to choose from, the best first. The result is empty if torch's own order is to be used."""
    if name != "auto":
        return (name,)
    return tuple(each for each in MEASURED.get(capability, ()) if not (deterministic and each in NOT_DETERMINISTIC))


def use_attention(name: str, device: torch.device, deterministic: bool) -> None:
    """Restrict this process to the kernel `name`, or to the measured kernels.

    Raises ConfigError if the kernel is not installed.
    """
    if device.type != "cuda":
        return
    chosen = order(name, torch.cuda.get_device_capability(device), deterministic)
    if not chosen:
        return
    if "flash3" in chosen:
        _activate_flash3()
    # There are inputs that no fused kernel supports. If the setting is auto, plain matrix products compute them. If the
    # setting names a kernel, torch raises an error.
    backends = [BACKENDS[each] for each in chosen] + ([SDPBackend.MATH] if name == "auto" else [])
    _for_good.enter_context(attention.sdpa_kernel(backends, set_priority=True))


def _activate_flash3() -> None:
    try:
        attention.activate_flash_attention_impl("FA3")
    except Exception as error:  # the kind of torch's error depends on what is missing
        raise ConfigError(
            "train.attention is flash3, which needs FlashAttention 3 for this GPU "
            f"({' '.join(str(error).split())[:200]}); install its package flash_attn_3, or set train.attention=auto"
        ) from error
