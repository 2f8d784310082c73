"""Defines the parts of bench.on_gpu. A part yields its measurements with their commands, the most valuable first.

A part is a generator, because later measurements depend on results of earlier ones.
"""

import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu import toggles
from bench.gpu.presets import OTHER, PLAIN, path, small_flags
from bench.gpu.records import Record
from bench.harness import REPOSITORY

# Sequences per micro-batch, in the order of measurement. With more sequences, the logits of the plain side would exceed
# the GPU's 141 GB.
MICRO_BATCHES = (64, 32, 96)
BF16_RESIDUAL = ("train.residual=bf16", "train.precision=bf16")
# The resume measurement stores a checkpoint every two steps, so its model is narrow. With these numbers of heads, the
# width of a head stays the same.
NARROW = {PLAIN: ["--model.heads=4"], OTHER: ["--model.heads=2"]}


@dataclass(frozen=True)
class Skip:
    """A measurement that cannot be made, with the reason."""

    why: str


@dataclass(frozen=True)
class Place:
    """Inputs and folders of a part. `work` holds runs and is deleted at the end; `out` holds traces and records."""

    data: str
    work: Path
    out: Path
    rivals: Path | None
    rehearse: bool


# The name of a measurement, with one of three things: a command, a result that was computed from earlier results, or a
# reason to skip the measurement.
Measurement = tuple[str, list[str] | dict[str, Any] | Skip]
Part = Callable[[Place, Record], Iterator[Measurement]]


def look(place: Place, record: Record) -> Iterator[Measurement]:
    """Reports versions, and the first steps of both presets with graphs, graph breaks, compilations and kernels."""
    yield "versions", _module("bench.gpu.versions")
    for preset in (PLAIN, OTHER):
        trace = [f"--trace={place.out / f'{record.path.stem}-{preset}-trace.json.gz'}"]
        yield f"steps-{preset}", _steps(place, f"look-{preset}", preset, 30, ["--profile", *trace])


def exact(place: Place, record: Record) -> Iterator[Measurement]:
    """Compares compiled with plain blocks, and a killed run with an uninterrupted run.

    Measures the cost of determinism.
    """
    rehearse = ["--rehearse"] if place.rehearse else []
    yield f"equivalence-{PLAIN}", _module("bench.gpu.equivalence", f"--preset={PLAIN}", *rehearse)
    yield f"resume-{PLAIN}", _resume(place, PLAIN)
    for name, value in (("free", "false"), ("deterministic", "true")):
        flag = f"--train.deterministic={value}"
        yield f"steps-{name}", _steps(place, name, PLAIN, 20, flags=[flag])
    yield "price-of-determinism", _price(record)
    yield f"equivalence-{OTHER}", _module("bench.gpu.equivalence", f"--preset={OTHER}", *rehearse)
    yield f"resume-{OTHER}", _resume(place, OTHER)


def speed(place: Place, record: Record) -> Iterator[Measurement]:
    """Times steps by micro-batch size, the steps of other trainers, attention kernels, and torch's switches."""
    sizes = (1, 2) if place.rehearse else MICRO_BATCHES
    for size in sizes:
        yield f"ours-{size}", _side(place, "ours", size)
    best = max(sizes, key=lambda size: _tokens_per_second(record, f"ours-{size}"))
    yield f"plain-compiled-{best}", _side(place, "plain-compiled", best)
    yield f"nanoGPT-{best}", _rival(place, best)
    rehearse = ["--rehearse", "--rounds=2"] if place.rehearse else []
    yield "attention", _module("bench.gpu.attention", *rehearse)
    other = "off" if _optimizes_ddp(record, f"ours-{best}") else "on"
    yield f"optimize-ddp-{other}", _side(place, "ours", best, f"--optimize-ddp={other}")
    for kernel in ("cudnn", "flash"):
        no_kernel = place.rehearse and kernel == "cudnn"
        side = Skip("a CPU has no such kernel") if no_kernel else _side(place, "ours", best, f"--attention={kernel}")
        yield f"attention-{kernel}", side
    flash3 = "torch has FlashAttention 3 for a GPU only" if place.rehearse else ""
    side = _side(place, "ours", best, "--set=train.attention=flash3")
    yield "attention-flash3", Skip(flash3) if flash3 else side
    yield "residual-bf16", _side(place, "ours", best, *(f"--set={each}" for each in BF16_RESIDUAL))
    yield f"ours-{OTHER}", _side(place, "ours", best, preset=OTHER)


def gains(place: Place, record: Record) -> Iterator[Measurement]:
    """Times steps of the trainer, and the same steps without one of the optimizations that make them fast."""
    yield "steps-with-all", _steps(place, "all", OTHER, 20)
    for name in toggles.TOGGLES:
        yield f"steps-without-{name}", _steps(place, f"without-{name}", OTHER, 20, [f"--without={name}"])
    flags = [f"--{each}" for each in BF16_RESIDUAL]
    yield "steps-residual-bf16", _steps(place, "residual", OTHER, 20, flags=flags)
    yield "gains", _gains(record)


