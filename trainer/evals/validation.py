"""Computes the validation loss on the first validation tokens, with the same result on any number of ranks."""

from collections.abc import Callable

import numpy as np
import torch

from trainer.data.cache import ShardCache
from trainer.distributed.process_group import Ranks, StopCheck, divide_over_ranks
from trainer.model.precision import autocast


class ValidationLoss:
    """Mean next-token loss over the first `tokens` validation tokens, in windows of the context length.

    Each rank computes every world-th micro-batch. The losses are summed in the order of the tokens.
    """

    def __init__(
        self,
        cache: ShardCache,
        length: int,
        tokens: int,
        micro_batch_size: int,
        ranks: Ranks,
        precision: str = "auto",
    ):
        self._precision = precision
        self._ranks = ranks
        available = sum(shard.tokens for shard in cache.shards)
        windows = max(1, min(tokens, available - 1) // length)
        rows = min(micro_batch_size, windows)
        # All batches have the same size, because torch would compile again for a smaller last batch.
        self._count = windows // rows
        self.tokens = self._count * rows * length
        self._batches = []
        for index in range(ranks.rank, self._count, ranks.world):
            flat = cache.stream(index * rows * length, rows * length + 1).astype(np.int32)
            view = np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length]
            self._batches.append(torch.from_numpy(np.ascontiguousarray(view)))

    def __call__(self, model: torch.nn.Module, check_stop: StopCheck | None = None) -> float:
        """Mean loss in nats per token."""
        return self.means(model, lambda tokens: model(tokens[:, :-1], tokens[:, 1:])[None], check_stop)[0]

    @torch.no_grad()
    def means(
        self,
        model: torch.nn.Module,
        measure: Callable[[torch.Tensor], torch.Tensor],
        check_stop: StopCheck | None = None,
    ) -> list[float]:
        """`measure` computes some numbers from one batch (rows, T + 1).

        Returns the mean of each number over all batches.
        """

        def of_batch(index: int) -> list[float]:
            tokens = self._batches[index // self._ranks.world].to(self._ranks.device, non_blocking=True)
            with autocast(self._ranks.device, self._precision):
                return measure(tokens).double().tolist()

        model.eval()
        found = divide_over_ranks(self._count, of_batch, self._ranks, check_stop)
        model.train()
        return [sum(column) / self._count for column in zip(*found, strict=True)]
