"""Compares a training step of several trainers: tokens/s, MFU, memory, time by part, and a lower bound.

    python -m bench.train_step --preset=gpt2-124m --micro-batch=32 [--rivals=FOLDER] [--out=FILE]

All sides use one device, and the same model, batch and precision. Each side runs as a process, in interleaved rounds.
The table shows medians.

    ours     the step of the trainer's loop
    before   our step in another checkout of this project (--before)
    plain    the step of teaching code (complete logits, torch's AdamW); on a GPU it is also measured compiled
    others   nanoGPT, build-nanogpt and modded-nanogpt, if FOLDER holds their checkouts

Tokens are random, or the first tokens of a dataset (--data). bench.loader measures the reading of tokens.

The roofline is the lower bound of a step's time. It is the longer of two times. The first is the time of the matrix
products at the device's peak FLOP/s. core.gpus lists the peak of a GPU; on a CPU, a large product measures the peak.
The second is the time to read and write weights, gradients and optimizer state once.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import harness, tokens
from bench.gpu import presets
from core.figures import quantity
from core.gpus import peak_flops
from core.settings import loader
from core.settings.model import flops_per_token, parameters
from core.settings.training import PretrainConfig

PARTS = ("forward", "backward", "optimizer")
ATTENTION = ("flash", "cudnn", "mem_efficient", "math")  # torch.backends.cuda.enable_NAME_sdp


def main() -> None:
    options = _options()
    settings = _settings(options)
    if options.one:
        result = _measure(options, settings)
        harness.say(_line(options.one, result), **result)
        return
    sides = options.sides.split(",") if options.sides else _sides(options)
    runs = harness.interleaved({side: _process(side, options.before) for side in sides}, options.rounds)
    results = {
        **harness.header("torch", "numpy"),
        "command": "python -m bench.train_step " + " ".join(sys.argv[1:]),
        "device": runs[sides[0]][0]["device"],
        "model": loader.to_dict(settings.model),
        "parameters": parameters(settings.model),
        "flops_per_token": flops_per_token(settings.model),
        "micro_batch": settings.batch.micro_batch_size,
        "accumulation": options.accumulation,
        "steps": options.steps,
        "runs": runs,
    }
    harness.finish(results, show, options.out)


def _process(side: str, before: Path | None) -> Callable[[int], dict[str, Any]]:
    flags = [each for each in sys.argv[1:] if not each.startswith("--before")]
    command = [sys.executable, "-m", "bench.train_step", *flags]
    if side == "before":
        command = ["env", "-C", str(before), *command, "--one=ours"]
    else:
        command.append(f"--one={side}")
    return lambda _: harness.measured(command)


def _options() -> argparse.Namespace:
    parser = harness.options(__doc__, rounds=3)
    parser.add_argument("--preset", default="gpt2-124m", help="a name in trainer/configs")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences per micro-batch; 0: the preset's")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--context", type=int, default=0, help="tokens per sequence; 0: the preset's")
    parser.add_argument("--steps", type=int, default=20, help="measured steps per round")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument(
        "--sides", default="", help="ours, plain, plain-compiled and names of rivals, separated by commas; default: all"
    )
    parser.add_argument("--rivals", type=Path, help="folder with checkouts of other trainers")
    parser.add_argument(
        "--before", type=lambda given: Path(given).resolve(), help="folder with another checkout to compare"
    )
    parser.add_argument("--device", default="", help="cpu or cuda; default: cuda if available")
    parser.add_argument("--data", default="", help="dataset whose first tokens are used; default: random tokens")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another setting for the trainer; repeatable"
    )
    parser.add_argument("--optimize-ddp", choices=("on", "off"), help="whether torch splits graphs under DDP")
    parser.add_argument("--attention", choices=ATTENTION, help="the only attention kernel that torch may choose")
    parser.add_argument("--without", default="", help="optimizations of our step to switch off (bench.gpu.toggles)")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _settings(options: argparse.Namespace) -> PretrainConfig:
    settings = presets.settings_of(options.preset, *(f"--{each}" for each in options.set))
    size = options.micro_batch or settings.batch.micro_batch_size
    context = options.context or settings.model.context
    flags = [f"--{each}" for each in options.set] + [f"--model.context={context}", f"--batch.micro_batch_size={size}"]
    return presets.settings_of(
        options.preset, *flags, f"--batch.tokens_per_step={size * options.accumulation * context}"
    )


def _sides(options: argparse.Namespace) -> list[str]:
    import torch

    from bench.step_sides import OTHERS

    found = [name for name in OTHERS if options.rivals and (options.rivals / name).is_dir()]
    compiled = ["plain-compiled"] if torch.cuda.is_available() and options.device != "cpu" else []
    return ["ours", *(["before"] if options.before else []), "plain", *compiled, *found]


def _measure(options: argparse.Namespace, settings: PretrainConfig) -> dict:
    import torch

    from bench import step_sides
    from bench.gpu import clock, toggles
    from trainer.distributed import process_group

    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = process_group.start(kind).device
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(1)
    toggles.undo(options.without)
    if options.one in step_sides.OTHERS:
        side = step_sides.OTHERS[options.one](options.rivals, settings, device)
    elif options.one == "ours":
        side = step_sides.ours(settings, device, options.accumulation)
    else:
        side = step_sides.plain(settings, device, options.accumulation, options.one == "plain-compiled")
    _toggle(options)
    batches = _batches(options, settings, device)
    for _ in range(options.warm_up):
        _step(side, batches, clock.Parts(device, PARTS))
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clocks = []
    for _ in range(options.steps):
        clocks.append(clock.Parts(device, PARTS))
        loss = _step(side, batches, clocks[-1])
    steps = [parts.seconds() for parts in clocks]
    in_order = [sum(step.values()) for step in steps]
    whole = sorted(in_order)
    rounds = clock.summary(in_order)
    tokens_per_second = settings.batch.tokens_per_step / rounds["median"]
    flops = settings.batch.tokens_per_step * flops_per_token(settings.model)
    peak = peak_flops(torch.cuda.get_device_name()) if kind == "cuda" else _measured_peak(device)
    # AdamW reads 4 tensors of the model's size and writes 3; zeroing and clipping pass over the gradients twice more.
    moved = 4 * parameters(settings.model) * 9
    result = {
        "tokens_per_second": tokens_per_second,
        "mfu": flops / rounds["median"] / peak if peak else None,
        "rounds_seconds": rounds["rounds"],
        "optimize_ddp": str(torch._dynamo.config.optimize_ddp),
        "peak_bytes": torch.cuda.max_memory_allocated() if kind == "cuda" else None,
        "step_seconds": {f"p{share}": whole[round((len(whole) - 1) * share / 100)] for share in (10, 50, 90)},
        "share": {part: sum(step[part] for step in steps) / sum(whole) for part in PARTS},
        "roofline": {
            "peak_flops": peak,
            "products_seconds": flops / peak if peak else None,
            "optimizer_bytes": moved,
        },
        "loss": loss,
        "device": torch.cuda.get_device_name() if kind == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    }
    process_group.stop()
    return result


def _toggle(options: argparse.Namespace) -> None:
    """Set torch's global switches. This must come before the first step, whose compilation reads the switches."""
    import torch

    if options.optimize_ddp:
        torch._dynamo.config.optimize_ddp = options.optimize_ddp == "on"
    for kernel in ATTENTION if options.attention else ():
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(kernel == options.attention)


