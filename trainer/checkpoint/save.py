"""Write checkpoints: snapshot to host memory, then upload in the background while training goes on.

Every rank stores its own payload; rank 0 learns of each finished upload through the job's key-value store, then
writes the manifest and, last, the marker. One checkpoint is in flight at a time: the staging buffer is the bound
on memory, and `busy` tells the caller to wait or to save later.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist

from core import stop, storage
from core.errors import CheckpointError, LauncherError, RunError
from core.run.folder import RunFolder
from core.run.ledger import Ledger, check_owner
from core.settings.training import CheckpointConfig
from trainer.checkpoint import layout
from trainer.checkpoint.blocks import StagedFile
from trainer.checkpoint.interval import Cadence
from trainer.checkpoint.layout import CheckpointManifest, PayloadFile
from trainer.distributed.process_group import Ranks

log = logging.getLogger(__name__)

# Uploads of other ranks are given up after this; the next checkpoint is a new chance.
PEER_SECONDS = 600.0
POLL_SECONDS = 0.05
AGAIN_SECONDS = 2.0


class Saver:
    """Saves what `blocks()` yields: (key, tensor) pairs of this rank, the same keys and shapes each time.

    `ledger` is rank 0's and None elsewhere. `flush_books` stores what the books hold and says whether it could. Once
    `is_hurried()` there will be no next checkpoint, so one that the store refuses is tried again until it is stored.
    """

    def __init__(
        self,
        run_url: str,
        segment: int,
        ranks: Ranks,
        config: CheckpointConfig,
        ledger: Ledger | None,
        flush_books: Callable[[], bool],
        blocks: Callable[[], Iterable[tuple[str, torch.Tensor]]],
        first_step: int = 0,
        is_hurried: Callable[[], bool] = stop.is_hurried,
    ):
        self.run_url = run_url
        self.segment = segment
        self.ranks = ranks
        self.config = config
        self.cadence = Cadence(config)
        self.ledger = ledger
        self._flush_books = flush_books
        self._blocks = blocks
        self._is_hurried = is_hurried
        # Touching its memory takes a while, and nobody needs it before the first checkpoint.
        self._staging = ThreadPoolExecutor(1, "staging").submit(StagedFile, list(blocks()))
        self._thread: threading.Thread | None = None
        self.failure: LauncherError | None = None
        self.taken_over: RunError | None = None
        self.last_step = first_step  # of the newest complete checkpoint, as far as rank 0 knows

    @property
    def staged(self) -> StagedFile:
        """The buffer that snapshots go to."""
        return self._staging.result()

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Snapshot now (waits for a save in flight), store in the background. All ranks call it at the same step."""
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
        """Until the save in flight is complete or given up."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def has(self, step: int) -> bool:
        """Whether the checkpoint of `step` is complete (on rank 0, who knows), after the save in flight."""
        self.wait()
        return self.last_step == step

    def finish(self, step: int) -> None:
        """Wait, and raise CheckpointError unless the checkpoint of `step` is complete (on rank 0, who knows)."""
        self.wait()
        if self.ranks.is_main and self.last_step != step:
            raise CheckpointError(
                f"{layout.folder_of(self.run_url, step)}: could not be completed: "
                f"{self.taken_over or self.failure or 'a rank did not store its part'}"
            )

    def seconds(self) -> float:
        """What the last checkpoint took, start to marker; 0 before the first."""
        return self.cadence.seconds()

    def _store(self, step: int, state: dict[str, Any], blocked_seconds: float) -> None:
        try:
            while not self._stored(step, state, blocked_seconds):
                time.sleep(AGAIN_SECONDS)
        except RunError as error:
            self.taken_over = error
        except (LauncherError, dist.DistError) as error:
            # The run goes on: the checkpoint before is still there, and the next one may succeed.
            self.failure = CheckpointError(str(error))
            log.warning("checkpoint of step %d was not completed: %s", step, error)
            with contextlib.suppress(dist.DistError):  # the store went with torchrun
                self.ranks.store.set(self._key(step, self.ranks.rank), json.dumps({"error": str(error)}))

    def _stored(self, step: int, state: dict[str, Any], blocked_seconds: float) -> bool:
        """One attempt. False if another one is worth it, else raises what kept it from being stored."""
        started = time.monotonic()
        try:
            file = self._upload(step)
            self.ranks.store.set(self._key(step, self.ranks.rank), json.dumps(file.__dict__))
            if self.ranks.is_main:
                files = self._gather(step)
                check_owner(RunFolder(self.run_url), self.segment)
                if not self._flush_books():
                    raise CheckpointError("the metrics and the ledger of its steps could not be stored before it")
                layout.write_marker(self.run_url, CheckpointManifest(step, self.segment, files, state))
                self.last_step = step
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
            if not self._is_hurried():
                raise
            log.warning("checkpoint of step %d could not be stored yet: %s", step, error)
            return False

    def _upload(self, step: int) -> PayloadFile:
        data = self.staged.data
        name = layout.payload_name(self.segment, self.ranks.rank, self.ranks.world)
        storage.write_bytes(storage.join(layout.folder_of(self.run_url, step), name), data)
        return PayloadFile(name, len(data), layout.checksum(data))

    def _gather(self, step: int) -> tuple[PayloadFile, ...]:
        """Wait for every rank's report."""
        deadline = time.monotonic() + PEER_SECONDS
        files = []
        for rank in range(self.ranks.world):
            key = self._key(step, rank)
            while not self.ranks.store.check([key]):
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"rank {rank} did not store its part of step {step} within {PEER_SECONDS:.0f} s"
                    )
                time.sleep(POLL_SECONDS)
            report = json.loads(self.ranks.store.get(key))
            if "error" in report:
                raise CheckpointError(f"rank {rank}: {report['error']}")
            files.append(PayloadFile(**report))
        return tuple(files)

    def _key(self, step: int, rank: int) -> str:
        return f"checkpoint/{self.segment}/{step}/{rank}"

    def _prune(self) -> None:
        try:
            found = layout.stored(self.run_url)
            for step in layout.to_remove(found, self.config.keep_last, self.config.keep_every_steps):
                layout.remove(self.run_url, step, found[step])
        except LauncherError as error:
            log.warning("old checkpoints were not removed, which only costs storage: %s", error)
