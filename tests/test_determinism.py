"""Determinism: the guarantee on each device, and that torch refuses no operation of a training step."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.errors import ConfigError
from core.settings.loader import SettingError
from core.settings.training import OptimizerConfig, TrainLoopConfig
from tests import presets
from trainer.distributed.process_group import Ranks
from trainer.loop import segment
from trainer.model.gpt import GPT
from trainer.optim.optimizer import BlockOptimizer

ARCHITECTURES = presets.architectures()
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def described(device: torch.device, lengths_vary: bool = False, **changed) -> str:
    return segment.describe_determinism(TrainLoopConfig(**changed), Ranks(0, 2, 0, 2, device, None, None), lengths_vary)


def test_an_exact_resume_is_the_default_and_the_log_says_what_holds():
    assert described(CUDA) == "a resume is exact to the bit on GPUs of this kind, by deterministic kernels"
    assert described(CUDA, deterministic=False).startswith("a resume is exact up to rounding: train.deterministic is")
    assert described(CPU, deterministic=False).startswith("a resume is exact to the bit on CPUs of this kind, with ")
    assert "set train.compile=false for the same bits" in described(CUDA, lengths_vary=True)
    assert "to the bit" in described(CUDA, lengths_vary=True, compile=False)
    assert described(CUDA, grad_reduce_dtype="bf16").endswith(
        "with the same number of ranks (train.grad_reduce_dtype is bf16)"
    )


@pytest.fixture
def modes(monkeypatch) -> list[bool]:
    """What torch is asked for, in place of its mode, which would outlast the test."""
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    before = torch.utils.deterministic.fill_uninitialized_memory
    yield asked
    torch.utils.deterministic.fill_uninitialized_memory = before


def test_a_gpu_is_asked_for_deterministic_kernels_by_default(modes: list[bool]):
    environment: dict[str, str] = {}
    segment.set_up_determinism(TrainLoopConfig(), CUDA, environment)
    assert modes == [True]
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_a_cpu_and_an_explicit_no_change_nothing(modes: list[bool]):
    environment: dict[str, str] = {}
    segment.set_up_determinism(TrainLoopConfig(), CPU, environment)
    segment.set_up_determinism(TrainLoopConfig(deterministic=False), CUDA, environment)
    assert (modes, environment) == ([], {})


def test_a_workspace_with_which_cublas_rounds_differently_is_refused(modes: list[bool]):
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0', .* unset it, set it to :4096:8, or set"):
        segment.set_up_determinism(TrainLoopConfig(), CUDA, {"CUBLAS_WORKSPACE_CONFIG": ":0:0"})
    segment.set_up_determinism(TrainLoopConfig(), CUDA, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    assert modes == [True]


def test_fp8_on_a_cpu_is_refused_at_construction():
    with pytest.raises(SettingError, match="fp8, but device is cpu"):
        TrainLoopConfig(precision="fp8", device="cpu")


def test_a_kernel_that_torch_refuses_is_named_with_a_cure():
    error = RuntimeError("put_ does not have a deterministic implementation, but you set 'torch.use_deterministic…'")
    assert re.match(
        r"train.deterministic is true, but .* of put_; set train.det", str(segment.determinism_refusal(error))
    )
    assert segment.determinism_refusal(RuntimeError("out of memory")) is None


def refused_by_torch() -> set[str]:
    """The operations that torch's documentation says have no deterministic form, in snake case."""
    text = torch.use_deterministic_algorithms.__doc__
    text = text[text.index("operations will throw a") : text.index("In addition")]
    names = re.findall(r"`torch\.(?:nn\.functional\.|nn\.|Tensor\.)?(\w+)`", text)
    return {re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower().strip("_") for name in names}


class Seen(TorchDispatchMode):
    """The operations that ran, without underscores at their ends; cumulative sums of integers are exact."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.strip("_").removesuffix("_backward")
        if name != "cumsum" or args[0].is_floating_point():
            self.names.add(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_training_step_has_no_operation_that_torch_refuses(name: str):
    """By name, on the CPU: attention, which has kernels of its own on a GPU, is known to have deterministic ones."""
    settings = presets.pretraining().get(name)
    model = GPT(ARCHITECTURES[name])
    model.initialise(1)
    optimizer = BlockOptimizer(model, settings.optimizer if settings else OptimizerConfig(name="muon"), rank=0, world=1)
    tokens_BT = torch.randint(0, 64, (2, model.config.context + 1))
    with Seen() as seen:
        model(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1.0)
    refused = refused_by_torch()
    assert {"nll_loss", "cumsum", "put", "histc", "avg_pool3d"} <= refused
    assert "embedding_dense" in seen.names
    assert seen.names & refused == set()
