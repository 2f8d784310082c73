"""Whether a run that is continued has the bits of one that nothing stopped, by device.

    CPU     always, on CPUs of one kind with the same number of threads per rank
    CUDA    with train.deterministic, the default, on GPUs of one kind; without it up to rounding

torch.use_deterministic_algorithms decides on CUDA. By torch's documentation and source, read and not run: flash and
memory-efficient attention take the deterministic form of their backward passes, cuDNN attention is left out because it
has none, FlexAttention needs no atomics for the gradients of queries, keys and values, scatter_add and index_put sort
their indices, and Inductor chooses reductions by rule instead of by timing. A training step uses none of the operations
that torch refuses in this mode (tests/test_determinism.py).
"""

import os
from collections.abc import MutableMapping

import torch

from core.errors import ConfigError
from core.settings.training import TrainLoopConfig
from trainer.distributed.process_group import Ranks

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# The values with which cuBLAS gives the same bits each time; the first one is faster and takes 32 MB.
EXACT_WORKSPACES = (":4096:8", ":16:8")


def set_up(train: TrainLoopConfig, device: torch.device, environment: MutableMapping[str, str] = os.environ) -> None:
    """Before the first kernel of the process. Raises ConfigError where the environment contradicts the settings."""
    if device.type != "cuda" or not train.deterministic:
        return
    # cuBLAS reads it when it starts; without it torch refuses its products in deterministic mode.
    workspace = environment.setdefault(CUBLAS_WORKSPACE, EXACT_WORKSPACES[0])
    if workspace not in EXACT_WORKSPACES:
        raise ConfigError(
            f"environment variable {CUBLAS_WORKSPACE} is {workspace!r}, with which cuBLAS may round differently each "
            f"time, but train.deterministic is true; unset it, set it to {EXACT_WORKSPACES[0]}, or set "
            "train.deterministic=false"
        )
    torch.use_deterministic_algorithms(True)
    # Costs bandwidth and changes nothing here: no memory is read before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False


def refusal(error: Exception) -> ConfigError | None:
    """What to do where `error` is torch's, about a kernel that has no deterministic form; else None."""
    if not isinstance(error, RuntimeError) or "does not have a deterministic implementation" not in str(error):
        return None
    kernel = str(error).partition(" does not have")[0]
    return ConfigError(
        f"train.deterministic is true, but torch has no deterministic form of {kernel}; set train.deterministic=false "
        "in a new run, whose resume is then exact up to rounding"
    )


def describe(train: TrainLoopConfig, ranks: Ranks, lengths_vary: bool) -> str:
    """What a run on these ranks may rely on, for the log. `lengths_vary`: of the rows of its micro-batches."""
    if ranks.device.type != "cuda":
        where = f"on CPUs of this kind, with {torch.get_num_threads()} threads per rank"
    elif not train.deterministic:
        return "a resume is exact up to rounding: train.deterministic is false"
    elif lengths_vary and train.compile:
        return (
            "a resume is exact up to rounding: rows vary in length, and compiled kernels depend on the lengths before "
            "them; set train.compile=false for the same bits"
        )
    else:
        where = "on GPUs of this kind, by deterministic kernels"
    same_ranks = (
        ", with the same number of ranks (train.grad_reduce_dtype is bf16)" if train.grad_reduce_dtype == "bf16" else ""
    )
    return f"a resume is exact to the bit {where}{same_ranks}"
