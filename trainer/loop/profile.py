"""Profiles a range of steps. Stores a trace in the run's folder, and logs the operations that take the most time."""

import gzip
import logging
import tempfile
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from core import storage
from core.errors import LauncherError
from core.run.folder import RunFolder
from trainer.distributed.process_group import Ranks

log = logging.getLogger("train")

DEAREST = 10
NAME_WIDTH = 70


class StepProfiler:
    """Rank 0 profiles steps `first` to `last` under torch.profiler; the instances of the other ranks do nothing.

    A profiled step is slower, and its numbers are the same. `steps` is (first, last), or empty.
    """

    def __init__(self, steps: tuple[int, ...], run_url: str, segment: int, ranks: Ranks):
        self._steps = steps if ranks.is_main else ()
        self._url = RunFolder(run_url).profile(segment, *steps) if steps else ""
        self._on_gpu = ranks.device.type == "cuda"
        self._profile: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Begin if `step` is the first step of the range, or if the segment resumed within the range."""
        if self._profile is None and self._steps and self._steps[0] <= step <= self._steps[1]:
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_gpu else [])
            self._synchronize()
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()

    def ends_with(self, step: int) -> bool:
        return self._profile is not None and step == self._steps[1]

    def finish(self, step: int) -> None:
        """End after `step`, store the trace, and log a table. If the store fails, only the trace is lost."""
        assert self._profile is not None
        self._synchronize()
        profile, self._profile, self._steps = self._profile, None, ()
        profile.stop()
        try:
            storage.write_bytes(self._url, _trace(profile))
            log.info("step %d: the profile is stored at %s", step, self._url)
        except LauncherError as error:
            log.warning("step %d: the profile was not stored: %s", step, error)
        log.info("%s", table(profile, self._on_gpu))

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def table(profile: torch.profiler.profile, on_gpu: bool) -> str:
    """The operations with the most time, not counting the operations that they call."""

    def milliseconds(each) -> float:
        return (each.self_device_time_total if on_gpu else each.self_cpu_time_total) / 1e3

    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    averages = [each for each in profile.key_averages() if each.device_type == kind]
    total = sum(map(milliseconds, averages)) or 1.0
    where = "GPU" if on_gpu else "CPU"
    lines = [f"the {DEAREST} operations with the most {where} time, of {total:.1f} ms in all:"]
    for each in sorted(averages, key=milliseconds, reverse=True)[:DEAREST]:
        mine = milliseconds(each)
        lines.append(f"{mine:10.1f} ms {100 * mine / total:5.1f} % {each.count:7} x {each.key[:NAME_WIDTH]}")
    return "\n".join(lines)


def _trace(profile: torch.profiler.profile) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return gzip.compress(path.read_bytes())
