"""Validation loss on a fixed stretch of the validation tokens: the same number on any number of ranks."""

import numpy as np
import torch

from trainer.data.cache import ShardCache
from trainer.distributed import Ranks, gather_objects
from trainer.precision import autocast


class ValidationLoss:
    """Mean next-token loss over the first `tokens` validation tokens, in windows of the context length.

    Micro-batches are dealt to the ranks in turn and their losses are summed in the order of the tokens.
    """

    def __init__(
        self,
        cache: ShardCache,
        length: int,
        tokens: int,
        micro_batch: int,
        ranks: Ranks,
        precision: str = "auto",
    ):
        self._precision = precision
        self._ranks = ranks
        available = sum(shard.tokens for shard in cache.shards)
        windows = max(1, min(tokens, available - 1) // length)
        rows = min(micro_batch, windows)
        self._count = windows // rows  # a ragged last batch would compile the model once more
        self.tokens = self._count * rows * length
        self._batches = []
        for index in range(ranks.rank, self._count, ranks.world):
            flat = cache.stream(index * rows * length, rows * length + 1).astype(np.int32)
            view = np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length]
            self._batches.append(torch.from_numpy(np.ascontiguousarray(view)))

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module) -> float:
        """Nats per token."""
        model.eval()
        losses = []
        for batch in self._batches:
            tokens = batch.to(self._ranks.device, non_blocking=True)
            with autocast(self._ranks.device, self._precision):
                losses.append(model(tokens[:, :-1], tokens[:, 1:]).double())
        model.train()
        mine = torch.stack(losses).cpu().tolist() if losses else []
        everyone = gather_objects(mine, self._ranks)
        ordered = [everyone[index % self._ranks.world][index // self._ranks.world] for index in range(self._count)]
        return sum(ordered) / self._count