def _batches(options: argparse.Namespace, settings: PretrainConfig, device) -> list:
    """The micro-batches of a step, each (sequences, context + 1). Every step uses the same micro-batches."""
    import torch

    shape = (settings.batch.micro_batch_size, settings.model.context + 1)
    if not options.data:
        return [torch.randint(0, 50000, shape, device=device, dtype=torch.int32) for _ in range(options.accumulation)]
    rows = tokens.first_windows(options.data, shape[0] * options.accumulation, shape[1])
    return list(torch.from_numpy(rows).to(device).chunk(options.accumulation))


def _line(side: str, result: dict[str, Any]) -> str:
    """A side's result as one line."""
    mfu = "" if result["mfu"] is None else f", MFU {100 * result['mfu']:.1f} %"
    memory = "" if result["peak_bytes"] is None else f", {result['peak_bytes'] / 1e9:.1f} GB"
    milliseconds = 1e3 * result["step_seconds"]["p50"]
    return f"{side}: {milliseconds:.1f} ms per step, {quantity(result['tokens_per_second'])} tokens/s{mfu}{memory}"


def _step(side, batches: list, parts) -> float:
    side.begin()
    parts.mark(None)
    for index, tokens_BT in enumerate(batches):
        with side.context(index):
            loss = side.forward(tokens_BT)
            parts.mark("forward")
            (loss if side.scales else loss / len(batches)).backward()
        side.done(index)
        parts.mark("backward")
    side.finish()
    parts.mark("optimizer")
    return float(loss.detach())


def _measured_peak(device) -> float:
    """FLOP/s of a large float32 matrix product on this CPU, the best of eight."""
    import torch

    size, best = 2048, 0.0
    a, b = torch.randn(2, size, size, device=device).unbind(0)
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def show(results: dict) -> None:
    middle = {  # for each side, the run with the median speed
        side: sorted(runs, key=lambda run: run["tokens_per_second"])[len(runs) // 2]
        for side, runs in results["runs"].items()
    }
    first, peak = next(iter(results["runs"])), _peak(results["runs"])
    rows = [
        [
            side,
            quantity(run["tokens_per_second"]),
            f"{harness.ratio(results['runs'], side, first, 'tokens_per_second'):.2f}",
            "?" if peak is None else f"{100 * run['tokens_per_second'] * results['flops_per_token'] / peak:.1f} %",
            "" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 1e9:.1f} GB",
            " / ".join(f"{value:.3f}" for value in run["step_seconds"].values()),
            " / ".join(f"{100 * value:.0f} %" for value in run["share"].values()),
        ]
        for side, run in middle.items()
    ]
    about = f"{results['device']}, torch {results['versions']['torch']}, {results['date']}"
    batch = f"{results['micro_batch']} x {results['model']['context']} x {results['accumulation']} tokens per step"
    heads = ("side", "tokens/s", "x first", "MFU", "memory", "step p10/p50/p90 s", "forward / backward / optimizer")
    harness.print_table(f"{quantity(results['parameters'])} parameters, {batch}; {about}", heads, rows)


def _peak(runs: dict[str, list[dict]]) -> float | None:
    """The peak FLOP/s for MFU: the highest of all runs, because each run measures the FLOP/s of a CPU anew."""
    measured = [run["roofline"]["peak_flops"] for results in runs.values() for run in results]
    return max((each for each in measured if each), default=None)


if __name__ == "__main__":
    main()
