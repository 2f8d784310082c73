"""A few steps under torch.profiler: the kernels that take most, time by kind, and how long the device waits.

with kernels.profiled(device) as profile: ...
kernels.table(profile, device)
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

TOP = 12
LARGEST_TRACE_BYTES = 8 << 20
# First match counts; names of kernels on a GPU, of operators on a CPU.
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


def table(profile: torch.profiler.profile, device: torch.device) -> dict[str, Any]:
    """Milliseconds by kernel and by kind; on a GPU also how long it ran nothing between its first and last kernel."""
    spans = [(each.name, each.time_range.start, each.time_range.end) for each in _kernels(profile, device)]
    by_name: dict[str, list[float]] = {}  # milliseconds of each call; on a CPU of all of them together
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


def described(found: dict[str, Any]) -> str:
    total = sum(found["ms_by_kind"].values()) or 1.0
    shares = sorted(found["ms_by_kind"].items(), key=lambda each: -each[1])
    lines = [", ".join(f"{kind} {100 * ms / total:.0f} %" for kind, ms in shares)]
    if "span_ms" in found:
        share = 100 * found["idle_ms"] / found["span_ms"]
        lines.append(f"the GPU ran nothing for {found['idle_ms']:.1f} of {found['span_ms']:.1f} ms ({share:.1f} %)")
    return "\n".join(lines + [f"{each['ms']:9.2f} ms {each['calls']:6} x {each['name'][:90]}" for each in found["top"]])


def keep_trace(profile: torch.profiler.profile, path: Path) -> str:
    """Write the trace where it is small. Says what became of it."""
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
    # A range that the program has marked is shown on the GPU too, under its name on the CPU.
    marked = {each.name for each in events if each.device_type == DeviceType.CPU}
    return [each for each in events if each.device_type == DeviceType.CUDA and each.name not in marked]


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
