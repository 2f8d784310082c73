"""Tests the GPUs of a node before each segment: CUDA, the links between the GPUs, and their bandwidth.

    torchrun --nproc-per-node=8 -m trainer.distributed.preflight cuda ANSWER.json    (by launch/node/preflight.py)

Rank 0 writes these fields to ANSWER.json:

    libcuda:               the driver library in use,
    all_reduce_gb_per_s:   the median bus bandwidth of some rounds, as in nccl-tests (bytes x 2(n-1)/n / time),
    peer_pairs:            the share of GPU pairs with direct access.

A rank on which CUDA does not initialise writes only `problem` and fails. A rank that computes a wrong sum fails too.
"""

from core import stop

if __name__ == "__main__":
    stop.follow_parent()  # called before the import of torch, which takes seconds

import ctypes
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

ELEMENTS = {
    "cuda": 64 << 20,
    "cpu": 1 << 18,
}  # count of float32 numbers to sum: 256 MB on a GPU, enough to measure the bandwidth of its links, and 1 MB on a CPU
ROUNDS = 5


def main(kind: str, answer: Path) -> None:
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda" and (problem := cuda_problem(device)):
        own = answer.with_suffix(f".{rank}")
        own.write_text(json.dumps({"problem": problem}))
        own.replace(answer)  # atomic, because several ranks may write it
        raise SystemExit(f"rank {rank}: {problem}")
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    world = dist.get_world_size()
    numbers = torch.full((ELEMENTS[kind],), float(rank + 1), device=device)
    times = []
    for number in range(ROUNDS + 1):
        numbers.fill_(float(rank + 1))
        wait_for(device)
        started = time.perf_counter()
        dist.all_reduce(numbers)
        wait_for(device)
        if number:  # the first round opens the connections
            times.append(time.perf_counter() - started)
    expected = world * (world + 1) / 2
    if not bool((numbers == expected).all()):
        raise SystemExit(f"rank {rank}: the all-reduced sum is wrong; GPU {local} or one of its links is faulty")
    if rank == 0:
        figures: dict = {"peer_pairs": peer_share(world), "libcuda": libcuda()} if kind == "cuda" else {}
        if world > 1:
            moved = numbers.numel() * 4 * 2 * (world - 1) / world
            figures["all_reduce_gb_per_s"] = moved / statistics.median(times) / 1e9
        answer.write_text(json.dumps(figures))
    dist.destroy_process_group()


def cuda_problem(device: torch.device) -> str | None:
    """Initialises CUDA and selects this GPU. Returns None, or the reason of a failure with the libcuda in use.

    A comparison of driver versions is not enough: with NVIDIA's forward-compatibility libcuda, an older driver works on
    some GPUs and fails with error 804 on others.
    """
    try:
        torch.cuda.init()
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError if it was built without CUDA
        reason = str(error).strip().splitlines()[0]
        return (
            f"CUDA does not initialise on GPU {device.index} with {libcuda()}: {reason}; "
            "take a machine with a newer driver (docs/launch.md, 'Drivers')"
        )
    return None


def libcuda() -> str:
    """This process's driver library and the newest CUDA that it supports: "/usr/lib/libcuda.so.580 (CUDA 13.0)"."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return f"no libcuda ({error})"
    version = ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    maps = Path("/proc/self/maps").read_text().splitlines()
    file = next(line.split(maxsplit=5)[5] for line in maps if "/libcuda.so" in line)
    return f"{file} (CUDA {version.value // 1000}.{version.value % 1000 // 10})"


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peer_share(count: int) -> float | None:
    """Share of the ordered pairs of GPUs in which the first can read the memory of the second.

    None for a single GPU.
    """
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    return statistics.mean(torch.cuda.can_device_access_peer(a, b) for a, b in pairs) if pairs else None


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
