"""Declares the settings of a model, and computes its parameters, FLOPs and memory from them.

Does not import torch, so that a forecast or a check before a launch can compute the figures of a model that
`trainer.model.gpt` will build. There is only one model. Each architectural choice is a setting of it, and
trainer/configs/*.yaml are named combinations of the choices.
"""

from dataclasses import dataclass
from typing import Literal

from core.settings.loader import Bounded, require, setting

FP32_BYTES, BF16_BYTES = 4, 2


# Upper bound of the width: a stored run may hold any number, and some computations take longer for a larger width.
LARGEST_WIDTH = 1_000_000


@dataclass(frozen=True)
class ModelConfig(Bounded):
    """A decoder-only transformer; the defaults are GPT-2 (Radford et al. 2019): pre-norm, GELU-tanh, tied."""

    layers: int = setting(12, "transformer blocks", gt=0, le=1 << 16)
    heads: int = setting(12, "attention heads", gt=0, le=LARGEST_WIDTH)
    width: int = setting(768, "model dimension", gt=0, le=LARGEST_WIDTH)
    context: int = setting(1024, "tokens per sequence", gt=0, le=1 << 22)
    padded_vocab_size: int = setting(
        50304,
        "rows of the embedding: the vocabulary, padded to a multiple of 64 or 128 for speed",
        gt=0,
    )
    norm: Literal["layernorm", "rmsnorm"] = setting("layernorm", "normalisation (Ba 2016; Zhang & Sennrich 2019)")
    norm_eps: float = setting(1e-5, "added to the variance in every norm", gt=0)
    position: Literal["learned", "rope"] = setting(
        "learned", "learned embeddings, or rotary (Su et al. 2021), which adds no parameters"
    )
    rope_base: float = setting(10000.0, "base of rotary positions: their longest wavelength divided by 2 pi", gt=0)
    rope_fraction: float = setting(
        1.0,
        "share of each head's dimensions that rotate (GPT-NeoX, Black et al. 2022: 0.25)",
        gt=0,
        le=1,
    )
    mlp: Literal["gelu", "relu2", "swiglu"] = setting(
        "gelu", "GELU-tanh (Hendrycks & Gimpel 2016), ReLU² (So et al. 2021) or SwiGLU (Shazeer 2020)"
    )
    mlp_width: int = setting(0, "hidden width of the MLP; 0: four times `width`", ge=0)
    bias: bool = setting(True, "biases in the linear layers of the blocks")
    qkv_bias: bool = setting(True, "biases of queries, keys and values; without effect if `bias` is false")
    tie_embeddings: bool = setting(True, "the output layer uses the embedding's weights (Press & Wolf 2017)")
    qk_norm: bool = setting(False, "RMS-norm of queries and keys, per head (Dehghani et al. 2023)")
    attention_scale: float = setting(0.0, "factor of the attention scores; 0: 1 / sqrt(width of a head)", ge=0)
    logit_softcap: float = setting(
        0.0, "a value c changes logits to c tanh(logits / c) (Gemma 2, 2024); 0: unchanged", ge=0
    )
    embedding_norm: bool = setting(False, "norm right after the embedding (BLOOM, 2022)")
    embedding_skip: bool = setting(False, "each block gets a learned mix of residual stream and embedding as input")
    value_skip: bool = setting(
        False,
        "attention values are mixed with the first block's by learned weights (value residual, Zhou et al. 2024)",
    )
    extra_projection: bool = setting(False, "a second linear layer after the attention's output projection")
    document_mask: bool = setting(False, "tokens attend to their own document only")
    dropout: float = setting(
        0.0, "fraction of activations that training sets to zero, in attention and after each branch", ge=0, lt=1
    )
    init: Literal["gpt2", "zero_out"] = setting(
        "gpt2",
        "initial weights; gpt2: N(0, 0.02), residual projections over sqrt(2 layers); zero_out: zero for residual "
        "projections and an untied output layer, variance 1 / (3 fan-in) for other matrices, N(0, 1) for embeddings "
        "(N(0, 0.02) if tied)",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.width % self.heads:
            divisors = (n for n in range(1, self.width + 1) if self.width % n == 0)
            nearest = min(divisors, key=lambda n: abs(n - self.heads))
            problem = f"is {self.heads}, must divide the width {self.width}; the nearest that does is {nearest}"
            require(False, "heads", problem)
        require(
            self.position != "rope" or self.head_width % 2 == 0,
            "heads",
            f"is {self.heads}, so that heads are {self.head_width} wide; rotary positions need an even width",
        )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return self.mlp_width or 4 * self.width


# Layers, heads and width of OpenAI's released models, whose names start.weights accepts.
_PUBLIC = {
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


def public_model(name: str) -> ModelConfig | None:
    """The settings of one of OpenAI's GPT-2 models, by its public name, or None for any other name."""
    if name not in _PUBLIC:
        return None
    layers, heads, width = _PUBLIC[name]
    return ModelConfig(layers=layers, heads=heads, width=width)


def matrix_parameters(model: ModelConfig) -> int:
    """The number of weights in all matrix products of a forward pass, including the output layer."""
    attention = (4 + model.extra_projection) * model.width**2
    mlp = (3 if model.mlp == "swiglu" else 2) * model.width * model.hidden
    return model.layers * (attention + mlp) + model.padded_vocab_size * model.width


def parameters(model: ModelConfig) -> int:
    """The number of all parameters of the model that trainer.model.gpt builds."""
    width, hidden = model.width, model.hidden
    norm = (2 if model.norm == "layernorm" else 1) * width
    biases = 0
    if model.bias:
        biases += (1 + model.extra_projection) * width + (3 * width if model.qkv_bias else 0)
        biases += (2 * hidden if model.mlp == "swiglu" else hidden) + width
    scalars = 2 * model.embedding_skip + 2 * model.value_skip
    count = matrix_parameters(model) + model.layers * (2 * norm + biases + scalars) + norm
    count += norm if model.embedding_norm else 0
    count += 0 if model.tie_embeddings else model.padded_vocab_size * width
    return count + (model.context * width if model.position == "learned" else 0)


def flops_per_token(model: ModelConfig) -> float:
    """Forward and backward FLOPs per token: 6 per matrix weight, 12 L T D for attention.

    L is the number of layers, T the context and D the width (Chowdhery et al. 2022, PaLM, appendix B). The attention
    scores that the causal mask hides are counted too, as is usual.
    """
    return 6.0 * matrix_parameters(model) + 12.0 * model.layers * model.context * model.width


def activation_bytes(model: ModelConfig, sequences: int, recompute: bool, residual_bytes: int = FP32_BYTES) -> float:
    """Bytes that one micro-batch occupies between its forward and its backward pass.

    The model runs under autocast to bfloat16, and its blocks are compiled. The function counts the tensors that
    autograd stores (tests/activations.py). In torch 2.13, torch.compile keeps the tensors of each block that
    `_block_bytes` lists, and recomputes the others. If `recompute` is true, only the input of each block is kept. While
    the backward pass of a block runs, all tensors of that one block are in memory too. `residual_bytes` is the size of
    one number of the residual stream.
    """
    tokens = sequences * model.context
    block, residual = _block_bytes(model, residual_bytes), residual_bytes * model.width
    blocks = residual * (model.layers - 1) + block if recompute else block * model.layers
    # Stored outside of the blocks: the gradient that the loss has already computed, the input of the last norm
    # (RMS-norm takes float32), and the norm and dropout mask of the embedding. If the residual stream is in bfloat16, a
    # bfloat16 copy of the normed embedding is stored too.
    around = residual + _norm_bytes(model) + (FP32_BYTES * model.width if model.norm == "rmsnorm" else residual)
    if model.embedding_norm:
        around += FP32_BYTES * model.width + _norm_bytes(model) + (residual if residual_bytes < FP32_BYTES else 0)
    around += model.width if model.dropout else 0
    # With `value_skip`, all blocks use the values of the first block. These are a view of a tensor that also holds
    # queries and keys, so the whole tensor stays in memory.
    around += 3 * BF16_BYTES * model.width if model.value_skip and recompute else 0
    return float(tokens * (blocks + around))


def _block_bytes(model: ModelConfig, residual_bytes: int) -> int:
    """Bytes per token that a compiled block stores for its backward pass, including its input."""
    products = 7 * model.width  # results of both norms, the queries, keys and values, the attention and its projection
    products += model.width * (model.extra_projection + model.embedding_skip + model.value_skip)  # one result each
    if model.position == "rope" or model.qk_norm:
        # Also stored: queries and keys after rope or norm, and a reordered copy of the attention's result.
        products += 3 * model.width
    products += (3 if model.mlp == "swiglu" else 2) * model.hidden  # the hidden layer before and after the activation
    kept = residual_bytes * model.width + BF16_BYTES * products
    kept += 2 * model.width if model.dropout else 0  # dropout masks, a byte per element
    statistics = model.heads * (3 if model.qk_norm else 1)  # attention's log-sum-exp, and the norms per head
    return kept + FP32_BYTES * statistics + 2 * _norm_bytes(model)


def _norm_bytes(model: ModelConfig) -> int:
    """Bytes of the statistics that a norm stores per token.

    These are the inverse deviation and, for LayerNorm, also the mean.
    """
    return FP32_BYTES * (2 if model.norm == "layernorm" else 1)


LOSS_CHUNK_ROWS = 4096  # rows of logits that trainer.model.loss computes at a time on a GPU


def training_bytes(
    model: ModelConfig,
    sequences: int,
    accumulation: int,
    world: int,
    *,
    zero: int,
    muon: bool,
    recompute: bool,
    residual: str = "fp32",
) -> float:
    """Bytes that one GPU needs to train. A step has `accumulation` micro-batches of `sequences` sequences per rank.

    The sum covers weights, gradients and partial gradient sums in float32; trainer.optim.reduce keeps a partial sum per
    level of its tree. It also covers the optimizer's state, bfloat16 copies of the weights, activations, and one chunk
    of the loss. If ranks share the optimizer's state (ZeRO or Muon), a buffer for the exchange of updates is added.
    Then 10 % are added for gradients of activations, the allocator and the libraries. The estimate is not confirmed on
    a GPU yet.
    """
    count = parameters(model)
    matrices = matrix_parameters(model) - model.padded_vocab_size * model.width if muon else 0
    levels = max(0, (accumulation & -accumulation).bit_length() - 1) / (world if zero == 2 else 1)
    adamw_bytes = 2 * FP32_BYTES * (count - matrices) / (world if zero else 1)
    muon_bytes = FP32_BYTES * matrices / world
    exchange = FP32_BYTES * (count if zero else matrices) if world > 1 else 0
    weights = FP32_BYTES * count * (2 + levels) + BF16_BYTES * count
    rows = min(LOSS_CHUNK_ROWS, sequences * model.context)
    loss = (
        rows * model.padded_vocab_size * (FP32_BYTES + 2 * BF16_BYTES)
        + 2 * FP32_BYTES * model.padded_vocab_size * model.width
    )
    residual_bytes = BF16_BYTES if residual == "bf16" else FP32_BYTES
    activations = activation_bytes(model, sequences, recompute, residual_bytes)
    parts = weights + adamw_bytes + muon_bytes + exchange + loss + activations
    return 1.1 * parts
