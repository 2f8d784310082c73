"""What goes wrong before the loss shows it: norms of the updates, and the largest activations per block.

Measured in single steps at intervals, since a copy of the weights is needed. A block's residual stream grows before a
run diverges (Dettmers et al. 2022 on outliers; Wortsman et al. 2023, "Small-scale proxies", on norms to watch).
"""

import torch

from trainer.model.gpt import GPT


def part_of(name: str) -> str:
    """The part of the model that a parameter counts to: embedding, head, attention, mlp, or other."""
    if name.startswith(("wte", "wpe")):
        return "embedding"
    if name.startswith("lm_head"):
        return "head"
    return "attention" if ".attn." in name else "mlp" if ".mlp." in name else "other"


class StepNorms:
    """Looks at one step: made before its forward passes, asked after its update."""

    def __init__(self, model: GPT):
        self._model = model
        self._before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._largest = [torch.zeros((), device=next(model.parameters()).device) for _ in model.h]
        model.watch = self._see

    def gradients(self) -> dict[str, float]:
        """Gradient norm per part; after clipping."""
        return self._norms({name: p.grad for name, p in self._model.named_parameters() if p.grad is not None})

    def finish(self) -> dict[str, dict[str, float] | list[float]]:
        """{"weights": norm per part, "updates": norm of what the step changed, "largest_activations": per block}."""
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
