"""The three parts of bench.on_gpu: which measurements each makes, in the order of their worth, and as which commands.

Later measurements of a part look at what its earlier ones came to, so that a part is a generator.
"""

import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu import children
from bench.gpu.presets import OTHER, PLAIN, path, small_flags
from bench.gpu.records import Record

MICRO_BATCHES = (64, 32, 96)  # sequences, in this order; whole logits of more would not fit 141 GB
# Heads as wide as the preset's, few of them: a checkpoint has to be stored every few steps.
NARROW = {PLAIN: ["--model.heads=4"], OTHER: ["--model.heads=2"]}


@dataclass(frozen=True)
class Skip:
    """Instead of a command: why there is none."""

    why: str


@dataclass(frozen=True)
class Place:
    """Where things are: the token set, a folder for runs that goes in the end, one for traces that stays."""

    data: str
    work: Path
    out: Path
    rivals: Path | None
    rehearse: bool


# A command, what follows from earlier results, or why there is neither.
Measurement = tuple[str, list[str] | dict[str, Any] | Skip]
Part = Callable[[Place, Record], Iterator[Measurement]]


def look(place: Place, record: Record) -> Iterator[Measurement]:
    """What is there, and the first steps of both presets: graphs, breaks, compilations, kernels."""
    yield "versions", _module("bench.gpu.versions")
    for preset in (PLAIN, OTHER):
        trace = [f"--trace={place.out / f'{record.path.stem}-{preset}-trace.json.gz'}"]
        yield f"steps-{preset}", _steps(place, f"look-{preset}", preset, 30, ["--profile", *trace])


def exact(place: Place, record: Record) -> Iterator[Measurement]:
    """Whether the same is computed: compiled and plain, killed and not; and what determinism costs."""
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
    """How fast a step is, at the best micro-batch, beside others; attention by kernel; what switches change."""
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
    yield "residual-bf16", Skip("no setting keeps the residual stream in bfloat16: it stays in float32")
    yield f"ours-{OTHER}", _side(place, "ours", best, preset=OTHER)


PARTS: Mapping[str, Part] = {"look": look, "exact": exact, "speed": speed}
MINUTES = {"look": 3.0, "exact": 4.0, "speed": 5.0}


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _trainer_flags(place: Place, preset: str, sequences: int, accumulation: int, context: int) -> list[str]:
    """Settings of a short run without evaluations in between, samples and questions, which need a tokenizer."""
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
    """Two micro-batches a step, so that what happens between them is in it."""
    sequences, context, steps = (2, 32, 10) if place.rehearse else (32, 1024, steps)
    trainer = [*_trainer_flags(place, preset, sequences, 2, context), f"--run.url={place.work / run}", *flags]
    return _module("bench.gpu.steps", f"--steps={steps}", *options, "--", *trainer)


def _resume(place: Place, preset: str) -> list[str]:
    """Sixteen micro-batches a step on a GPU: steps must last long enough to be killed between two checkpoints."""
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


def _median_step(record: Record, name: str) -> float | None:
    found = [each["step_seconds"]["median"] for each in record.results(name) if each.get("kind") == "steps"]
    return statistics.median(found) if found else None


def _optimizes_ddp(record: Record, name: str) -> bool:
    """Whether torch split graphs there, so that the other way is measured as well."""
    return any(each["optimize_ddp"] == "True" for each in record.results(name))


def _tokens_per_second(record: Record, name: str) -> float:
    return max((each["tokens_per_second"] for each in record.results(name)), default=0.0)


def shown(command: list[str], work: Path | None = None) -> str:
    """The command as a person would type it, with WORK for the folder that goes in the end."""
    text = shlex.join(["python", *command[1:]]).replace(f"{children.REPOSITORY}/", "")
    return text.replace(str(work), "WORK") if work else text
