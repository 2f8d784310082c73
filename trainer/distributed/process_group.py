"""Joins the ranks of one job, and provides the small exchanges between them.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK in the environment. If they are not set, this process is the only rank.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from core import pulse
from core import stop as stop_requests
from core.errors import ConfigError, LauncherError, one_line
from core.figures import counted

T = TypeVar("T")

# All ranks call a function of this kind together before each round of batches. To end a measurement, the function
# raises Abandoned on all ranks.
StopCheck = Callable[[], None]

# Torch 2.13 renamed all_gather_into_tensor; the code also runs on 2.11.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# The time that a rank waits for the others. It is longer than the retries of the storage and a slow upload together.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
ASK_SECONDS = 5.0
# Seconds that the other failed ranks wait while one rank reports the error, because torchrun ends all ranks once one
# has ended.
SAYING_SECONDS = 1.0


@dataclass(frozen=True)
class Ranks:
    """The place of this process in the job.

    `store` is the job's key-value store, which needs no collective. `control` is a process group over the CPU, so that
    small exchanges do not wait for the GPU's queue.
    """

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


def start(device: str, setting: str = "train.device") -> Ranks:
    """Join the job. `setting` is the name of the setting that holds `device`.

    Raises ConfigError if the device is not available or the ranks do not meet. All ranks of a node fail for the
    same reason. So that the reason is printed once, one of them raises ConfigError and the others raise PeerFailed.
    """
    is_alone = "RANK" not in os.environ
    local_rank = 0 if is_alone else int(os.environ["LOCAL_RANK"])
    local_world = 1 if is_alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise _said_by_one(
            local_rank == 0,
            f"{setting} is cuda, but torch sees no GPU; check nvidia-smi and the driver, or set {setting}=cpu",
        )
    if cuda and local_rank >= torch.cuda.device_count():
        raise _said_by_one(
            local_rank == torch.cuda.device_count(),
            f"{counted(local_world, 'rank')} on this node, but torch sees {counted(torch.cuda.device_count(), 'GPU')}; "
            f"start torchrun with --nproc-per-node={torch.cuda.device_count()}",
        )
    chosen = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(chosen)
    try:
        if is_alone:  # a HashStore needs no port, which another program could already use
            store, rank, world = dist.HashStore(), 0, 1
        else:
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
    except RuntimeError as error:  # errors of the store, gloo or NCCL
        world = os.environ.get("WORLD_SIZE", "1")
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise _said_by_one(
            local_rank == 0,
            f"the {world} ranks could not meet at {place} ({one_line(error, 300)}); see that all of them run and that "
            "no firewall is between their machines, then start again",
        ) from error
    return Ranks(rank, world, local_rank, local_world, chosen, store, control)


def _said_by_one(is_speaker: bool, message: str) -> Exception:
    """The error to raise before the ranks have met: ConfigError on the rank that speaks, PeerFailed on the others.

    Before the ranks have met, they cannot agree on the rank that reports the error.
    """
    if is_speaker:
        return ConfigError(message)
    time.sleep(SAYING_SECONDS)
    return PeerFailed()


def stop() -> None:
    """Leave the job, if this process has joined it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def meet(ranks: Ranks, name: str, seconds: float = 30.0) -> None:
    """Wait up to `seconds` until all ranks have called `meet` with this name.

    Uses no collective, because a rank that has failed elsewhere would never join it.
    """
    with contextlib.suppress(dist.DistError):  # raised if the time is over or torchrun has ended the key-value store
        ranks.store.set(f"{name}/{ranks.rank}", "here")
        ranks.store.wait([f"{name}/{rank}" for rank in range(ranks.world)], timedelta(seconds=seconds))


def say_left(ranks: Ranks) -> None:
    """If this rank was asked to stop, announce that it leaves.

    Without this announcement, the other ranks would only see a lost connection.
    """
    if stop_requests.is_certain():
        with contextlib.suppress(dist.DistError):
            ranks.store.set("has left", str(ranks.rank))


def has_left(ranks: Ranks) -> bool:
    """Whether a rank has called `say_left`. False if the machine that holds the store does not answer."""
    found: list[bool] = []

    def ask() -> None:
        with contextlib.suppress(dist.DistError):
            found.append(ranks.store.check(["has left"]))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ASK_SECONDS)
    return found == [True]


def is_first_to_say(message: str, ranks: Ranks) -> bool:
    """Whether this rank is the first to report `message`. All ranks find a wrong setting, and one report is enough."""
    try:
        key = hashlib.sha256(message.encode(errors="replace")).hexdigest()
        return ranks.store.add(f"said/{key}", 1) == 1
    except dist.DistError:  # the key-value store has ended with another rank
        return True


class PeerFailed(Exception):
    """Another rank has failed and reports the error. This rank ends without a report."""


class Abandoned(Exception):
    """A request to stop has ended a measurement or a wait for data."""


def on_main(call: Callable[[], T], ranks: Ranks) -> T:
    """Run `call` on rank 0 and return its (picklable) result on all ranks.

    If `call` raises LauncherError, rank 0 raises it, and the other ranks raise PeerFailed.
    """
    result, error = None, None
    if ranks.is_main:
        try:
            result = call()
        except LauncherError as failure:
            error = failure
    box = [(result, error is not None)]
    if ranks.world > 1:
        dist.broadcast_object_list(box, src=0, group=ranks.control)
    pulse.beat()
    if error is not None:
        raise error
    if box[0][1]:
        raise PeerFailed
    return box[0][0]


def on_all(call: Callable[[], T], ranks: Ranks) -> T:
    """Run `call` on every rank.

    If `call` fails, the first failed rank raises its LauncherError, and the other ranks raise PeerFailed.
    """
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
    """The `value` of every rank, in rank order, on all ranks. The values must be small, trusted and picklable."""
    box: list[Any] = [value] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(box, value, group=ranks.control)
    pulse.beat()
    return box


def divide_over_ranks(
    count: int, measure: Callable[[int], Sequence[float]], ranks: Ranks, check_stop: StopCheck | None = None
) -> list[list[float]]:
    """The list [measure(0), ..., measure(count - 1)] on all ranks. The ranks compute its items in turn.

    The results and their order do not depend on the number of ranks.
    """
    mine = []
    for first in range(0, count, ranks.world):
        if check_stop:
            check_stop()
        if first + ranks.rank < count:
            mine.append(list(measure(first + ranks.rank)))
        pulse.beat()
    everyone = gather_objects(mine, ranks)
    return [everyone[index % ranks.world][index // ranks.world] for index in range(count)]


def gather_numbers(values: Sequence[float] | torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """`values` (K numbers) of every rank as a float64 CPU tensor of shape (world, K)."""
    mine = torch.as_tensor(values, dtype=torch.float64, device="cpu").reshape(1, -1)
    everyone = mine
    if ranks.world > 1:
        everyone = torch.empty(ranks.world, mine.shape[1], dtype=torch.float64)
        all_gather(everyone, mine, group=ranks.control)
    pulse.beat()
    return everyone


def gather_on_device(values: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """`values` (K,) of every rank as a tensor of shape (world, K) on the device. The host does not wait for the GPU."""
    if ranks.world == 1:
        return values[None]
    everyone = values.new_empty(ranks.world, len(values))
    all_gather(everyone, values[None])
    return everyone
