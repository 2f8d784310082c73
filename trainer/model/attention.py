"""Computes causal multi-head self-attention (Vaswani et al. 2017, section 3.2), and caches keys and values.

core.settings.model describes the variants. All kernels are fused: scaled_dot_product_attention uses FlashAttention
where it applies. Attention within documents uses FlexAttention (Dong et al. 2024) if the blocks are compiled, and a
dense mask otherwise. The block mask of FlexAttention skips positions that no query attends to.

Shapes: B sequences, T positions, D model width, H heads, K head width, S positions of the cache.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from core.data.vocabulary import GPT2_END_OF_TEXT
from core.settings.model import ModelConfig


class KVCache:
    """Keys and values of `rows` sequences, for up to `room` positions in every layer.

    With a cache, generation computes each position only once. Rows may differ in length. A shorter prompt is padded on
    the right, and `length_B` holds the length of each row. The next token overwrites the padding. Positions from a
    row's length on are masked.
    """

    def __init__(self, config: ModelConfig, rows: int, room: int, device: torch.device, dtype: torch.dtype):
        shape = (config.layers, rows, config.heads, room, config.head_width)
        self.config = config
        self.room = room
        self.length_B = torch.zeros(rows, dtype=torch.long, device=device)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._rows_B1 = torch.arange(rows, device=device)[:, None]
        self._written_BT = torch.empty(0)

    def positions(self, count: int) -> torch.Tensor:
        """The positions of the next `count` tokens of each row, (B, T)."""
        self._written_BT = self.length_B[:, None] + torch.arange(count, device=self.length_B.device)
        return self._written_BT

    def mask(self, positions_BT: torch.Tensor) -> torch.Tensor:
        """The cached positions that each new position attends to, bool (B, 1, T, S)."""
        seen = torch.arange(self.room, device=positions_BT.device) <= positions_BT[..., None]
        return seen[:, None]

    def extend(self, layer: int, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values at `positions`. Returns all keys and values of the layer, (B, H, S, K)."""
        self._keys[layer][self._rows_B1, :, self._written_BT] = k_BHTK.transpose(1, 2).to(self._keys.dtype)
        self._values[layer][self._rows_B1, :, self._written_BT] = v_BHTK.transpose(1, 2).to(self._values.dtype)
        return self._keys[layer], self._values[layer]

    def advance(self, count: int) -> None:
        self.length_B = self.length_B + count

    def set_lengths(self, length_B: torch.Tensor) -> None:
        """Set the lengths of the rows: after a padded prompt, or to remove tokens."""
        self.length_B = length_B.to(self.length_B)


