"""Measures time by CUDA events on a GPU and by the host's clock elsewhere, and summarises it by medians."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def mark(device: torch.device):
    """Mark the current moment in the device's queue of work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin, end) -> float:
    """Seconds from one mark to another. The device must have passed both marks (see `finish`)."""
    return begin.elapsed_time(end) / 1e3 if hasattr(begin, "elapsed_time") else end - begin


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rounds(call: Callable[[], object], device: torch.device, count: int, calls: int, warm_up: int = 3) -> list[float]:
    """Seconds per call in each of `count` rounds of `calls` calls."""
    for _ in range(warm_up):
        call()
    found = []
    for _ in range(count):
        finish(device)
        begin = mark(device)
        for _ in range(calls):
            call()
        end = mark(device)
        finish(device)
        found.append(seconds_between(begin, end) / calls)
    return found


def summary(seconds: Sequence[float], of_rounds: int = 4) -> dict[str, float | list[float]]:
    """Divide consecutive times into rounds.

    Returns the median of each round, the median of these medians, and percentiles of all times.
    """
    size = max(1, len(seconds) // of_rounds)
    medians = [statistics.median(seconds[first : first + size]) for first in range(0, len(seconds), size)]
    ordered = sorted(seconds)
    spread = {f"p{share}": ordered[round((len(ordered) - 1) * share / 100)] for share in (10, 90)}
    return {"median": statistics.median(medians), "rounds": medians, **spread}


class Parts:
    """Splits time into named parts. `mark(part)` ends a part, which began at the previous mark."""

    def __init__(self, device: torch.device, parts: Sequence[str]):
        self._device = device
        self._parts = parts
        self._marks: list = []

    def mark(self, part: str | None) -> None:
        self._marks.append((part, mark(self._device)))

    def seconds(self) -> dict[str, float]:
        """Seconds of each part. The device must have passed all marks."""
        found = dict.fromkeys(self._parts, 0.0)
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:], strict=False):
            found[part] += seconds_between(begin, end)
        return found
