"""Gradient sums whose bits do not depend on the number of ranks.

Floating-point addition is not associative, so the usual running sum over accumulation steps followed by a ring
all-reduce gives other bits on 8 GPUs than on 4, and a run that resumes elsewhere drifts away. Here the M
micro-batches of a step are the leaves of one fixed binary tree:

    M = 2**k * q, q odd:  each q consecutive micro-batches are summed in order, then neighbours pairwise

A rank holds consecutive micro-batches, that is a whole subtree as long as the number of ranks divides 2**k, sums
it locally with a binary counter of at most log2(accumulation) gradient copies, and the ranks' sums are then added
pairwise too. The exchange is an all-to-all (each rank receives its slice from everybody), a local tree sum and an
all-gather: the same bytes as a ring all-reduce, overlapped with the backward pass by a DDP communication hook.

With `dealt`, for models whose gradient copies do not fit (ZeRO stage 2, Rajbhandari et al. 2020, section 5.2), the
ranks take turns instead: the first group goes to rank 0, the next one to rank 1. So the ranks' groups of one turn are
the tree's lowest level; they are exchanged at once, and each rank keeps the copies of its slice alone. The same
tree, the same bits, for an exchange per turn instead of one per step.

A world size with an odd factor that is not in M/q still trains, with sums equal up to rounding.
"""

import contextlib
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.data.order import odd_part
from trainer.distributed.process_group import all_gather


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
    `dealt`: which micro-batches are a rank's, is told by `trainer.data.order.micro_batch_numbers`.
    """

    def __init__(
        self, model: DistributedDataParallel, accumulation: int, dtype: str = "fp32", round_robin: bool = False
    ):
        self.model = model
        self.accumulation = accumulation
        self._dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.group = odd_part(accumulation)
        self._round_robin = round_robin and dist.get_world_size() > 1
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._index = {parameter: index for index, parameter in enumerate(self.parameters)}
        self._levels: list[list[torch.Tensor]] = []
        self._occupied: list[bool] = []
        self._slices: dict[int, list[torch.Tensor | None]] = {}  # bucket → this rank's slice per level
        self._last = False
        self._stream = torch.cuda.Stream() if next(model.parameters()).is_cuda else None
        model.register_comm_hook(None, self._reduce_bucket)

    def context(self, micro_batch_size: int):
        """DDP synchronises in the last micro-batch only, or, dealt, in the last one of each group."""
        self._last = micro_batch_size == self.accumulation - 1
        ends_group = self._round_robin and (micro_batch_size + 1) % self.group == 0
        return contextlib.nullcontext() if self._last or ends_group else self.model.no_sync()

    def micro_batch_done(self, micro_batch_size: int) -> None:
        """Move a finished group's sum out of `.grad` into the tree."""
        if self._round_robin or micro_batch_size == self.accumulation - 1 or (micro_batch_size + 1) % self.group:
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
        self._slices.clear()
        self.model.zero_grad(set_to_none=False)

    def _reduce_bucket(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer()
        gradients = bucket.gradients()
        indices = [self._index[parameter] for parameter in bucket.parameters()]
        for level, occupied in zip(self._levels, self._occupied, strict=True):
            if occupied:
                torch._foreach_add_(gradients, [level[index] for index in indices])
        if self._stream is None:
            self._exchange(bucket.index(), buffer)
            future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            future.set_result(buffer)
            return future
        # On its own stream the exchange runs beside the rest of the backward pass; buckets keep their order.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._exchange(bucket.index(), buffer)
            buffer.record_stream(self._stream)
            future = torch.futures.Future(devices=[buffer.device])
            future.set_result(buffer)
        return future

    def settle(self, loss_of: Callable[[], torch.Tensor]) -> None:
        """To be called before the first step, with what computes the loss of some micro-batch.

        DDP cuts its buckets anew after its first backward pass, in the order in which gradients came. Slices of one
        step's turns must be of the same buckets, so that this has to be over before."""
        if self._round_robin:
            self._last = True
            for _ in range(2):
                loss_of().backward()

    def _exchange(self, index: int, buffer: torch.Tensor) -> None:
        """In place, `buffer` becomes the tree sum over all ranks, and, dealt, over all turns once the last one is in;
        before that it is cleared for the next turn."""
        world = dist.get_world_size()
        if world == 1:
            return
        mine = _tree_reduce_scatter(buffer, self._dtype)
        if self._round_robin:
            levels = self._slices.setdefault(index, [])
            level = 0
            # The last turn finds all levels below its own occupied: it takes them all in.
            while level < len(levels) and (levels[level] is not None or self._last):
                mine = mine if levels[level] is None else levels[level] + mine
                levels[level] = None
                level += 1
            if not self._last:
                levels += [None] * (level + 1 - len(levels))
                levels[level] = mine
                buffer.zero_()
                return
        everyones = mine.new_empty(mine.numel() * world, dtype=self._dtype)
        all_gather(everyones, mine.to(self._dtype))
        buffer.copy_(everyones[: buffer.numel()])


def _tree_reduce_scatter(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """This rank's slice of the tree sum of one-dimensional buffers, the last one padded with zeros.

    What travels is of `dtype`; sums are made in that of the buffer.
    """
    world = dist.get_world_size()
    slice_size = -(-buffer.numel() // world)
    padded = nn.functional.pad(buffer, (0, slice_size * world - buffer.numel())).to(dtype)
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded)
    return tree_sum(received.to(buffer.dtype).view(world, slice_size).unbind(0))
