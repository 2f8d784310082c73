"""Saves checkpoints: copies a snapshot to host memory, then uploads it in the background while training goes on.

Each rank uploads its part of the state (its payload file) and reports the upload through the job's key-value store.
Rank 0 then writes the manifest and, last, the marker. There is one staging buffer, so only one checkpoint at a time is
in flight. While `busy` is true, the caller waits or saves later.
"""

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from core import pulse, stop, storage
from core.errors import CheckpointError, DiskFull, LauncherError, RunError
from core.run.folder import RunFolder
from core.run.ledger import Ledger, check_owner
from core.settings.training import CheckpointConfig
from trainer.checkpoint import layout
from trainer.checkpoint.blocks import StagedFile
from trainer.checkpoint.layout import CheckpointManifest, PayloadFile
from trainer.distributed.process_group import Ranks

log = logging.getLogger(__name__)

# Seconds that rank 0 waits for the uploads of the other ranks before it abandons a checkpoint.
PEER_SECONDS = 600.0
POLL_SECONDS = 0.05
AGAIN_SECONDS = 2.0
# Training ends once this many checkpoints in a row have failed because the disk was full.
FULL_AT_MOST = 3
# Seconds for which a rank other than rank 0 repeats its upload to a full disk. Rank 0 deletes old checkpoints
# meanwhile.
ROOM_SECONDS = 30.0


