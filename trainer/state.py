"""Everything that a step changes: the parameters and AdamW's moments, by name.

Names in checkpoints are those of the parameters ("h.0.attn.c_attn.weight") with a prefix for what it is:
`model.`, `exp_avg.`, `exp_avg_sq.`. The optimizer's step count is the step of the checkpoint.
"""

from collections.abc import Iterator

import torch
from torch import nn

from trainer.checkpoint.pieces import deal, key_of

MOMENTS = ("exp_avg", "exp_avg_sq")


class TrainState:
    """Model and optimizer as named tensors. The moments exist from the start (zero), not from the first step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.AdamW, rank: int, world: int):
        self._optimizer = optimizer
        self._parameters = dict(model.named_parameters())
        for parameter in self._parameters.values():
            state = optimizer.state[parameter]
            state["step"] = torch.zeros(
                (), dtype=torch.float32, device=parameter.device if parameter.is_cuda else "cpu"
            )
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self._mine = [unit for unit in deal(shapes, world) if unit.owner == rank]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, whole."""
        found = {f"model.{name}": parameter.detach() for name, parameter in self._parameters.items()}
        for moment in MOMENTS:
            found |= {f"{moment}.{name}": self._optimizer.state[p][moment] for name, p in self._parameters.items()}
        return found

    def blocks(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's share of a checkpoint: (key, rows)."""
        tensors = self.tensors()
        for prefix in ("model", *MOMENTS):
            for unit in self._mine:
                name = f"{prefix}.{unit.name}"
                yield key_of(name, unit.start, unit.stop), tensors[name][unit.start : unit.stop]

    def set_step(self, step: int) -> None:
        """Tell AdamW's bias correction how many steps were done."""
        for parameter in self._parameters.values():
            self._optimizer.state[parameter]["step"].fill_(step)
