"""Keys and values of tokens that were seen, so that generation computes each position once.

Rows may differ in length: a prompt is padded on the right, `length_B` says where each row really ends, and the next
token overwrites the padding. What lies at or beyond a row's end is masked.

Shapes: B rows, H heads, S room in positions, K head width, T new positions.
"""

from collections.abc import Sequence

import torch

from core.settings.model import ModelConfig


class KVCache:
    """Room for `rows` sequences of `room` positions in every layer."""

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
        """Where the next `count` tokens of each row go, (B, T)."""
        self._written_BT = self.length_B[:, None] + torch.arange(count, device=self.length_B.device)
        return self._written_BT

    def mask(self, positions_BT: torch.Tensor) -> torch.Tensor:
        """Which cached positions each new one sees, (B, 1, T, S)."""
        seen = torch.arange(self.room, device=positions_BT.device) <= positions_BT[..., None]
        return seen[:, None]

    def extend(self, layer: int, k_BHTK: torch.Tensor, v_BHTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new keys and values at `positions`; returns all of that layer, (B, H, S, K)."""
        self._keys[layer][self._rows_B1, :, self._written_BT] = k_BHTK.transpose(1, 2).to(self._keys.dtype)
        self._values[layer][self._rows_B1, :, self._written_BT] = v_BHTK.transpose(1, 2).to(self._values.dtype)
        return self._keys[layer], self._values[layer]

    def advance(self, count: int) -> None:
        self.length_B = self.length_B + count

    def set_lengths(self, length_B: torch.Tensor) -> None:
        """Say where rows end: after a padded prompt, or to take tokens back."""
        self.length_B = length_B.to(self.length_B)


def merged(parts: Sequence[tuple[KVCache, Sequence[int]]], room: int) -> KVCache:
    """These rows of each cache, one below the other, with that room: for when rows leave, join or grow."""
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