class Context(NamedTuple):
    """Values that all blocks of one forward pass share: cos and sin of rotary positions, the mask, the cache."""

    rotary: tuple[torch.Tensor, torch.Tensor] | None
    mask: torch.Tensor | BlockMask | None
    cache: KVCache | None


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.config = config
        self.index = index
        width = config.width
        self.c_attn = nn.Linear(width, 3 * width, bias=config.bias and config.qkv_bias)
        self.c_proj = nn.Linear(width, width, bias=config.bias)
        self.c_proj_2 = nn.Linear(width, width, bias=config.bias) if config.extra_projection else None
        # Two learned factors, for this block's values and for the first block's values.
        self.mix = nn.Parameter(torch.empty(2)) if config.value_skip else None

    def forward(
        self, x_BTD: torch.Tensor, v0_BHTK: torch.Tensor | None, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        B, T, D = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = (
            self.c_attn(x_BTD).view(B, T, 3, config.heads, config.head_width).permute(2, 0, 3, 1, 4)
        )
        if self.mix is not None:
            if v0_BHTK is None:
                v0_BHTK = v_BHTK
            v_BHTK = (self.mix[0] * v_BHTK + self.mix[1] * v0_BHTK).to(v_BHTK.dtype)
        if config.qk_norm:
            q_BHTK, k_BHTK = (F.rms_norm(each, each.shape[-1:], eps=config.norm_eps) for each in (q_BHTK, k_BHTK))
        if context.rotary is not None:
            q_BHTK, k_BHTK = rotate(q_BHTK, context.rotary), rotate(k_BHTK, context.rotary)
        q_BHTK, k_BHTK = q_BHTK.to(v_BHTK.dtype), k_BHTK.to(v_BHTK.dtype)
        if context.cache is not None:
            k_BHTK, v_BHTK = context.cache.extend(self.index, k_BHTK, v_BHTK)
        scale = config.attention_scale or None
        if isinstance(context.mask, BlockMask):
            y_BHTK = flex_attention(q_BHTK, k_BHTK, v_BHTK, block_mask=context.mask, scale=scale)
        else:
            y_BHTK = F.scaled_dot_product_attention(
                q_BHTK,
                k_BHTK,
                v_BHTK,
                attn_mask=context.mask,
                dropout_p=config.dropout if self.training else 0.0,
                is_causal=context.mask is None,
                scale=scale,
            )
        y_BTD = self.c_proj(y_BHTK.transpose(1, 2).reshape(B, T, D))
        if self.c_proj_2 is not None:
            y_BTD = self.c_proj_2(y_BTD)
        return F.dropout(y_BTD, config.dropout, self.training), v0_BHTK


def rotations(positions: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles of rotary positions (Su et al. 2021), float32, (T, K/2) or (B, 1, T, K/2).

    Dimensions i and i + K/2 are rotated as a pair, as in GPT-NeoX and Llama. Only the share `rope_fraction` of the
    pairs is rotated.
    """
    half = config.head_width // 2
    turning = max(1, round(half * config.rope_fraction))
    index = torch.arange(half, device=positions.device, dtype=torch.float32)
    speeds = torch.where(index < turning, config.rope_base ** (-index / turning), 0.0)
    angles = positions.float()[..., None] * speeds
    if angles.dim() == 3:
        angles = angles[:, None]
    return angles.cos(), angles.sin()


def rotate(x_BHTK: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = rotary
    a, b = x_BHTK.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@functools.cache
def _block_masks():
    """The compiled create_block_mask. Without compilation, this function would first build a (B, T, T) mask."""
    return torch.compile(create_block_mask)


def document_mask(tokens_BT: torch.Tensor, fused: bool) -> torch.Tensor | BlockMask:
    """A causal mask within documents: a block mask if `fused`, else bool (B, 1, T, T).

    A document begins with the end-of-text token.
    """
    document_BT = (tokens_BT == GPT2_END_OF_TEXT).cumsum(1)
    B, T = tokens_BT.shape
    if fused:

        def sees(b, h, q, k):
            return (q >= k) & (document_BT[b, q] == document_BT[b, k])

        return _block_masks()(sees, B, None, T, T, device=tokens_BT.device)
    same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
    return same & torch.ones(T, T, dtype=torch.bool, device=tokens_BT.device).tril()


def document_positions(tokens_BT: torch.Tensor) -> torch.Tensor:
    """Positions (B, T) that restart at 0 with every end-of-text token."""
    positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    begins_BT = torch.where(tokens_BT == GPT2_END_OF_TEXT, positions_T, 0)
    return positions_T - begins_BT.cummax(1).values


def merged(parts: Sequence[tuple[KVCache, Sequence[int]]], room: int) -> KVCache:
    """A new cache of `room` positions with the given rows of each cache. Used if rows end, arrive or need more room."""
    first = parts[0][0]
    rows = sum(len(index) for _, index in parts)
    made = KVCache(first.config, rows, room, first.length_B.device, first._keys.dtype)
    start = 0
    for cache, index in parts:
        span, kept = slice(start, start + len(index)), slice(0, min(room, cache.room))
        made._keys[:, span, :, kept] = cache._keys[:, index, :, kept]
        made._values[:, span, :, kept] = cache._values[:, index, :, kept]
        made.length_B[span] = cache.length_B[index]
        start = span.stop
    return made
