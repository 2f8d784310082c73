"""Measures the gain of each usual switch, one after the other, from a plain float32 step to the trainer's step.

    python -m bench.ladder --preset=gpt2-124m [--micro-batch=16] [--rounds=3] [--out=FILE]
    python -m bench.ladder --rehearse       on a CPU, with a small model and the switches that a CPU has

Each row keeps the switches of the rows above it. The order follows A. Karpathy's "Let's reproduce GPT-2": TF32, bf16,
torch.compile, flash attention, a padded vocabulary, fused AdamW, a larger micro-batch. The last row is the step of the
trainer's loop. All steps have the same model, random tokens and, except in the row of the larger micro-batch, the same
number of tokens. Each row runs as a process, in interleaved rounds. The table shows medians. bench.train_step compares
whole trainers.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import harness
from bench.gpu import presets
from core.figures import quantity
from core.gpus import peak_flops
from core.settings import loader
from core.settings.model import flops_per_token, parameters
from core.settings.training import PretrainConfig

PLAIN_VOCABULARY, PADDED_VOCABULARY = 50257, 50304
LARGER = 2  # factor of the larger micro-batch


@dataclass(frozen=True)
class Switches:
    """The switches of a step. `matmul` is torch's precision of float32 products; "high" is TF32 on a GPU."""

    matmul: str = "highest"
    bf16: bool = False
    compiled: bool = False
    flash: bool = False
    padded: bool = False
    fused: bool = False
    larger: bool = False
    own: bool = False


@dataclass(frozen=True)
class Rung:
    """A row of the ladder. `changes` are the switches that the row turns on."""

    name: str
    changes: dict[str, Any]
    needs_cuda: bool = False


RUNGS = (
    Rung("fp32", {}),
    Rung("tf32", {"matmul": "high"}, needs_cuda=True),
    Rung("bf16", {"bf16": True}),
    Rung("compile", {"compiled": True}),
    Rung("flash-attention", {"flash": True}),
    Rung("padded-vocabulary", {"padded": True}),
    Rung("fused-adamw", {"fused": True}),
    Rung("larger-micro-batch", {"larger": True}),
    Rung("trainer", {"own": True}),
)


def switches_of(name: str) -> Switches:
    """The switches of a row, including those of the rows above it."""
    found = Switches()
    for rung in RUNGS:
        found = replace(found, **rung.changes)
        if rung.name == name:
            return found
    raise ValueError(f"no row {name}")


def main() -> None:
    options = _options()
    device = presets.device_of(options)
    if options.one:
        result = measure(options, device)
        harness.say(f"{options.one}: {quantity(result['tokens_per_second'])} tokens/s", **result)
        return
    rungs = [rung for rung in RUNGS if device.type == "cuda" or not rung.needs_cuda]
    command = [sys.executable, "-m", "bench.ladder", *sys.argv[1:]]
    sides: dict[str, Callable[[int], dict[str, Any]]] = {
        rung.name: lambda _, name=rung.name: harness.measured([*command, f"--one={name}"]) for rung in rungs
    }
    runs = harness.interleaved(sides, options.rounds)
    settings = _settings(options, Switches(padded=True))
    results = {
        **harness.header("torch"),
        "command": "python -m bench.ladder " + " ".join(sys.argv[1:]),
        "device": runs["fp32"][0]["device"],
        "model": loader.to_dict(settings.model),
        "parameters": parameters(settings.model),
        "steps": options.steps,
        "left_out": [rung.name for rung in RUNGS if rung not in rungs],
        "runs": runs,
    }
    harness.finish(results, show, options.out)


def _options() -> argparse.Namespace:
    parser = presets.options(__doc__, presets.PLAIN)
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences per micro-batch; 0: half of the preset's")
    parser.add_argument("--steps", type=int, default=20, help="measured steps per round")
    parser.add_argument("--warm-up", type=int, default=5, help="steps of a round that are not measured")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _settings(options: argparse.Namespace, switches: Switches) -> PretrainConfig:
    """The preset with the vocabulary and the micro-batch size of a row. A step has one micro-batch."""
    flags = presets.small_flags() if options.rehearse else []
    vocabulary = PADDED_VOCABULARY if switches.padded else PLAIN_VOCABULARY
    known = presets.settings_of(options.preset, *flags)
    size = options.micro_batch or (1 if options.rehearse else max(1, known.batch.micro_batch_size // LARGER))
    size *= LARGER if switches.larger else 1
    tokens = size * known.model.context
    return presets.settings_of(
        options.preset,
        *flags,
        f"--model.padded_vocab_size={vocabulary}",
        f"--batch.micro_batch_size={size}",
        f"--batch.tokens_per_step={tokens}",
    )


def measure(options: argparse.Namespace, device) -> dict[str, Any]:
    """Tokens/s, MFU and memory of the row `options.one` in this process."""
    import torch

    from bench import step_sides
    from bench.gpu import clock
    from trainer.distributed import process_group

    switches = switches_of(options.one)
    settings = _settings(options, switches)
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high" if switches.own else switches.matmul)
    if switches.own:
        process_group.start(device.type)
        side = step_sides.ours(settings, device, 1)
    else:
        side = step_sides.teaching(settings, device, switches)
    shape = (settings.batch.micro_batch_size, settings.model.context + 1)
    tokens_BT = torch.randint(0, 50000, shape, device=device, dtype=torch.int32)

    def step() -> float:
        side.begin()
        with side.context(0):
            loss = side.forward(tokens_BT)
            loss.backward()
        side.done(0)
        side.finish()
        return loss

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = clock.summary(clock.rounds(step, device, 4, max(1, options.steps // 4), options.warm_up))["median"]
    rate = settings.batch.tokens_per_step / seconds
    peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    result = {
        "tokens_per_second": rate,
        "step_seconds": seconds,
        "tokens_per_step": settings.batch.tokens_per_step,
        "mfu": rate * flops_per_token(settings.model) / peak if peak else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "loss": float(step().detach()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    }
    if switches.own:
        process_group.stop()
    return result


def show(results: dict[str, Any]) -> None:
    middle = {  # for each row, the run with the median speed
        name: sorted(runs, key=lambda run: run["tokens_per_second"])[len(runs) // 2]
        for name, runs in results["runs"].items()
    }
    rows, before, first = [], None, middle["fp32"]["tokens_per_second"]
    for name, run in middle.items():
        rate = run["tokens_per_second"]
        rows.append(
            [
                name,
                quantity(rate),
                "" if before is None else f"{rate / before:.2f}",
                f"{rate / first:.2f}",
                "?" if run["mfu"] is None else f"{100 * run['mfu']:.1f} %",
                "" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 1e9:.1f} GB",
            ]
        )
        before = rate
    about = f"{results['device']}, torch {results['versions']['torch']}, {results['date']}"
    if results["left_out"]:
        about += f"; not on this device: {', '.join(results['left_out'])}"
    heads = ("switch", "tokens/s", "x row above", "x fp32", "MFU", "memory")
    harness.print_table(f"{quantity(results['parameters'])} parameters; {about}", heads, rows)


if __name__ == "__main__":
    main()
