"""The ranks of one training job: who we are, which device, and small exchanges between us.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK in the environment) or plainly, as one rank.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from core import stop as stop_requests
from core.errors import ConfigError, LauncherError

T = TypeVar("T")

# Its name since torch 2.13; the code also runs on 2.11.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# A rank may wait this long for the others: longer than storage's patience plus a slow upload.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
ASK_SECONDS = 5.0


@dataclass(frozen=True)
class Ranks:
    """This process among the others. `store` is the job's key-value store, for use outside of collectives;
    `control` is a group over the CPU, so that small exchanges do not wait for the GPU's queue."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    store: dist.Store
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(device: str) -> Ranks:
    """Join the job. Raises ConfigError for a device that is not there."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but torch sees no GPU; check nvidia-smi and the driver, or set cpu")
    if cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{local_world} ranks on this node, but torch sees {torch.cuda.device_count()} GPUs; "
            f"start torchrun with --nproc-per-node={torch.cuda.device_count()}"
        )
    chosen = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(chosen)
    store, rank, world = next(iter(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT)))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("process-group", store),
        rank=rank,
        world_size=world,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=chosen if cuda else None,
    )
    control = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if cuda else dist.group.WORLD
    return Ranks(rank, world, local_rank, local_world, chosen, store, control)


def stop() -> None:
    """Leave the job; harmless if it was never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def meet(ranks: Ranks, name: str, seconds: float = 30.0) -> None:
    """Wait until all ranks have come to the place of this name, at most so long; without a collective, which a rank
    that is busy elsewhere would never join."""
    with contextlib.suppress(dist.DistError):  # the time is over, or the store went with torchrun
        ranks.store.set(f"{name}/{ranks.rank}", "here")
        ranks.store.wait([f"{name}/{rank}" for rank in range(ranks.world)], timedelta(seconds=seconds))


def say_left(ranks: Ranks) -> None:
    """Tell the other ranks that this one was asked to stop and leaves: what they see of it is a lost connection."""
    if stop_requests.is_certain():
        with contextlib.suppress(dist.DistError):
            ranks.store.set("has left", str(ranks.rank))


def has_left(ranks: Ranks) -> bool:
    """Whether a rank has said so. The machine that holds the store may be gone as well."""
    found: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(dist.DistError):
            found.append(ranks.store.check(["has left"]))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ASK_SECONDS)
    return found == [True]


class PeerFailed(Exception):
    """Another rank failed and says why itself; this one only leaves."""


def on_main(call: Callable[[], T], ranks: Ranks) -> T:
    """Run `call` on rank 0 alone and return its (picklable) result on all ranks; its error ends all of them."""
    result, error = None, None
    if ranks.is_main:
        try:
            result = call()
        except LauncherError as failure:
            error = failure
    box = [(result, error is not None)]
    if ranks.world > 1:
        dist.broadcast_object_list(box, src=0, group=ranks.control)
    if error is not None:
        raise error
    if box[0][1]:
        raise PeerFailed
    return box[0][0]


def on_all(call: Callable[[], T], ranks: Ranks) -> T:
    """Run `call` on every rank; if it fails anywhere, the first rank where it does says so and all of them end."""
    result, error = None, None
    try:
        result = call()
    except LauncherError as failure:
        error = failure
    failed = gather_objects(error is not None, ranks)
    if not any(failed):
        return result
    if error is not None and failed.index(True) == ranks.rank:
        raise error
    raise PeerFailed


def gather_objects(value: Any, ranks: Ranks) -> list[Any]:
    """The `value` of every rank, in rank order, on all ranks. Only for small, trusted, picklable values."""
    box: list[Any] = [value] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(box, value, group=ranks.control)
    return box


def gather_numbers(values: Sequence[float] | torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """`values` (K numbers) of every rank as a float64 CPU tensor of shape (world, K)."""
    mine = torch.as_tensor(values, dtype=torch.float64, device="cpu").reshape(1, -1)
    if ranks.world == 1:
        return mine
    everyone = torch.empty(ranks.world, mine.shape[1], dtype=torch.float64)
    all_gather(everyone, mine, group=ranks.control)
    return everyone


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
