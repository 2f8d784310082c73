"""Measures signs of trouble that the loss does not show yet: growing updates and activations, and slow ranks."""

import statistics
import time

import torch

from trainer.model.gpt import GPT

SLOWER_BY = 1.25  # a rank counts as slow if it takes more than this multiple of the median time
IN_A_ROW = 3  # slow steps before a rank is named, because a single slow step may have any cause


class StepNorms:
    """Measures the norms of one step, and the largest activation of each block.

    Construct this object before the forward passes. Call `gradients` before the update, and `finish` after it. `read`
    gives the results once the device has executed `finish`. The weights are copied, so measure only every few steps.

    Activations grow before a run diverges. Dettmers et al. 2022 describe such outliers. Wortsman et al. 2023,
    "Small-scale proxies", say which norms to observe.
    """

    def __init__(self, model: GPT):
        self._model = model
        self._before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._largest = [torch.zeros((), device=next(model.parameters()).device) for _ in model.h]
        self._found: dict[str, dict[str, torch.Tensor]] = {}
        self._numbers = torch.empty(0)
        model.watch = self._see

    def gradients(self) -> None:
        """Measure the gradients, which are clipped already."""
        self._found["gradients"] = _norms_of_parts(
            {name: p.grad for name, p in self._model.named_parameters() if p.grad is not None}
        )

    def finish(self) -> None:
        """Measure weights and updates."""
        self._model.watch = None
        after = {name: parameter.detach() for name, parameter in self._model.named_parameters()}
        moved = torch._foreach_sub(list(after.values()), [self._before[name] for name in after])
        self._found["weights"] = _norms_of_parts(after)
        self._found["updates"] = _norms_of_parts(dict(zip(after, moved, strict=True)))
        self._before = {}
        norms = [norm for of_part in self._found.values() for norm in of_part.values()]
        self._numbers = to_host(torch.stack([*norms, *self._largest]))

    def read(self) -> dict[str, dict[str, float] | list[float]]:
        """Norms of gradients, weights and updates by part of the model, and the largest activation of each block."""
        numbers = iter(self._numbers.tolist())
        found = {kind: {part: next(numbers) for part in of_part} for kind, of_part in self._found.items()}
        return {**found, "largest_activations": list(numbers)}

    def _see(self, index: int, x_BTD: torch.Tensor) -> None:
        self._largest[index] = torch.maximum(self._largest[index], x_BTD.detach().abs().max().float())


def to_host(values: torch.Tensor) -> torch.Tensor:
    """Copies values to host memory without waiting for a GPU.

    The result is valid once the device has executed the copy.
    """
    if not values.is_cuda:
        return values
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def _norms_of_parts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    of_part: dict[str, list[torch.Tensor]] = {}
    for name, norm in zip(tensors, torch._foreach_norm(list(tensors.values())), strict=True):
        of_part.setdefault(part_of(name), []).append(norm)
    return {part: torch.linalg.vector_norm(torch.stack(norms)) for part, norms in of_part.items()}


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: embedding, head, attention, mlp or other."""
    if name.startswith(("wte", "wpe")):
        return "embedding"
    if name.startswith("lm_head"):
        return "head"
    return "attention" if ".attn." in name else "mlp" if ".mlp." in name else "other"


class SlowRanks:
    """Detects a rank that stays slower than the others, such as one with a throttling GPU.

    Ranks wait for each other within a step, so the time of a whole step does not show which rank is slow. The time of
    the forward passes shows it, because no rank waits in them.
    """

    def __init__(self, world: int):
        self._slow_steps = [0] * world

    def check(self, seconds: list[float]) -> list[tuple[int, float]]:
        """Pairs (rank, multiple of the median time), one for each rank that was slow for the third step in a row.

        `seconds` holds the times by rank.
        """
        median = statistics.median(seconds)
        found = []
        for rank, mine in enumerate(seconds):
            slow = median > 0 and mine > SLOWER_BY * median
            self._slow_steps[rank] = self._slow_steps[rank] + 1 if slow else 0
            if self._slow_steps[rank] == IN_A_ROW:
                found.append((rank, mine / median))
        return found


def slow_rank_sentence(rank: int, times: float, on_gpu: bool) -> str:
    cause = (
        "its GPU may throttle or be damaged; look at nvidia-smi -q -d PERFORMANCE on its node, or take another machine"
        if on_gpu
        else "other programs may use its processors; look at top on its node"
    )
    return f"rank {rank} computes {times:.2f} times as long as the median rank, and all wait for it: {cause}"


class DeviceClock:
    """Adds up the time that the device spends in blocks of code, without making the CPU wait for a GPU.

    A mark at each end of a block waits in the device's queue behind earlier launches. So the time of earlier launches
    is not counted.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list = []

    def __enter__(self) -> None:
        self._marks.append(self._mark())

    def __exit__(self, *_: object) -> None:
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """The sum in seconds. Call this after the device has executed all blocks."""
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self._on_gpu:
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3
        return sum(end - begin for begin, end in pairs)

    def _mark(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
