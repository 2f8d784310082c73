"""Observes a training process: the graphs that torch.compile makes, and the kernels that take the time.

profiling.compilations()                            graphs, graph breaks, and frames that were compiled again
with profiling.profiled(device) as profile: ...
profiling.kernels(profile, device)                  the slowest kernels, time by kind, and the device's idle time
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import utils
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

COUNTERS = ("stats", "aot_autograd", "inductor", "graph_break", "ddp")
TOP = 12
LARGEST_TRACE_BYTES = 8 << 20
# A kernel is of the first kind whose pattern matches its name. On a CPU, the names are those of operators.
KINDS = {
    "attention": r"flash|fmha|attention|cudnn.*sdp|sdpa|flex",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|::(add|b|ba)?mm\b|addmm|linear|matmul|sm\d\d_|triton_tem.*mm",
    "optimizer": r"adam|multi_tensor|foreach|lerp",
    "fused by the compiler": r"triton_",
    "copies": r"memcpy|memset|copy_|::to\b",
}


def profiled(device: torch.device) -> torch.profiler.profile:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    return torch.profiler.profile(activities=activities)


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.I)), "other")


def kernels(profile: torch.profiler.profile, device: torch.device) -> dict[str, Any]:
    """Milliseconds by kernel and by kind of kernel.

    On a GPU, the result also holds the device's idle time between the first and the last kernel.
    """
    spans = [(each.name, each.time_range.start, each.time_range.end) for each in _kernels(profile, device)]
    by_name: dict[str, list[float]] = {}  # milliseconds of each call; on a CPU, one number with the sum of all calls
    calls: dict[str, int] = {}
    if device.type == "cuda":
        for name, begin, end in spans:
            by_name.setdefault(name, []).append((end - begin) / 1e3)
    else:
        for each in profile.key_averages():
            by_name[each.key], calls[each.key] = [each.self_cpu_time_total / 1e3], each.count
    by_kind: dict[str, float] = {}
    for name, times in by_name.items():
        by_kind[kind_of(name)] = by_kind.get(kind_of(name), 0.0) + sum(times)
    largest = sorted(by_name, key=lambda name: -sum(by_name[name]))[:TOP]
    top = [
        {"name": name[:160], "ms": sum(by_name[name]), "calls": calls.get(name, len(by_name[name]))} for name in largest
    ]
    found: dict[str, Any] = {"top": top, "ms_by_kind": by_kind}
    if device.type == "cuda" and spans:
        whole = max(end for _, _, end in spans) - min(begin for _, begin, _ in spans)
        found |= {"span_ms": whole / 1e3, "idle_ms": (whole - _covered([span[1:] for span in spans])) / 1e3}
    return found


def describe_kernels(found: dict[str, Any]) -> str:
    total = sum(found["ms_by_kind"].values()) or 1.0
    shares = sorted(found["ms_by_kind"].items(), key=lambda each: -each[1])
    lines = [", ".join(f"{kind} {100 * ms / total:.0f} %" for kind, ms in shares)]
    if "span_ms" in found:
        share = 100 * found["idle_ms"] / found["span_ms"]
        lines.append(f"the GPU ran nothing for {found['idle_ms']:.1f} of {found['span_ms']:.1f} ms ({share:.1f} %)")
    return "\n".join(lines + [f"{each['ms']:9.2f} ms {each['calls']:6} x {each['name'][:90]}" for each in found["top"]])


def keep_trace(profile: torch.profiler.profile, path: Path) -> str:
    """Write the profiler's trace, unless it is too large.

    Returns the name of the file, or the reason why there is none.
    """
    profile.export_chrome_trace(str(path))
    size = path.stat().st_size
    if size <= LARGEST_TRACE_BYTES:
        return path.name
    path.unlink()
    return f"not kept: {size / 1e6:.0f} MB, more than {LARGEST_TRACE_BYTES >> 20} MB"


def _kernels(profile: torch.profiler.profile, device: torch.device) -> list:
    if device.type != "cuda":
        return []
    events = profile.events()
    # The GPU's timeline also holds ranges that the program has marked. These ranges are left out. Their names also
    # occur on the CPU, and the names of kernels do not.
    marked = {each.name for each in events if each.device_type == DeviceType.CPU}
    return [each for each in events if each.device_type == DeviceType.CUDA and each.name not in marked]


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of (begin, end) spans."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


# --- compilation -----------------------------------------------------------------------------------------------


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """Compile as the trainer does on a GPU. On a CPU, the same graphs are traced, but run without a compiler."""
    if device.type == "cuda":
        model.compile_blocks()
        return
    for block in model.h:
        block.compile(backend="aot_eager", fullgraph=True)


def compilation_count() -> int:
    """Number of frames compiled so far."""
    return len(_metrics())


def compilations(since: int = 0) -> dict[str, Any]:
    """Graphs and graph breaks of this process.

    `again` lists compilations of frames that had been compiled before, `late` the compilations after the first `since`.
    """
    found = _metrics()
    compiled = [(_name(each), each.recompile_reason) for each in found]
    again = [{"frame": name, "why": why} for name, why in compiled if why]
    counters = {kind: dict(values) for kind, values in utils.counters.items() if kind in COUNTERS and values}
    return {
        "compilations": len(found),
        "again": again,
        "late": [name for name, _ in compiled[since:]],
        "graph_breaks": sum(utils.counters["graph_break"].values()),
        "graphs": utils.counters["aot_autograd"].get("total", 0),
        "counters": counters,
        "optimize_ddp": str(dynamo_config.optimize_ddp),
    }


def describe_compilations(found: dict[str, Any]) -> str:
    text = (
        f"{found['compilations']} compilations, {len(found['again'])} of them again, {len(found['late'])} after the "
        f"second step; {found['graphs']} graphs, {found['graph_breaks']} graph breaks, optimize_ddp "
        f"{found['optimize_ddp']}"
    )
    return "\n".join([text, *(f"again: {each['frame']}: {' '.join(each['why'].split())}" for each in found["again"])])


def _name(metrics) -> str:
    place = f"{Path(metrics.co_filename or '?').name}:{metrics.co_firstlineno}"
    return f"{metrics.co_name} ({place}) {metrics.compile_id}"


def _metrics() -> list:
    """Metrics of forward passes; torch counts each backward pass as a further compilation of the same frame."""
    return [
        each
        for each in utils.get_compilation_metrics()
        if each.co_name and getattr(each, "is_forward", None) is not False
    ]
