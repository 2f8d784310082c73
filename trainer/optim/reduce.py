"""Gradient sums whose bits do not depend on the number of ranks.

Floating-point addition is not associative, so the usual running sum over accumulation steps followed by a ring
all-reduce gives other bits on 8 GPUs than on 4, and a run that resumes elsewhere drifts away. Here the M
micro-batches of a step are the leaves of one fixed binary tree:

    M = 2**k * q, q odd:  each q consecutive micro-batches are summed in order, then neighbours pairwise

A rank holds consecutive micro-batches, that is a whole subtree as long as the number of ranks divides 2**k, sums
it locally with a binary counter of at most log2(accumulation) gradient copies, and the ranks' sums are then added
pairwise too. The exchange is an all-to-all (each rank receives its slice from everybody), a local tree sum and an
all-gather: the same bytes as a ring all-reduce, overlapped with the backward pass by a DDP communication hook.

A world size with an odd factor that is not in M/q still trains, with sums equal up to rounding.
"""

import contextlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.distributed import all_gather


def odd_part(number: int) -> int:
    """The largest odd divisor: 12 → 3."""
    return number // (number & -number)


def tree_sum(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Pairwise sum of neighbours, level by level; an odd one out moves up unchanged."""
    level = list(parts)
    while len(level) > 1:
        paired = [left + right for left, right in zip(level[::2], level[1::2], strict=False)]
        level = paired + level[len(paired) * 2 :]
    return level[0]


class TreeReducer:
    """Sums the gradients of a DDP model over `accumulation` micro-batches and all ranks in tree order.

    Per micro-batch i of a step: run the backward pass inside `context(i)`, then call `micro_batch_done(i)`.
    After the last one `.grad` holds the sum of all M micro-batches on every rank. With `dtype` bf16 half the bytes
    travel between ranks, and what a rank sums itself is rounded before, so that bits depend on the number of ranks.
    """

    def __init__(self, model: DistributedDataParallel, accumulation: int, dtype: str = "fp32"):
        self.model = model
        self.accumulation = accumulation
        self._dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.group = odd_part(accumulation)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._index = {parameter: index for index, parameter in enumerate(self.parameters)}
        self._levels: list[list[torch.Tensor]] = []
        self._occupied: list[bool] = []
        self._stream = torch.cuda.Stream() if next(model.parameters()).is_cuda else None
        model.register_comm_hook(None, self._reduce_bucket)

    def context(self, micro_batch: int):
        """DDP synchronises in the last micro-batch only."""
        return contextlib.nullcontext() if micro_batch == self.accumulation - 1 else self.model.no_sync()

    def micro_batch_done(self, micro_batch: int) -> None:
        """Move a finished group's sum out of `.grad` into the tree."""
        if micro_batch == self.accumulation - 1 or (micro_batch + 1) % self.group:
            return
        carry = [parameter.grad for parameter in self.parameters]
        level = 0
        while level < len(self._levels) and self._occupied[level]:
            torch._foreach_add_(carry, self._levels[level])
            self._occupied[level] = False
            level += 1
        if level == len(self._levels):
            self._levels.append([torch.empty_like(gradient) for gradient in carry])
            self._occupied.append(False)
        torch._foreach_copy_(self._levels[level], carry)
        self._occupied[level] = True
        torch._foreach_zero_(carry)

    def reset(self) -> None:
        """Forget the sums of a finished or abandoned step, and zero the gradients."""
        self._occupied = [False] * len(self._occupied)
        self.model.zero_grad(set_to_none=False)

    def _reduce_bucket(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        gradients = bucket.gradients()
        indices = [self._index[parameter] for parameter in bucket.parameters()]
        for level, occupied in zip(self._levels, self._occupied, strict=True):
            if occupied:
                torch._foreach_add_(gradients, [level[index] for index in indices])
        if self._stream is None:
            _tree_all_reduce(buffer, self._dtype)
            future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            future.set_result(buffer)
            return future
        # On its own stream the exchange runs beside the rest of the backward pass; buckets keep their order.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            _tree_all_reduce(buffer, self._dtype)
            buffer.record_stream(self._stream)
            future = torch.futures.Future(devices=[buffer.device])
            future.set_result(buffer)
        return future


def _tree_all_reduce(buffer: torch.Tensor, dtype: torch.dtype) -> None:
    """In place, `buffer` becomes the tree sum over all ranks. `buffer` is one-dimensional.

    What travels is of `dtype`; sums are made in that of the buffer.
    """
    world = dist.get_world_size()
    if world == 1:
        return
    slice_size = -(-buffer.numel() // world)
    padded = nn.functional.pad(buffer, (0, slice_size * world - buffer.numel())).to(dtype)
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded)
    mine = tree_sum(received.to(buffer.dtype).view(world, slice_size).unbind(0))
    all_gather(padded, mine.to(dtype))
    buffer.copy_(padded[: buffer.numel()])
