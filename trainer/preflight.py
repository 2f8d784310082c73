"""Do all GPUs of this node reach each other, and how fast? Run by launch/preflight.py before each segment.

    torchrun --nproc-per-node=8 -m trainer.preflight cuda ANSWER.json

Rank 0 writes figures: `all_reduce_gb_per_s`, the bus bandwidth as nccl-tests defines it (bytes x 2(n-1)/n / time),
the median of a few rounds, and `peer_pairs`, the share of GPU pairs with direct access. Fails if a sum is wrong.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

ELEMENTS = {"cuda": 64 << 20, "cpu": 1 << 18}  # float32: 256 MB shows the bandwidth of a link, 1 MB suffices elsewhere
ROUNDS = 5


def main(kind: str, answer: Path) -> None:
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
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
        raise SystemExit(f"rank {rank}: the all-reduced sum is wrong; GPU {local} or a link of it is faulty")
    if rank == 0:
        figures = {"peer_pairs": peer_share(world)} if kind == "cuda" else {}
        if world > 1:
            moved = numbers.numel() * 4 * 2 * (world - 1) / world
            figures["all_reduce_gb_per_s"] = moved / statistics.median(times) / 1e9
        answer.write_text(json.dumps(figures))
    dist.destroy_process_group()


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peer_share(count: int) -> float | None:
    """Share of ordered GPU pairs that can read each other's memory; None for a single GPU."""
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    return statistics.mean(torch.cuda.can_device_access_peer(a, b) for a, b in pairs) if pairs else None


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
