"""Carries the numbers of a step from the device to the host while the device computes the next step.

The device decides whether a number is finite, because the update on the device needs the answer. A decision on the host
would make the host wait. The host reads losses and norms one step late. It reports them, or names the number that is
not finite.

Shapes: W ranks, A micro-batches per rank and step.
"""

import math
from dataclasses import dataclass

import torch

from trainer.loop.health import DeviceClock, StepNorms, to_host


class Gate:
    """Stops all further updates once a number is not finite, without a transfer from the device to the host."""

    def __init__(self, device: torch.device):
        self._zero = torch.zeros((), device=device)

    def check(self, numbers: torch.Tensor) -> torch.Tensor:
        """A float32 scalar: 1.0 if a number of this call or of an earlier call is not finite, else 0.0.

        All ranks must call this with the same numbers, so that either all ranks update or none does.
        """
        self._zero += (numbers * 0).sum()  # the product with 0 is NaN if a number is not finite
        return (self._zero != 0).float()


@dataclass
class StepNumbers:
    """The results of optimizer step `step`. `numbers` (W, A + 1) are the losses and the gradient norm of each rank."""

    step: int
    factor: float  # learning rate as a share of the peak
    numbers: torch.Tensor
    forward: DeviceClock
    waited: DeviceClock  # the wait before the step, for data and for other ranks
    whole: DeviceClock
    norms: StepNorms | None

    def __post_init__(self):
        self._ready = None
        on_gpu, self.numbers = self.numbers.is_cuda, to_host(self.numbers)
        if on_gpu:
            self._ready = torch.cuda.Event()
            self._ready.record()

    def wait(self) -> None:
        """Wait until the device has computed the step. The methods below may be called only afterwards."""
        if self._ready:
            self._ready.synchronize()

    def loss(self) -> float:
        """The mean of all losses. The sum is exact, so its bits do not depend on the order of the ranks."""
        losses = self.numbers[:, :-1]
        return math.fsum(losses.flatten().tolist()) / losses.numel()

    def norm(self) -> float:
        return float(self.numbers[0, -1])

    def problem(self) -> str:
        """A text that names a number that is not finite, and the rank that has it.

        The text is empty if all numbers are finite.
        """
        losses, norms = self.numbers[:, :-1], self.numbers[:, -1]
        bad_losses, bad_norms = (~losses.isfinite()).nonzero(), (~norms.isfinite()).nonzero()
        if len(bad_losses):
            return f"the loss on rank {int(bad_losses[0, 0])} is {float(losses[tuple(bad_losses[0])])}"
        if len(bad_norms):
            rank = int(bad_norms[0])
            where = "" if len(bad_norms) == len(norms) else f" on rank {rank}"
            return f"the gradient norm{where} is {float(norms[rank])}"
        return ""

    def waited_seconds(self) -> float:
        return self.waited.seconds()

    def all_seconds(self) -> tuple[float, float, float]:
        """Seconds of three things: the step with the wait before it, the step alone, and the step's forward passes."""
        whole = self.whole.seconds()
        return self.waited.seconds() + whole, whole, self.forward.seconds()
