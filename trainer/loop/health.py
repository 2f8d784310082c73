"""Measures signs of trouble that the loss does not show yet: growing updates and activations, and slow ranks."""

import statistics
import time

import torch

from trainer.model.gpt import GPT

SLOWER_BY = 1.25  # a slow rank takes more than this multiple of the median time
IN_A_ROW = 3  # slow steps before a rank is named, because a single slow step may have any cause


class StepNorms:
    """Measures one step: construct it before the forward passes, call `finish` after the update.

    It copies the weights, so use it only every few steps. The residual stream of a block grows before a run diverges
    (Dettmers et al. 2022 on outliers; Wortsman et al. 2023, "Small-scale proxies", on the norms to observe).
    """

    def __init__(self, model: GPT):
        self._model = model
        self._before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._largest = [torch.zeros((), device=next(model.parameters()).device) for _ in model.h]
        model.watch = self._see

    def gradients(self) -> dict[str, float]:
        """The gradient norm of each part of the model, after clipping."""
        return self._norms({name: p.grad for name, p in self._model.named_parameters() if p.grad is not None})

    def finish(self) -> dict[str, dict[str, float] | list[float]]:
        """{"weights": norm per part, "updates": norm of the change per part, "largest_activations": per block}."""
        self._model.watch = None
        after = {name: parameter.detach() for name, parameter in self._model.named_parameters()}
        moved = {name: after[name] - self._before[name] for name in after}
        return {
            "weights": self._norms(after),
            "updates": self._norms(moved),
            "largest_activations": torch.stack(self._largest).tolist(),
        }

    def _see(self, index: int, x_BTD: torch.Tensor) -> None:
        self._largest[index] = torch.maximum(self._largest[index], x_BTD.detach().abs().max().float())

    def _norms(self, tensors: dict[str, torch.Tensor]) -> dict[str, float]:
        squares: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            square = tensor.float().square().sum()
            part = part_of(name)
            squares[part] = squares[part] + square if part in squares else square
        return {part: float(square.sqrt()) for part, square in squares.items()}


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
    the forward passes does, because no rank waits in them.
    """

    def __init__(self, world: int):
        self._slow_steps = [0] * world

    def check(self, seconds: list[float]) -> list[tuple[int, float]]:
        """(rank, multiple of the median) of each rank that was slow for the third step in a row. `seconds`: by rank."""
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


class ForwardClock:
    """Adds up the time of forward passes, without making the CPU wait for a GPU."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list = []

    def __enter__(self) -> None:
        self._marks.append(self._mark())

    def __exit__(self, *_: object) -> None:
        self._marks.append(self._mark())

    def seconds(self) -> float:
        """The sum in seconds. Call it after the device has finished the passes."""
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