class Saver:
    """Saves the (key, tensor) pairs that `blocks()` returns on this rank, always with the same keys and shapes.

    `ledger` is None on all ranks but rank 0. `flush_log` stores the ledger and the metrics, and returns whether it
    succeeded. Once `is_hurried()` is true, there will be no later checkpoint. So a failed upload is repeated until it
    succeeds. `kept()` returns steps whose checkpoints are never removed.
    """

    def __init__(
        self,
        run_url: str,
        segment: int,
        ranks: Ranks,
        config: CheckpointConfig,
        ledger: Ledger | None,
        flush_log: Callable[[], bool],
        blocks: Callable[[], Iterable[tuple[str, torch.Tensor]]],
        first_step: int = 0,
        is_hurried: Callable[[], bool] = stop.is_hurried,
        kept: Callable[[], Collection[int]] = tuple,
    ):
        self.run_url = run_url
        self.segment = segment
        self.ranks = ranks
        self.config = config
        self.cadence = Cadence(config)
        self.ledger = ledger
        self._flush_log = flush_log
        self._blocks = blocks
        self._is_hurried = is_hurried
        self._kept_by_others = kept
        # A thread allocates the buffer, because the allocation takes a while. Only the first checkpoint waits for it.
        self._staging = ThreadPoolExecutor(1, "staging").submit(StagedFile, list(blocks()))
        self._thread: threading.Thread | None = None
        self.failure: LauncherError | None = None
        self.taken_over: RunError | None = None
        self.stuck: CheckpointError | None = None  # set on rank 0 after FULL_AT_MOST failures in a row
        self._full_in_a_row = 0
        self._failing_since = math.inf
        self._insist_until = -math.inf
        self.last_step = first_step  # step of the newest complete checkpoint; kept up to date on rank 0 only
        self.best_step: int | None = None  # the checkpoint of this step is kept, however old it is

    @property
    def staged(self) -> StagedFile:
        """The host buffer for the snapshot. Waits until it is allocated."""
        return self._staging.result()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Wait for the save in flight, take a snapshot and store it in the background. All ranks call this together."""
        self.wait()
        self.cadence.saved()
        started = time.monotonic()
        self.staged.fill(self._blocks())
        blocked = time.monotonic() - started
        if self.ledger:
            self.ledger.mark("checkpoint_begun", step=step)
        self._thread = threading.Thread(target=self._store, args=(step, state, blocked), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the save in flight is complete or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failing_seconds(self) -> float:
        """Seconds since checkpoints began to fail, or 0 if the newest checkpoint was completed."""
        return max(0.0, time.monotonic() - self._failing_since)

    def insist(self, step: int, state: dict[str, Any], seconds: float) -> None:
        """Store the last checkpoint of this segment, at `step`. Failed attempts are repeated for at most `seconds`.

        All ranks call this together. It returns once the checkpoint is stored or the time is over. On rank 0,
        `last_step` shows whether the checkpoint is stored.
        """
        self.wait()
        self._insist_until = time.monotonic() + seconds
        self.begin(step, state)
        self.wait()

    def has(self, step: int) -> bool:
        """Wait for the save in flight. Returns whether the checkpoint of `step` is complete; only rank 0 knows."""
        self.wait()
        return self.last_step == step

    def finish(self, step: int) -> None:
        """Wait for the save in flight. Rank 0 raises CheckpointError unless the checkpoint of `step` is complete."""
        self.wait()
        if self.ranks.is_main and self.last_step != step:
            raise CheckpointError(
                f"{layout.folder_of(self.run_url, step)}: could not be completed: "
                f"{self.taken_over or self.failure or 'a rank did not store its part'}"
            )

    def seconds(self) -> float:
        """Seconds that the last checkpoint took from snapshot to marker, or 0 before the first."""
        return self.cadence.seconds()

    def _store(self, step: int, state: dict[str, Any], blocked_seconds: float) -> None:
        began = time.monotonic()
        try:
            while not self._stored(step, state, blocked_seconds):
                pulse.beat()
                time.sleep(AGAIN_SECONDS)
        except RunError as error:
            self.taken_over = error
        except (LauncherError, dist.DistError) as error:
            # Training goes on: the previous checkpoint is still stored, and the next one may succeed.
            self.failure = CheckpointError(str(error))
            is_full = isinstance(error, DiskFull)
            if not is_full:
                self._failing_since = min(self._failing_since, began)
            self._count_full(is_full)
            log.warning("checkpoint of step %d was not completed: %s", step, error)
            with contextlib.suppress(dist.DistError):  # the key-value store has ended with torchrun
                self.ranks.store.set(
                    self._key(step, self.ranks.rank), json.dumps({"error": str(error), "full": is_full})
                )

    def _stored(self, step: int, state: dict[str, Any], blocked_seconds: float) -> bool:
        """Try once to store the checkpoint. Returns False if the attempt failed and should be repeated.

        Raises the error if the attempt should not be repeated.
        """
        started = time.monotonic()
        try:
            file = self._upload(step)
            self.ranks.store.set(self._key(step, self.ranks.rank), json.dumps(file.__dict__))
            if self.ranks.is_main:
                files = self._gather(step)
                check_owner(RunFolder(self.run_url), self.segment)
                if not self._flush_log():
                    raise CheckpointError(
                        "the metrics and the ledger of its steps must be stored first, but could not be stored"
                    )
                layout.write_marker(self.run_url, CheckpointManifest(step, self.segment, files, state))
                self.last_step = step
                self._full_in_a_row = 0
                self._failing_since = math.inf
                background = time.monotonic() - started
                self.cadence.measured(blocked_seconds, background)
                if self.ledger:
                    size = sum(file.bytes for file in files)
                    costs = {"blocked_seconds": blocked_seconds, "background_seconds": background}
                    self.ledger.mark("checkpoint", step=step, bytes=size, **costs)
                self._prune()
            return True
        except RunError:
            raise
        except LauncherError as error:
            if isinstance(error, DiskFull) and self.ranks.is_main and self._make_room(step):
                return False
            if not self._is_hurried() and time.monotonic() >= self._insist_until:
                raise
            log.warning("checkpoint of step %d could not be stored yet: %s", step, error)
            return False

    def _upload(self, step: int) -> PayloadFile:
        data = self.staged.data
        name = layout.payload_name(self.segment, self.ranks.rank, self.ranks.world)
        uri = storage.join(layout.folder_of(self.run_url, step), name)
        deadline = time.monotonic() + ROOM_SECONDS
        while True:
            try:
                storage.write_bytes(uri, data)
                return PayloadFile(name, len(data), layout.checksum(data))
            except DiskFull:
                if self.ranks.is_main or time.monotonic() > deadline:
                    raise
                self.ranks.store.set(f"{self._key(step, self.ranks.rank)}/full", "")
                time.sleep(AGAIN_SECONDS)

    def _gather(self, step: int) -> tuple[PayloadFile, ...]:
        """Wait for the report of every rank. Raises CheckpointError for a rank that failed or takes too long."""
        deadline = time.monotonic() + PEER_SECONDS
        files = []
        for rank in range(self.ranks.world):
            key = self._key(step, rank)
            made_room = False
            while not self.ranks.store.check([key]):
                if not made_room and self.ranks.store.check([f"{key}/full"]):
                    made_room = True
                    self._make_room(step)
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"rank {rank} did not store its part of step {step} within {PEER_SECONDS:.0f} s"
                    )
                time.sleep(POLL_SECONDS)
            report = json.loads(self.ranks.store.get(key))
            if "error" in report:
                kind = DiskFull if report.get("full") else CheckpointError
                raise kind(f"rank {rank}: {report['error']}")
            files.append(PayloadFile(**report))
        return tuple(files)

    def _key(self, step: int, rank: int) -> str:
        return f"checkpoint/{self.segment}/{step}/{rank}"

    def _make_room(self, step: int) -> bool:
        """On rank 0: delete older checkpoints to make room for the one of `step`.

        Keeps the newest complete checkpoint, the best checkpoint and the multiples of keep_every_steps. Returns whether
        a checkpoint was deleted.
        """
        check_owner(RunFolder(self.run_url), self.segment)
        found = layout.stored(self.run_url)
        unfinished = {old for old, names in found.items() if old < step and layout.MARKER not in names}
        gone = sorted({*layout.to_remove(found, 1, self.config.keep_every_steps, self._kept()), *unfinished})
        for old in gone:
            layout.remove(self.run_url, old, found[old])
        if gone:
            log.warning("the disk is full: removed the checkpoints of steps %s", ", ".join(map(str, gone)))
        return bool(gone)

    def _count_full(self, is_full: bool) -> None:
        self._full_in_a_row = self._full_in_a_row + 1 if is_full else 0
        if self._full_in_a_row >= FULL_AT_MOST and self.ranks.is_main:
            newest = f"the newest is step {self.last_step}" if self.last_step else "none is stored"
            self.stuck = CheckpointError(
                f"{self.run_url}: its disk is full, so that {self._full_in_a_row} checkpoints in a row were not "
                f"stored; {newest}. Free space there and start again with the same settings"
            )

    def _kept(self) -> set[int]:
        return {*self._kept_by_others(), *([] if self.best_step is None else [self.best_step])}

    def _prune(self) -> None:
        try:
            found = layout.stored(self.run_url)
            for step in layout.to_remove(found, self.config.keep_last, self.config.keep_every_steps, self._kept()):
                layout.remove(self.run_url, step, found[step])
        except LauncherError as error:
            log.warning("old checkpoints were not removed, which only costs storage: %s", error)


class Cadence:
    """Decides on rank 0 when to save: every `every_steps` steps, or at the interval that wastes the least time.

    This interval is sqrt(2 C M) if a save blocks training for C seconds, and failures come every M seconds on average
    (Young 1974; Daly 2006). `max_lost_seconds` limits the work that is lost if a machine disappears without notice. The
    lost work is the work since the last snapshot whose upload was complete.
    """

    def __init__(self, config: CheckpointConfig, now: float | None = None):
        self._config = config
        self._last = time.monotonic() if now is None else now
        self._blocked = 0.0
        self._background = 0.0

    def interval_seconds(self) -> float:
        """Seconds between two snapshots, computed from the costs measured so far."""
        young = math.sqrt(2 * self._blocked * self._config.expected_hours_between_failures * 3600)
        longest = self._config.max_lost_seconds - self._background
        # Uploads do not overlap. If an upload takes more than half of `max_lost_seconds`, the next save begins when the
        # upload ends.
        return max(self._background, min(young, longest)) if self._background else longest / 2

    def due(self, step: int, step_seconds: float, now: float | None = None) -> bool:
        """Whether to save after `step`.

        If `every_steps` is set, save at its multiples. Otherwise, save if the next step would end after the interval.
        """
        if self._config.every_steps:
            return step % self._config.every_steps == 0
        now = time.monotonic() if now is None else now
        return now + step_seconds - self._last >= self.interval_seconds()

    def saved(self, now: float | None = None) -> None:
        """Record that a snapshot was taken."""
        self._last = time.monotonic() if now is None else now

    def seconds(self) -> float:
        """Seconds that the last complete checkpoint took, blocking time included, or 0 before the first."""
        return self._blocked + self._background

    def measured(self, blocked_seconds: float, background_seconds: float) -> None:
        """Record the costs of a complete checkpoint."""
        self._blocked = blocked_seconds
        self._background = background_seconds
