"""Sums gradients with the same bits on any number of ranks.

Floating-point addition is not associative. The usual method is a running sum over accumulation steps, followed by a
ring all-reduce. On 8 GPUs, this method gives other bits than on 4 GPUs. So a run that resumes on another number of
ranks diverges from the original run. Here the M micro-batches of a step are the leaves of one fixed binary tree:

    M = 2**k * q, q odd:  each q consecutive micro-batches are summed in order, then neighbouring sums are added.

A rank computes consecutive micro-batches. If the number of ranks divides 2**k, these are a whole subtree. The rank sums
them with a binary counter, which needs at most log2(accumulation) copies of the gradients. The sums of the ranks are
then added pairwise as well. The exchange is an all-to-all (each rank receives its slice from every rank), a local tree
sum and an all-gather. It moves the same bytes as a ring all-reduce, and a DDP communication hook overlaps it with the
backward pass.

The round-robin order (ZeRO stage 2, Rajbhandari et al. 2020, section 5.2) is for models whose gradient copies do not
fit into memory. In a round, each rank computes one group of q micro-batches: rank 0 the first group, rank 1 the second,
and so on. The groups of one round are neighbours at the lowest level of the tree. Their sums are exchanged after each
round, and each rank keeps copies of its own slice only. Tree and bits are the same as in the other order, but there is
one exchange per round instead of one per step.

If the number of ranks does not divide 2**k, training works, but the sums are equal only up to rounding.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.data.order import odd_part
from trainer.distributed.process_group import all_gather


def tree_sum(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The pairwise sum of neighbours, level by level. A part without a neighbour moves up unchanged."""
    level = list(parts)
    while len(level) > 1:
        paired = [left + right for left, right in zip(level[::2], level[1::2], strict=False)]
        level = paired + level[len(paired) * 2 :]
    return level[0]


class TreeReducer:
    """Sums the gradients of a DDP model over `accumulation` micro-batches and all ranks in tree order.

    For each micro-batch i of a step, run the backward pass inside `context(i)`, then call `micro_batch_done(i)`. After
    the last call, `.grad` holds the sum of all M micro-batches on every rank. If `dtype` is bf16, the ranks exchange
    half the bytes. Each rank first rounds its sum to bf16, so the bits then depend on the number of ranks.
    `trainer.data.order.micro_batch_numbers` gives the micro-batches of a rank in either order.
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
        self._slices: dict[int, list[torch.Tensor | None]] = {}  # for each bucket, this rank's slice at each level
        self._last = False
        self._stream = torch.cuda.Stream() if next(model.parameters()).is_cuda else None
        model.register_comm_hook(None, self._reduce_bucket)

    def context(self, index: int):
        """Lets DDP exchange gradients in the last micro-batch, or in the last of each group in round-robin order."""
        self._last = index == self.accumulation - 1
        ends_group = self._round_robin and (index + 1) % self.group == 0
        return contextlib.nullcontext() if self._last or ends_group else self.model.no_sync()

    def micro_batch_done(self, index: int) -> None:
        """Move the sum of a finished group from `.grad` into the tree."""
        if self._round_robin or index == self.accumulation - 1 or (index + 1) % self.group:
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
        """Discard the sums of a finished or failed step, and zero the gradients."""
        self._occupied = [False] * len(self._occupied)
        self._slices.clear()
        # Before the first backward pass there are no gradients. DDP's buckets hold the gradients, so they are zeroed in
        # place.
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

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
        # A second stream runs the exchange during the rest of the backward pass. The buckets keep their order.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._exchange(bucket.index(), buffer)
            buffer.record_stream(self._stream)
            future = torch.futures.Future(devices=[buffer.device])
            future.set_result(buffer)
        return future

    def settle(self, loss_of: Callable[[], torch.Tensor]) -> None:
        """Call before the first step, with a function that computes the loss of some micro-batch.

        After its first backward pass, DDP forms its buckets anew, in the order in which the gradients arrived. The
        slices of all rounds of a step must belong to the same buckets. So this function lets DDP form them earlier.
        """
        if self._round_robin:
            self._last = True
            for _ in range(2):
                loss_of().backward()

    def _exchange(self, index: int, buffer: torch.Tensor) -> None:
        """Replace `buffer` by the tree sum over all ranks.

        In round-robin order, the last round of a step gives the sum over all rounds. Earlier rounds clear `buffer`.
        """
        world = dist.get_world_size()
        if world == 1:
            return
        mine = _tree_reduce_scatter(buffer, self._dtype)
        if self._round_robin:
            levels = self._slices.setdefault(index, [])
            level = 0
            # The last round adds the slices of all lower levels.
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
    """This rank's slice of the tree sum of the ranks' one-dimensional buffers; the last slice is padded with zeros.

    The ranks exchange numbers of type `dtype`; the sum is computed in the dtype of the buffer.
    """
    world = dist.get_world_size()
    slice_size = -(-buffer.numel() // world)
    padded = nn.functional.pad(buffer, (0, slice_size * world - buffer.numel())).to(dtype)
    received = torch.empty_like(padded)
    dist.all_to_all_single(received, padded)
    return tree_sum(received.to(buffer.dtype).view(world, slice_size).unbind(0))


def clip(parameters: Sequence[torch.nn.Parameter], largest: float) -> torch.Tensor:
    """Clip the gradients to a total norm of `largest`; 0 turns clipping off. Returns the norm before clipping.

    The total norm is computed from the norm of each gradient, so its bits do not depend on DDP's buckets.
    """
    norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    if largest:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm
