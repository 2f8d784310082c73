"""Fetches the newest checkpoint while torch is imported.

A restart spends most of its time on the imports and on the transfer of the checkpoint. Neither depends on the other, so
both run at the same time. This module does not import torch, and the trainer calls `start` before it imports torch.
`load_newest` uses a fetched file only if rank 0 chooses the same checkpoint and the file has the right checksum.
"""

import logging
import threading
from collections.abc import Mapping

import numpy as np

from core import storage, untrusted
from core.errors import CheckpointError, LauncherError
from core.xxh3 import xxh3_128
from trainer.checkpoint import layout

log = logging.getLogger(__name__)


def read_payload(uri: str, size: int) -> tuple[np.ndarray, str]:
    """Returns the bytes of a payload file (uint8) and their XXH3-128 hash, which is computed during the transfer.

    Raises CheckpointError if the file is larger than this machine's memory.
    """
    if not 0 <= size <= untrusted.memory_bytes():
        raise CheckpointError(f"{uri}: its {size:,} bytes do not fit into the memory of this machine")
    data = np.empty(size, np.uint8)
    digest = xxh3_128()
    for part in storage.read_into(uri, memoryview(data)):
        digest.update(part)
    return data, digest.hexdigest()


class EarlyFetch:
    """Fetches this rank's files of a run's newest complete checkpoint in the background."""

    def __init__(self, run_url: str, rank: int, world: int):
        self._run_url = run_url
        self._rank = rank
        self._world = world
        self._found: dict[str, tuple[np.ndarray, str]] = {}
        self._thread = threading.Thread(target=self._fetch, name="early fetch", daemon=True)
        self._thread.start()

    def take(self, uri: str) -> tuple[np.ndarray, str] | None:
        """The content and the checksum of a payload file, or None if it was not fetched or was taken before."""
        self._thread.join()
        return self._found.pop(uri, None)

    def close(self) -> None:
        """Free the memory of the files that were not taken."""
        self._thread.join()
        self._found.clear()

    def _fetch(self) -> None:
        try:
            found = layout.stored(self._run_url)
            complete = [step for step, names in found.items() if layout.MARKER in names]
            if not complete:
                return
            step = complete[0]
            files = layout.read_manifest(self._run_url, step, found[step]).files
            for file in files[self._rank :: self._world]:
                uri = storage.join(layout.folder_of(self._run_url, step), file.name)
                self._found[uri] = read_payload(uri, file.bytes)
        except LauncherError as error:
            # No report is needed here: `load_newest` will meet the same error and report it.
            log.debug("no early fetch: %s", error)


def start(run_url: str, environment: Mapping[str, str]) -> EarlyFetch:
    """Begin the fetch. The rank is read from torchrun's environment variables.

    If these variables are not set, this process is the only rank.
    """
    return EarlyFetch(run_url, int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1")))
