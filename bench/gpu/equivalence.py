"""Compares compiled blocks with the plain model by the loss and all gradients; a measurement of bench.on_gpu.

    python -m bench.gpu.equivalence --preset=gpt2-124m

The plain model in float32 is a third side. Its distance from the other two shows the size of rounding errors.
"""

import dataclasses
import sys

import torch

from bench import harness
from bench.gpu import presets, profiling
from core.data.vocabulary import GPT2_END_OF_TEXT
from core.settings.model import ModelConfig
from trainer.model.gpt import GPT
from trainer.model.precision import autocast

LARGEST_LOSS_DIFFERENCE, SMALLEST_COSINE = 2e-3, 0.99
SEQUENCES = 4


@dataclasses.dataclass
class Pass:
    """Loss of a batch, and the flat gradient of each parameter."""

    loss: float
    gradients: dict[str, torch.Tensor]


@dataclasses.dataclass
class Difference:
    """The difference between two passes.

    `loss` is the relative difference of the losses. `cosine` is the lowest cosine between the two gradients of a
    parameter, and `parameter` is the name of this parameter.
    """

    loss: float
    cosine: float
    parameter: str

    @property
    def is_small(self) -> bool:
        return self.loss <= LARGEST_LOSS_DIFFERENCE and self.cosine >= SMALLEST_COSINE

    def __str__(self) -> str:
        return f"losses differ by {self.loss:.1e}, lowest cosine of gradients {self.cosine:.5f} ({self.parameter})"


def main() -> None:
    parsed = presets.options(__doc__, presets.PLAIN).parse_args()
    device = presets.device_of(parsed)
    model = presets.settings_of(parsed.preset).model
    model = dataclasses.replace(presets.small(model) if parsed.rehearse else model, dropout=0.0, init="gpt2")
    torch.set_float32_matmul_precision("high")  # the trainer's choice
    tokens_BT = tokens_of(model, device)
    plain = one_pass(model, tokens_BT)
    fused = one_pass(model, tokens_BT, is_compiled=True)
    torch.set_float32_matmul_precision("highest")
    exact = one_pass(model, tokens_BT, precision="fp32")
    found = {
        "compiled, plain": difference(fused, plain),
        "plain, float32": difference(plain, exact),
        "compiled, float32": difference(fused, exact),
    }
    text = "\n".join(f"{pair}: {each}" for pair, each in found.items())
    harness.say(text, kind="equivalence", **{pair: dataclasses.asdict(each) for pair, each in found.items()})
    if not found["compiled, plain"].is_small:
        sys.exit(f"{parsed.preset}: compiled and plain blocks differ: {found['compiled, plain']}")


def tokens_of(model: ModelConfig, device: torch.device, sequences: int = SEQUENCES) -> torch.Tensor:
    """Random ids (sequences, context + 1); every hundredth token begins a document."""
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(0, GPT2_END_OF_TEXT, (sequences, model.context + 1), generator=generator)
    found[:, ::100] = GPT2_END_OF_TEXT
    return found.int().to(device)


def one_pass(config: ModelConfig, tokens_BT: torch.Tensor, is_compiled: bool = False, precision: str = "auto") -> Pass:
    """One forward and backward pass. The weights are the same at each call."""
    model = GPT(config)
    model.initialise(1)
    model.to(tokens_BT.device)
    if is_compiled:
        # Forget compiled blocks: both models share code, and torch limits the compiled variants of a function.
        torch.compiler.reset()
        profiling.compile_blocks(model, tokens_BT.device)
    with autocast(tokens_BT.device, precision):
        loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    gradients = {name: parameter.grad.flatten().double() for name, parameter in model.named_parameters()}
    return Pass(float(loss.detach()), gradients)


def difference(one: Pass, other: Pass) -> Difference:
    cosines = {
        name: float(torch.nn.functional.cosine_similarity(gradient, other.gradients[name], dim=0))
        for name, gradient in one.gradients.items()
        if other.gradients[name].norm() > 0  # a gradient is zero if a later weight starts at zero
    }
    lowest = min(cosines, key=cosines.__getitem__)
    return Difference(abs(one.loss - other.loss) / abs(other.loss), cosines[lowest], lowest)


if __name__ == "__main__":
    main()
