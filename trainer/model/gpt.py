"""GPT-2: pre-norm transformer decoder with learned positions, GELU-tanh and a tied output layer.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; parameter names and initialisation
follow the released code (openai/gpt-2), so that public weights load by name.

Shapes: B sequences, T positions, D model width, H heads, K head width, V vocabulary rows.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from core.schema import ModelConfig
from trainer.model.loss import chunked_cross_entropy

INIT_STD = 0.02


class Attention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = self.c_attn(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Four times wider, GELU in its tanh form (Hendrycks & Gimpel 2016), as in GPT-2."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width)
        self.c_proj = nn.Linear(4 * config.width, config.width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_BTD), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        return x_BTD + self.mlp(self.ln_2(x_BTD))


class GPT(nn.Module):
    """`forward(tokens, targets)` is the mean cross-entropy in nats; `forward(tokens)` are the logits."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_rows, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor | None = None) -> torch.Tensor:
        """tokens_BT: integer ids, T at most the context. Returns a float32 scalar, or logits_BTV."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.wte(tokens_BT) + self.wpe(positions_T)
        for block in self.h:
            x_BTD = block(x_BTD)
        x_BTD = self.ln_f(x_BTD)
        if targets_BT is None:
            return F.linear(x_BTD, self.wte.weight)
        return chunked_cross_entropy(x_BTD.flatten(0, 1), self.wte.weight, targets_BT.flatten())

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """GPT-2's initialisation: N(0, 0.02), residual projections smaller by sqrt(2 layers), biases zero.

        Drawn on the CPU from `seed` alone, so that every device and rank starts from the same bits.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if ".weight" in name else 0.0)
                continue
            std = INIT_STD / math.sqrt(2 * self.config.layers) if name.endswith("c_proj.weight") else INIT_STD
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs per token: 6 per matrix weight, 12 L T D for attention (Chowdhery et al. 2022,
        PaLM, appendix B; the causal half is counted, as everybody does)."""
        config = self.config
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and name != "wpe.weight")
        return 6 * matrices + 12 * config.layers * config.context * config.width
