"""Defines the model: a decoder-only transformer with the variants of core.settings.model. The defaults are GPT-2.

GPT-2 is described in Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Parameter names and
initialisation follow its released code (openai/gpt-2), so that public weights load by name. Linear layers keep
PyTorch's layout (out, in).

Shapes: B sequences, T positions, D model width, H heads, K head width, V vocabulary rows.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from core.settings.model import ModelConfig
from trainer.model.attention import Attention, Context, KVCache, document_mask, document_positions, rotations
from trainer.model.loss import chunked_cross_entropy, soft_cap

INIT_STD = 0.02


def norm(config: ModelConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.width, eps=config.norm_eps)


class MLP(nn.Module):
    """GELU-tanh as in GPT-2, squared ReLU (So et al. 2021), or SwiGLU (Shazeer 2020; gate and value in one matrix)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.kind = config.mlp
        self.dropout = config.dropout
        widening = 2 if config.mlp == "swiglu" else 1
        self.c_fc = nn.Linear(config.width, widening * config.hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.hidden, config.width, bias=config.bias)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        h = self.c_fc(x_BTD)
        if self.kind == "gelu":
            h = F.gelu(h, approximate="tanh")
        elif self.kind == "relu2":
            h = F.relu(h)
            h = h * h  # h.square() would be a power, which autocast computes in float32
        else:
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        return F.dropout(self.c_proj(h), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config, index)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)
        # Two learned factors, for the residual stream and for the embedding.
        self.skip = nn.Parameter(torch.empty(2)) if config.embedding_skip else None

    def forward(
        self, x_BTD: torch.Tensor, x0_BTD: torch.Tensor, v0_BHTK: torch.Tensor | None, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the new residual stream and `v0`, the values of the first block. `x0` is the embedding."""
        if self.skip is not None:
            x_BTD = self.skip[0] * x_BTD + self.skip[1] * x0_BTD
        y_BTD, v0_BHTK = self.attn(self.ln_1(x_BTD), v0_BHTK, context)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.ln_2(x_BTD)), v0_BHTK


class GPT(nn.Module):
    """`forward(tokens, targets)` is the mean cross-entropy in nats; `forward(tokens)` gives the logits.

    If `recompute` is true, each block frees its activations after the forward pass and computes them again in the
    backward pass (Chen et al. 2016): this takes a third more work and a fraction of the memory. `residual` is the
    number format of the residual stream: fp32 or bf16. bf16 applies only where autocast computes the products in bf16.
    """

    def __init__(self, config: ModelConfig, recompute: bool = False, residual: str = "fp32"):
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.residual = residual
        # Called with (block, residual stream) after each block, outside of the compiled part.
        self.watch: Callable[[int, torch.Tensor], None] | None = None
        self.fused = False  # whether to use kernels that need a compiler; set by `compile_blocks`
        self.wte = nn.Embedding(config.padded_vocab_size, config.width)
        self.wpe = nn.Embedding(config.context, config.width) if config.position == "learned" else None
        self.ln_e = norm(config) if config.embedding_norm else None
        self.h = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.ln_f = norm(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.width, config.padded_vocab_size, bias=False)

    @property
    def head(self) -> torch.Tensor:
        """Weights of the output layer, (V, D)."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        cache: KVCache | None = None,
        packed: bool = False,
        share: float | None = None,
    ) -> torch.Tensor:
        """tokens_BT: integer ids, T at most the context. Returns a float32 scalar, or logits_BTV.

        A target below 0 does not count in the mean. With a `cache`, the tokens of a row follow those in the cache.
        If `packed` is true, a row holds several texts. Each text begins with an end-of-text token, and its tokens
        attend only to this text. If `share` is given, the backward pass gives the gradient of `share` times the loss,
        and ignores the incoming gradient.
        """
        x_BTD = self.hidden(tokens_BT, cache, packed)
        if targets_BT is None:
            return soft_cap(F.linear(x_BTD, self.head), self.config.logit_softcap)
        return chunked_cross_entropy(
            x_BTD.flatten(0, 1), self.head, targets_BT.flatten(), self.config.logit_softcap, self.fused, share
        )

    def hidden(self, tokens_BT: torch.Tensor, cache: KVCache | None = None, packed: bool = False) -> torch.Tensor:
        """The input of the output layer, x_BTD, after the last norm."""
        config = self.config
        T = tokens_BT.shape[1]
        # The positions of all rows, shape (T,). With a cache or packed texts, rows differ in their positions, and the
        # shape is (B, T).
        if cache is not None:
            positions = cache.positions(T)
        else:
            positions = document_positions(tokens_BT) if packed else torch.arange(T, device=tokens_BT.device)
        x_BTD = self.wte(tokens_BT)
        if self.wpe is not None:
            x_BTD = x_BTD + self.wpe(positions)
        if self.ln_e is not None:
            x_BTD = self.ln_e(x_BTD)
        x_BTD = F.dropout(x_BTD, config.dropout, self.training)
        if self.residual == "bf16" and torch.is_autocast_enabled(x_BTD.device.type):
            x_BTD = x_BTD.bfloat16()
        mask = None
        if cache is not None:
            mask = cache.mask(positions)
        elif config.document_mask or packed:
            mask = document_mask(tokens_BT, self.fused)
        rotary = rotations(positions, config) if config.position == "rope" else None
        x0_BTD, v0_BHTK = x_BTD, None
        context = Context(rotary, mask, cache)
        for index, block in enumerate(self.h):
            if self.recompute and self.training and torch.is_grad_enabled():
                x_BTD, v0_BHTK = checkpoint(block, x_BTD, x0_BTD, v0_BHTK, context, use_reentrant=False)
            else:
                x_BTD, v0_BHTK = block(x_BTD, x0_BTD, v0_BHTK, context)
            if self.watch is not None:
                self.watch(index, x_BTD)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x_BTD)

    def compile_blocks(self, backend: str | Callable = "inductor") -> None:
        """Compile each block as one graph, and compile the loss. A graph break is an error.

        Blocks with the same code are compiled once. Because each block has a graph of its own, DDP sends the gradients
        of a block while the gradients of the next block are computed. torch's option `optimize_ddp` would also cut the
        graphs at DDP's buckets. It is off, because this brings no speed here and costs memory: activations that cross a
        cut must be stored.
        """
        torch._dynamo.config.optimize_ddp = False
        self.fused = True
        for block in self.h:
            block.compile(fullgraph=True, backend=backend)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set the initial weights (core.settings.model, `init`). Biases and skip connections start without effect.

        Values are drawn on the CPU from `seed` alone, so that every device and rank starts from the same bits.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                neutral = {"skip": (1.0, 0.0), "mix": (1.0, 0.0)}.get(name.rpartition(".")[2])
                parameter.copy_(torch.tensor(neutral)) if neutral else parameter.fill_(1.0 if ".weight" in name else 0)
                continue
            std = self._initial_std(name, parameter)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def _initial_std(self, name: str, parameter: torch.Tensor) -> float:
        closes_branch = "c_proj" in name
        if self.config.init == "gpt2":
            return INIT_STD / math.sqrt(2 * self.config.layers) if closes_branch else INIT_STD
        if closes_branch or name.startswith("lm_head"):
            return 0.0
        # A tied embedding is also the output layer. With a standard deviation of 1, its logits would grow with the
        # width.
        is_embedding = name.startswith(("wte", "wpe"))
        return (
            (INIT_STD if self.config.tie_embeddings else 1.0)
            if is_embedding
            else math.sqrt(1 / (3 * parameter.shape[1]))
        )

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
