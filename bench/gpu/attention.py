"""Times causal attention by kernel and shape, forward and backward; a measurement of bench.on_gpu.

    python -m bench.gpu.attention [--rounds=5]

It measures each kernel of scaled_dot_product_attention, the kernel that torch chooses, and compiled FlexAttention.
FLOP/s count only the half of the scores that a causal mask keeps. Outputs of the first shape are compared with float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench import harness
from bench.gpu import clock, presets, profiling

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LARGE = "gpt2-1.5b"
TOKENS, SMALL_TOKENS = 65536, 256
CALLS = 10
# Number of matrix products: two in a forward pass (scores, values), five in a backward pass (FlashAttention-2, 4.1).
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


class Shape(NamedTuple):
    sequences: int
    heads: int
    context: int
    head_width: int

    def __str__(self) -> str:
        return f"{self.sequences} x {self.heads} heads x {self.context} x {self.head_width}"

    def flops(self, products: int) -> float:
        # A multiply-add is 2 FLOPs. The causal mask keeps half of the multiply-adds.
        return products * self.sequences * self.heads * self.context**2 * self.head_width


def main() -> None:
    parser = presets.options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parsed = parser.parse_args()
    device = presets.device_of(parsed)
    for number, shape in enumerate(shapes(parsed.rehearse)):
        for name, call in sides(shape, device).items():
            measure(name, call, shape, device, parsed.rounds, compare=number == 0)


def shapes(rehearse: bool) -> list[Shape]:
    found = []
    for preset in (presets.PLAIN, presets.OTHER, LARGE):
        model = presets.settings_of(preset).model
        context = 64 if rehearse else model.context
        tokens = SMALL_TOKENS if rehearse else TOKENS
        found.append(Shape(tokens // context, 2 if rehearse else model.heads, context, model.head_width))
    return list(dict.fromkeys(found))  # without duplicates, because presets of a rehearsal may have equal shapes


def sides(shape: Shape, device: torch.device) -> dict[str, Callable]:
    def chosen(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def by(backend: SDPBackend) -> Callable:
        def call(q, k, v):
            with sdpa_kernel(backend):
                return chosen(q, k, v)

        return call

    if device.type != "cuda":  # FlexAttention has no backward pass on a CPU
        return {"torch's choice": chosen, "math": by(SDPBackend.MATH)}
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, shape.context, shape.context, device=device)
    flex = torch.compile(flex_attention, dynamic=False)

    def flexible(q, k, v):
        return flex(q, k, v, block_mask=mask)

    return {"torch's choice": chosen, **{name: by(each) for name, each in KERNELS.items()}, "flex": flexible}


def measure(name: str, call: Callable, shape: Shape, device: torch.device, rounds: int, compare: bool) -> None:
    """Report the times of a kernel, or that the kernel does not support this shape."""
    size = (shape.sequences, shape.heads, shape.context, shape.head_width)
    torch.manual_seed(1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, gradient = (torch.randn(size, device=device, dtype=dtype) for _ in range(4))
    inputs = [each.requires_grad_() for each in (q, k, v)]

    def both() -> None:
        for each in inputs:
            each.grad = None
        call(*inputs).backward(gradient)

    said = {"kind": "attention", "kernel": name, "shape": shape._asdict()}
    try:
        error = relative_error(call, inputs) if compare else None
        with torch.no_grad():
            forward = clock.rounds(lambda: call(*inputs), device, rounds, CALLS)
        whole = clock.rounds(both, device, rounds, CALLS)
        ran = kernel_names(both, device)
    except Exception as refusal:  # after an error of torch or of a kernel, the other kernels are still measured
        why = " ".join(f"{type(refusal).__name__}: {refusal}".split())[:300]
        harness.say(f"{name}, {shape}: does not run: {why}", **said, refused=why)
        return
    forward_ms, whole_ms = (1e3 * clock.summary(each, len(each))["median"] for each in (forward, whole))
    rates = {
        "forward": shape.flops(FORWARD_PRODUCTS) / forward_ms / 1e9,
        "both": shape.flops(FORWARD_PRODUCTS + BACKWARD_PRODUCTS) / whole_ms / 1e9,
    }
    text = f"{name}, {shape}: forward {forward_ms:.3f} ms, with backward {whole_ms:.3f} ms, {rates['both']:.3g} TFLOP/s"
    text += f", error {error:.1e}" if error is not None else ""
    times = {"forward_ms": forward_ms, "both_ms": whole_ms, "forward_rounds": forward, "both_rounds": whole}
    harness.say(text, **said, **times, tflops=rates, relative_error=error, kernels=ran)


def relative_error(call: Callable, inputs: list[torch.Tensor]) -> float:
    """Relative error of the output on two sequences, compared with float32 without a fused kernel."""
    few = [each.detach()[:2] for each in inputs]
    with torch.no_grad():
        exact = F.scaled_dot_product_attention(*(each.float().cpu() for each in few), is_causal=True)
        found = call(*inputs)[:2].float().cpu()
    return float((found - exact).norm() / exact.norm())


def kernel_names(call: Callable, device: torch.device) -> list[str]:
    """Names of the kernels that one call runs on a GPU, the longest first."""
    if device.type != "cuda":
        return []
    with profiling.profiled(device) as profile:
        call()
        clock.finish(device)
    return [each["name"] for each in profiling.kernels(profile, device)["top"]]


if __name__ == "__main__":
    main()