PARTS: Mapping[str, Part] = {"look": look, "exact": exact, "speed": speed, "gains": gains}
MINUTES = {"look": 3.0, "exact": 4.0, "speed": 5.0, "gains": 3.0}


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _trainer_flags(place: Place, preset: str, sequences: int, accumulation: int, context: int) -> list[str]:
    """Settings of a short run without evaluations. Samples and HellaSwag are off too, because they need a tokenizer."""
    tokens = sequences * accumulation * context
    flags = [str(path(preset)), f"--data.url={place.data}", f"--data.cache_dir={place.work / 'cache'}"]
    flags += [
        f"--batch.tokens_per_step={tokens}",
        f"--batch.micro_batch_size={sequences}",
        "--optimizer.warmup_steps=2",
    ]
    flags += ["--train.eval_every=0", f"--train.eval_tokens={tokens}", "--train.hellaswag_items=0"]
    flags += ["--train.sample_prompts=", "--train.display=lines", "--train.log_every=10"]
    if place.rehearse:
        return [*flags, "--train.device=cpu", "--train.cpu_threads=1", *small_flags()]
    return [*flags, "--train.device=cuda"]


def _steps(place: Place, run: str, preset: str, steps: int, options=(), flags=()) -> list[str]:
    """A command that times steps. A step has two micro-batches, so that it includes the work between them."""
    sequences, context, steps = (2, 32, 10) if place.rehearse else (32, 1024, steps)
    trainer = [*_trainer_flags(place, preset, sequences, 2, context), f"--run.url={place.work / run}", *flags]
    return _module("bench.gpu.steps", f"--steps={steps}", *options, "--", *trainer)


def _resume(place: Place, preset: str) -> list[str]:
    """A command that kills and resumes a run.

    A step has sixteen micro-batches, so it takes long enough for a kill to fall between two checkpoints.
    """
    sequences, accumulation, context, steps = (2, 2, 32, 20) if place.rehearse else (8, 16, 1024, 60)
    trainer = _trainer_flags(place, preset, sequences, accumulation, context)
    if not place.rehearse:
        trainer += ["--model.layers=2", "--model.width=256", *NARROW[preset]]
    trainer += ["--checkpoint.every_steps=2"]
    return _module("bench.gpu.resume", f"--work={place.work / f'resume-{preset}'}", f"--steps={steps}", "--", *trainer)


def _side(place: Place, side: str, size: int, *flags: str, preset: str = PLAIN) -> list[str]:
    command = [f"--one={side}", f"--preset={preset}", f"--data={place.data}", f"--micro-batch={size}", *flags]
    if place.rehearse:
        command += ["--device=cpu", "--context=32", "--steps=4", "--warm-up=1"]
        command += [f"--set={flag.removeprefix('--')}" for flag in small_flags()]
    else:
        command += ["--device=cuda", "--steps=20", "--warm-up=5"]
    return _module("bench.train_step", *command)


def _rival(place: Place, size: int) -> list[str] | Skip:
    if place.rivals is None or not (place.rivals / "nanoGPT" / "model.py").exists():
        where = place.rivals or "no folder"
        return Skip(f"no checkout of nanoGPT ({where}); clone karpathy/nanoGPT into FOLDER and give --rivals=FOLDER")
    return _side(place, "nanoGPT", size, f"--rivals={place.rivals}")


def _price(record: Record) -> dict[str, Any] | Skip:
    seconds = {name: _median_step(record, f"steps-{name}") for name in ("free", "deterministic")}
    missing = [name for name, each in seconds.items() if each is None]
    if missing:
        return Skip(f"no steps were timed with {' and '.join(missing)} kernels")
    times = seconds["deterministic"] / seconds["free"]
    return {"text": f"a step with deterministic kernels takes {times:.3f} times as long", "times": times, **seconds}


def _gains(record: Record) -> dict[str, Any] | Skip:
    whole = _median_step(record, "steps-with-all")
    names = [name for name in record.document["measurements"] if name.startswith("steps-") and name != "steps-with-all"]
    others = {name: seconds for name in names if (seconds := _median_step(record, name))}
    if not whole or not others:
        return Skip("no steps were timed with and without an optimization")
    times = {name.removeprefix("steps-"): seconds / whole for name, seconds in others.items()}
    text = ", ".join(f"{name} {each:.3f}" for name, each in times.items())
    return {"text": f"time of a step, as a multiple of the time with all optimizations: {text}", "times": times}


def _median_step(record: Record, name: str) -> float | None:
    found = [each["step_seconds"]["median"] for each in record.results(name) if each.get("kind") == "steps"]
    return statistics.median(found) if found else None


def _optimizes_ddp(record: Record, name: str) -> bool:
    """Whether torch split graphs under DDP in measurement `name`."""
    return any(each["optimize_ddp"] == "True" for each in record.results(name))


def _tokens_per_second(record: Record, name: str) -> float:
    return max((each["tokens_per_second"] for each in record.results(name)), default=0.0)


def shown(command: list[str], work: Path | None = None) -> str:
    """The command as a user would type it, with WORK instead of the temporary folder."""
    text = shlex.join(["python", *command[1:]]).replace(f"{REPOSITORY}/", "")
    return text.replace(str(work), "WORK") if work else text
