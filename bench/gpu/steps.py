"""Times steps of the trainer, reports compilations and profiles the last steps; a measurement of bench.on_gpu.

    python -m bench.gpu.steps --steps=30 [--profile] [--trace=FILE] [--without=late-reads] -- CONFIG.yaml --data.url=...

Arguments after `--` go to trainer.train, which runs in this process; only its step functions are wrapped. On a GPU,
torch counts how often an operation makes the host wait while a step is launched.
"""

import argparse
import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.gpu import clock, profiling, toggles
from core.errors import LauncherError
from core.figures import quantity
from core.gpus import peak_flops
from core.settings.memory import estimate
from core.settings.model import flops_per_token
from trainer import train
from trainer.loop.loop import Loop

SETTLED = 2  # steps after which no compilation is expected
PROFILED = 3  # number of last steps that --profile observes


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--profile", action="store_true", help="run the last steps under torch.profiler")
    parser.add_argument("--trace", type=Path, help="file for the profiler's trace; a large trace is not kept")
    parser.add_argument(
        "--without", default="", help=f"optimizations to switch off for this measurement: {', '.join(toggles.TOGGLES)}"
    )
    options = parser.parse_args(arguments[:split])
    toggles.undo(options.without)
    watch = Watch(options.steps, options.profile)
    watch.install()
    flags = [*arguments[split + 1 :], f"--train.steps={options.steps}"]
    try:
        code = train.main(flags)
    except LauncherError as error:
        sys.exit(f"error: {error}")
    if code:
        sys.exit(f"the trainer ended with {code}")
    watch.say(options.trace)


class Watch:
    """Measures the time from the beginning of a step to the beginning of the next step.

    This time includes all work between the two steps.
    """

    def __init__(self, steps: int, profile: bool):
        self._steps = steps
        self._first_profiled = steps - PROFILED + 1 if profile else steps + 1
        self._marks: list = []
        self._profile: Any = None
        self._settled = 0
        self._loop: Any = None
        self._peak_bytes: int | None = None
        self._profiling = contextlib.ExitStack()
        self._waits = 0

    def install(self) -> None:
        original, launch = Loop._step, Loop._launch

        def launching(loop: Loop, number: int, *arguments: Any) -> Any:
            if loop.ranks.device.type != "cuda" or number <= SETTLED:
                return launch(loop, number, *arguments)
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                done = launch(loop, number, *arguments)
                torch.cuda.set_sync_debug_mode("default")
            self._waits += sum("synchronizing CUDA operation" in str(each.message) for each in found)
            return done

        Loop._launch = launching

        def step(loop: Loop, number: int, *arguments: Any) -> None:
            self._before(loop, number)
            original(loop, number, *arguments)
            self._after(loop, number)

        Loop._step = step

    def _before(self, loop: Loop, number: int) -> None:
        device = loop.ranks.device
        if number == 1:
            self._loop = loop
            if device.type != "cuda":
                profiling.compile_blocks(loop.model, device)
        if number == self._first_profiled:
            clock.finish(device)
            self._profile = self._profiling.enter_context(profiling.profiled(device))
        if number <= self._first_profiled:
            self._marks.append(clock.mark(device))

    def _after(self, loop: Loop, number: int) -> None:
        device = loop.ranks.device
        if number == SETTLED:
            self._settled = profiling.compilation_count()
        if number == self._steps:
            if number < self._first_profiled:
                self._marks.append(clock.mark(device))
            clock.finish(device)
            self._profiling.close()
            # Read the peak here, because the evaluation at the end of the run may need more memory.
            self._peak_bytes = torch.cuda.max_memory_allocated() if device.type == "cuda" else None

    def say(self, trace: Path | None) -> None:
        device, settings = self._loop.ranks.device, self._loop.settings
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        seconds = [clock.seconds_between(*pair) for pair in pairs]
        measured = clock.summary(seconds[SETTLED + 1 :] or seconds)
        tokens = settings.batch.tokens_per_step / measured["median"]
        peak = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
        mfu = tokens * flops_per_token(settings.model) / peak if peak else None
        text = f"{1e3 * measured['median']:.1f} ms per step of {settings.batch.tokens_per_step} tokens"
        text += f": {quantity(tokens)} tokens/s"
        text += f", MFU {100 * mfu:.1f} %" if mfu else ""
        text += f", {self._peak_bytes / 1e9:.1f} GB" if self._peak_bytes else ""
        text += f", {self._waits} waits of the host within steps" if device.type == "cuda" else ""
        harness.say(
            text,
            kind="steps",
            device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            step_seconds=measured,
            first_steps_seconds=seconds[: SETTLED + 1],
            tokens_per_step=settings.batch.tokens_per_step,
            micro_batch_size=settings.batch.micro_batch_size,
            tokens_per_second=tokens,
            mfu=mfu,
            peak_bytes=self._peak_bytes,
            estimated_bytes=_estimate(settings),
            loss=self._loop.last_loss,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            waits_within_steps=self._waits if device.type == "cuda" else None,
        )
        compilations = profiling.compilations(self._settled)
        harness.say(profiling.describe_compilations(compilations), kind="compiled", **compilations)
        if self._profile is not None:
            found = profiling.kernels(self._profile, device)
            kept = {"trace": profiling.keep_trace(self._profile, trace)} if trace else {}
            harness.say(profiling.describe_kernels(found), kind="profile", steps=PROFILED, **found, **kept)


def _estimate(settings: Any) -> float | None:
    """Memory in bytes that the check before a launch estimates, for comparison with the peak."""
    try:
        return float(estimate(settings, settings.model, settings.batch.micro_batch_size, 1))
    except (TypeError, AttributeError):  # the estimate does not know the settings of this stage
        return None


if __name__ == "__main__":
    main()
