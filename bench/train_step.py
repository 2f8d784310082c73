"""A training step side by side: tokens/s, MFU, memory, and where its time goes, against the limit of the device.

    python -m bench.train_step --preset=gpt2-124m --micro-batch=32 [--rivals=FOLDER] [--out=FILE]

One device, the same model, batch and precision for all sides, each in a process of its own, rounds interleaved,
medians printed. `ours` is the loop's own step; `plain` is teaching code's (whole logits, torch's AdamW), on a GPU
also compiled. FOLDER may hold checkouts of nanoGPT, build-nanogpt and modded-nanogpt. Tokens are random, or the first
ones of a token set (--data): reading is measured by bench.loader.

The roofline: a step cannot be faster than its matrix products at the device's peak (core.gpus; on a CPU, of a large
product measured right here), nor than reading and writing weights, gradients and optimizer state once.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import record
from bench.gpu import children, tokens
from core.figures import quantity
from core.gpus import peak_flops
from core.settings import loader
from core.settings.model import flops_per_token, parameters
from core.settings.training import PretrainConfig

CONFIGS = Path(__file__).parent.parent / "trainer" / "configs"
PARTS = ("forward", "backward", "optimizer")
ATTENTION = ("flash", "cudnn", "mem_efficient", "math")  # torch.backends.cuda.enable_NAME_sdp


def main() -> None:
    options = _options()
    settings = _settings(options)
    if options.one:
        result = _measure(options, settings)
        children.say(_line(options.one, result), **result)
        return
    sides = options.sides.split(",") if options.sides else _sides(options)
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side in sides:
            command = [sys.executable, "-m", "bench.train_step", *sys.argv[1:], f"--one={side}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
            runs[side].append(children.heard(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}, {side}: {runs[side][-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
    results = {
        **record.header("torch", "numpy"),
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
    _show(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt2-124m", help="a name in trainer/configs")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences; 0: the preset's")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--context", type=int, default=0, help="tokens per sequence; 0: the preset's")
    parser.add_argument("--steps", type=int, default=20, help="measured steps per round, after --warm-up ones")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default="", help="of ours, plain, plain-compiled and rivals; default: all there are")
    parser.add_argument("--rivals", type=Path, help="folder with checkouts of other trainers")
    parser.add_argument("--device", default="", help="cpu or cuda; default: what there is")
    parser.add_argument("--data", default="", help="token set whose first tokens are trained on; default: random ones")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting beside the preset's")
    parser.add_argument("--optimize-ddp", choices=("on", "off"), help="torch's splitting of graphs under DDP")
    parser.add_argument("--attention", choices=ATTENTION, help="the only kernel of attention that torch may choose")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def _settings(options: argparse.Namespace) -> PretrainConfig:
    flags = [str(CONFIGS / f"{options.preset}.yaml"), "--run.url=unused", "--data.url=unused"]
    flags += [f"--{each}" for each in options.set]
    settings = loader.load(PretrainConfig, flags, {})
    size = options.micro_batch or settings.batch.micro_batch_size
    context = options.context or settings.model.context
    flags += [f"--model.context={context}", f"--batch.micro_batch_size={size}"]
    return loader.load(PretrainConfig, [*flags, f"--batch.tokens_per_step={size * options.accumulation * context}"], {})


def _sides(options: argparse.Namespace) -> list[str]:
    import torch

    from bench.step_sides import OTHERS

    there = [name for name in OTHERS if options.rivals and (options.rivals / name).is_dir()]
    compiled = ["plain-compiled"] if torch.cuda.is_available() and options.device != "cpu" else []
    return ["ours", "plain", *compiled, *there]


def _measure(options: argparse.Namespace, settings: PretrainConfig) -> dict:
    import torch

    from bench import step_sides
    from bench.gpu import clock
    from trainer.distributed import process_group

    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = process_group.start(kind).device
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(1)
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
    peak = peak_flops(torch.cuda.get_device_name()) if kind == "cuda" else _measured_peak(device)
    moved = (
        4 * parameters(settings.model) * 9
    )  # weights, gradients and two moments: AdamW reads 4, writes 3; zero, clip
    result = {
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * flops_per_token(settings.model) / peak if peak else None,
        "rounds_seconds": rounds["rounds"],
        "optimize_ddp": str(torch._dynamo.config.optimize_ddp),
        "peak_bytes": torch.cuda.max_memory_allocated() if kind == "cuda" else None,
        "step_seconds": {f"p{share}": whole[round((len(whole) - 1) * share / 100)] for share in (10, 50, 90)},
        "share": {part: sum(step[part] for step in steps) / sum(whole) for part in PARTS},
        "roofline": {
            "peak_flops": peak,
            "products_seconds": settings.batch.tokens_per_step * flops_per_token(settings.model) / peak
            if peak
            else None,
            "optimizer_bytes": moved,
        },
        "loss": loss,
        "device": torch.cuda.get_device_name() if kind == "cuda" else f"CPU, {torch.get_num_threads()} threads",
    }
    process_group.stop()
    return result


def _toggle(options: argparse.Namespace) -> None:
    """What torch itself has switches for; read when the first step is compiled."""
    import torch

    if options.optimize_ddp:
        torch._dynamo.config.optimize_ddp = options.optimize_ddp == "on"
    for kernel in ATTENTION if options.attention else ():
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(kernel == options.attention)


def _batches(options: argparse.Namespace, settings: PretrainConfig, device) -> list:
    """The micro-batches of every step."""
    import torch

    shape = (settings.batch.micro_batch_size, settings.model.context + 1)
    if not options.data:
        return [torch.randint(0, 50000, shape, device=device, dtype=torch.int32) for _ in range(options.accumulation)]
    rows = tokens.first_windows(options.data, shape[0] * options.accumulation, shape[1])
    return list(torch.from_numpy(rows).to(device).chunk(options.accumulation))


def _line(side: str, result: dict[str, Any]) -> str:
    """One side in a line."""
    mfu = "" if result["mfu"] is None else f", MFU {100 * result['mfu']:.1f} %"
    memory = "" if result["peak_bytes"] is None else f", {result['peak_bytes'] / 1e9:.1f} GB"
    milliseconds = 1e3 * result["step_seconds"]["p50"]
    return f"{side}: {milliseconds:.1f} ms per step, {quantity(result['tokens_per_second'])} tokens/s{mfu}{memory}"


def _step(side, batches: list, parts) -> float:
    side.begin()
    parts.mark(None)
    for index, tokens_BT in enumerate(batches):
        with side.context(index):
            loss = side.forward(tokens_BT) / len(batches)
            parts.mark("forward")
            loss.backward()
        side.done(index)
        parts.mark("backward")
    side.finish()
    parts.mark("optimizer")
    return float(loss.detach()) * len(batches)


def _measured_peak(device) -> float:
    """FLOP/s of a large float32 product on this CPU, the best of a few."""
    import torch

    size, best = 2048, 0.0
    a, b = torch.randn(2, size, size, device=device).unbind(0)
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _show(results: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    about = f"{results['device']}, torch {results['versions']['torch']}, {results['date']}"
    batch = f"{results['micro_batch']} x {results['model']['context']} x {results['accumulation']} tokens per step"
    title = f"{quantity(results['parameters'])} parameters, {batch}; {about}"
    heads = ["side", "tokens/s", "x ours", "MFU", "memory", "step p10/p50/p90 s", "forward / backward / optimizer"]
    table = Table(*heads, title=title)
    reference = next(iter(results["runs"].values()))
    ours = statistics.median(run["tokens_per_second"] for run in reference)
    for side, runs in results["runs"].items():
        middle = sorted(runs, key=lambda run: run["tokens_per_second"])[len(runs) // 2]
        speed = middle["tokens_per_second"]
        table.add_row(
            side,
            quantity(speed),
            f"{speed / ours:.2f}",
            "?" if middle["mfu"] is None else f"{100 * middle['mfu']:.1f} %",
            "" if middle["peak_bytes"] is None else f"{middle['peak_bytes'] / 1e9:.1f} GB",
            " / ".join(f"{value:.3f}" for value in middle["step_seconds"].values()),
            " / ".join(f"{100 * value:.0f} %" for value in middle["share"].values()),
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
