"""What training keeps between forward and backward pass, measured without a GPU.

`of_compiled_block`: the tensors that torch.compile's own partitioner stores, from the graph that it hands to Inductor.
`around_blocks`: what stays alive of the parts that are not compiled, on tensors without memory.

Both as on CUDA: attention is the flash kernel, which stores its log-sum-exp and random state; autocast makes RMS-norm
in float32 and as one operation, which stores the inverse deviation; dropout stores a byte per element; the loss goes
by chunks of a GPU's size.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from core.settings.model import ModelConfig
from tests.later import Later
from trainer.model import loss
from trainer.model.attention import Context, rotations
from trainer.model.gpt import GPT, Block

_plain_rms_norm = torch.nn.functional.rms_norm


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that depend on the tokens, and bytes of the weights' bfloat16 copies."""

    activations: int
    weight_copies: int


@functools.cache
def of_compiled_block(config: ModelConfig, sequences: int, residual: str = "fp32") -> Kept:
    """What one block stores, its input included. Nothing is computed: compilation ends with the graph."""
    graphs: list[torch.fx.GraphModule] = []

    def stop_at_graph(graph: torch.fx.GraphModule, *_: object, **__: object) -> None:
        graphs.append(graph)
        raise _Seen

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        return Later("torch._inductor.compile_fx").compile_fx(graph, inputs, inner_compile=stop_at_graph)

    torch._dynamo.reset()
    block = _block(config)
    dtype = torch.bfloat16 if residual == "bf16" else torch.float32
    x_BTD = torch.empty(sequences, config.context, config.width, dtype=dtype, requires_grad=True)
    rotary = rotations(torch.arange(config.context), config) if config.position == "rope" else None
    with _as_on_cuda(_rms_norm), contextlib.suppress(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(block, backend=backend, fullgraph=True)(x_BTD, x_BTD, None, Context(rotary, None, None))
    (graph,) = graphs
    return _stored(graph, x_BTD.shape)


@functools.cache
def around_blocks(
    config: ModelConfig, sequences: int, recompute: bool = False, residual: str = "fp32"
) -> tuple[int, int]:
    """(bytes around the blocks, bytes of each block) of what is alive after a forward pass, without weights and their
    gradients. Blocks are not compiled here: only with `recompute` theirs is what training keeps."""
    two, three = (
        _alive(dataclasses.replace(config, layers=layers), sequences, recompute, residual) for layers in (2, 3)
    )
    return two - 2 * (three - two), three - two


class _Seen(Exception):
    pass


def _block(config: ModelConfig) -> Block:
    with torch.device("meta"):
        block = Block(config, 0)
    return block.to_empty(device="cpu")


def _stored(graph: torch.fx.GraphModule, shape: torch.Size) -> Kept:
    """Of the outputs behind the block's own, each storage once."""
    of_weights, of_input = set(), set()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            (of_input if node.meta["val"].shape == shape else of_weights).add(node)
        elif of_input & set(node.all_input_nodes):
            of_input.add(node)
        elif of_weights & set(node.all_input_nodes):
            of_weights.add(node)
    (outputs,) = graph.graph.find_nodes(op="output")
    activations, copies = {}, {}
    for node in outputs.args[0][1:]:
        if not isinstance(node.meta["val"], torch.Tensor):
            continue
        storage = node.meta["val"].untyped_storage()
        if node not in of_weights:
            activations[storage._cdata] = storage.nbytes()
        elif node.op != "placeholder":
            copies[storage._cdata] = storage.nbytes()
    return Kept(sum(activations.values()), sum(copies.values()))


def _alive(config: ModelConfig, sequences: int, recompute: bool, residual: str) -> int:
    with FakeTensorMode():
        model = GPT(config, recompute, residual)
        tokens_BT = torch.zeros(sequences, config.context, dtype=torch.int32)
        eager = mock.patch("torch.nn.functional.dropout", _dropout)
        with _Storages() as storages, _as_on_cuda(_one_rms_norm), eager:
            kept = model(tokens_BT, tokens_BT)
        found = storages.alive_bytes()
        del kept
    return found - 4 * math.prod(model.head.shape)  # the output layer's gradient, which the loss has made


class _Storages(TorchDispatchMode):
    """All storages that operations made within."""

    def __init__(self):
        super().__init__()
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, torch.Tensor)}
        for result in results if isinstance(results, tuple | list) else (results,):
            if isinstance(result, torch.Tensor) and result.untyped_storage()._cdata not in given:
                storage = result.untyped_storage()
                self._found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return results

    def alive_bytes(self) -> int:
        return sum(size for reference, size in self._found.values() if not reference.expired())


@contextlib.contextmanager
def _as_on_cuda(rms_norm: Callable) -> Iterator[None]:
    with (
        mock.patch("torch.nn.functional.scaled_dot_product_attention", _flash_attention),
        mock.patch("torch.nn.functional.rms_norm", rms_norm),
        mock.patch.object(loss, "CPU_CHUNK_ROWS", loss.GPU_CHUNK_ROWS),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        yield


def _flash_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]


def _rms_norm(x, shape, weight=None, eps=None):
    return _plain_rms_norm(x.float(), shape, weight, eps)


def _dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, training)[0] if p else x


def _one_rms_norm(x, shape, weight=None, eps=None):
    return _RmsNorm.apply(x.float(), weight, eps)


class _RmsNorm(torch.autograd.Function):
    """RMS-norm as CUDA's single operation does it, as far as it matters what is stored."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, inverse)
        return x * inverse if weight is None else x * inverse * weight

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("only what a forward pass keeps is measured")
