"""Finds the newest usable checkpoint and loads it, on any number of ranks.

Rank 0 lists the checkpoints. Each rank reads its share of the files and broadcasts them, so each byte is read from the
storage once. An incomplete or damaged checkpoint is named in the log and skipped, and the next older checkpoint is
tried. Loading fails if complete checkpoints exist but none can be used, or if a listing may hide a checkpoint. So a run
never silently starts again from its beginning.
"""

import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from core import storage
from core.errors import CheckpointError, ObjectNotFound
from core.figures import duration
from core.run.folder import RunFolder, step_name
from trainer.checkpoint import layout
from trainer.checkpoint.blocks import parse_key, tensors_of
from trainer.checkpoint.early import EarlyFetch, read_payload
from trainer.checkpoint.layout import CheckpointManifest, PayloadFile
from trainer.distributed.process_group import Ranks, gather_objects, on_main

log = logging.getLogger(__name__)

# If a listing shows only checkpoints that were removed, the listing is repeated after each of these pauses (seconds).
OLD_LISTING_SECONDS = (1.0, 2.0, 4.0, 8.0)
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Restored:
    """The loaded checkpoint. `skipped` holds the name of each newer checkpoint and the reason why it was not used."""

    step: int
    state: Mapping[str, Any]
    skipped: tuple[tuple[str, str], ...]
    segment: int  # the segment that saved the checkpoint


class Target(Protocol):
    """An object whose tensors are loaded from a checkpoint (trainer.optim.optimizer.BlockOptimizer)."""

    def layout(self) -> Mapping[str, tuple[int, torch.dtype]]: ...
    def shape_of(self, name: str) -> torch.Size: ...
    def restore(self, name: str, start: int, values: torch.Tensor) -> None: ...


def load_newest(run_url: str, target: Target, ranks: Ranks, early: EarlyFetch | None = None) -> Restored | None:
    """Fill `target` from the newest usable checkpoint, on all ranks.

    Returns None if the run has no complete checkpoint. `early` may already have fetched some files of this checkpoint.
    This function closes `early`. Raises CheckpointError if complete checkpoints exist but all are damaged, or if a
    listing hides one (`layout.restorable`).
    """
    try:
        return _newest(run_url, target, ranks, early)
    finally:
        if early:
            early.close()


def _newest(run_url: str, target: Target, ranks: Ranks, early: EarlyFetch | None) -> Restored | None:
    for pause in (*OLD_LISTING_SECONDS, None):
        found = on_main(lambda: layout.restorable(run_url), ranks)
        restored, sentence = _first_usable(run_url, found, target, ranks, early)
        if restored or not sentence:
            return restored
        # An outdated listing may show only checkpoints that were removed meanwhile, so list again after a pause.
        if pause is None or not on_main(functools.partial(layout.vanished, run_url, found), ranks):
            raise CheckpointError(sentence)
        if ranks.is_main:
            log.warning("the listing shows only checkpoints that were removed; listing again in %s", duration(pause))
        on_main(functools.partial(time.sleep, pause), ranks)


def _first_usable(
    run_url: str, found: Mapping[int, Mapping[str, int]], target: Target, ranks: Ranks, early: EarlyFetch | None
) -> tuple[Restored | None, str]:
    """The newest usable checkpoint of those in the listing. If there is none, returns None and the reason.

    The reason is "" if no checkpoint is complete.
    """
    skipped: list[tuple[str, str]] = []
    damaged = 0
    for step, names in found.items():
        manifest, why = on_main(functools.partial(_open, run_url, step, names), ranks)
        if manifest is not None:
            why = _load(run_url, manifest, target, ranks, early)
            if why is None:
                return Restored(step, manifest.state, tuple(skipped), manifest.segment), ""
        if why != "":
            damaged += 1
        skipped.append((step_name(step), why or "incomplete: it was never finished"))
        if ranks.is_main:
            log.warning("checkpoint %s skipped: %s", *skipped[-1])
    if not damaged:
        return None, ""
    return None, (
        f"{RunFolder(run_url).checkpoints}: none of the {damaged} complete checkpoints can be used; "
        f"the newest fails with: {skipped[0][1]}; restore one from a backup, or start over with another run.url"
    )


def _open(run_url: str, step: int, names: Mapping[str, int]) -> tuple[CheckpointManifest | None, str]:
    """On rank 0: (manifest, ""), or (None, reason). The reason is "" if the checkpoint has no marker."""
    if layout.MARKER not in names:
        return None, ""
    try:
        return layout.read_manifest(run_url, step, names), ""
    except CheckpointError as error:
        return None, str(error)


def _load(
    run_url: str, manifest: CheckpointManifest, target: Target, ranks: Ranks, early: EarlyFetch | None
) -> str | None:
    """Read and broadcast all files to fill `target`. Returns None, or the reason why nothing was filled."""
    files = manifest.files
    mine: dict[int, dict[str, torch.Tensor]] = {}
    problem = None
    for index in range(ranks.rank, len(files), ranks.world):
        try:
            mine[index] = read_blocks(layout.folder_of(run_url, manifest.step), files[index], early)
        except (CheckpointError, ObjectNotFound) as error:
            problem = str(error)
            break
    headers = {
        index: [(key, str(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()]
        for index, tensors in mine.items()
    }
    reports = gather_objects((problem, headers), ranks)
    problems = [report for report, _ in reports if report]
    if problems:
        return problems[0]
    keys = {index: blocks for _, headers in reports for index, blocks in headers.items()}
    wrong = _check_cover(keys, target)
    if wrong:
        return f"{layout.folder_of(run_url, manifest.step)}: {wrong}"
    for index in range(len(files)):
        for key, dtype, _ in keys[index]:
            name, start, stop = parse_key(key)
            if index in mine:
                values = mine[index][key].to(ranks.device)
            else:
                values = torch.empty(stop - start, *target.shape_of(name), dtype=DTYPES[dtype], device=ranks.device)
            if ranks.world > 1:
                dist.broadcast(values, src=index % ranks.world)
            target.restore(name, start, values)
    return None


def read_blocks(folder: str, file: PayloadFile, early: EarlyFetch | None = None) -> dict[str, torch.Tensor]:
    """The blocks of one payload file by key, on the CPU.

    Raises ObjectNotFound for a missing file, CheckpointError for a damaged file.
    """
    uri = storage.join(folder, file.name)
    data, checksum = (early.take(uri) if early else None) or read_payload(uri, file.bytes)
    if checksum != file.xxh3_128:
        raise CheckpointError(f"{uri}: checksum differs from its manifest's")
    try:
        return tensors_of(data)
    except ValueError as error:
        raise CheckpointError(f"{uri}: {error}") from error


def _check_cover(keys: Mapping[int, list[tuple[str, str, tuple[int, ...]]]], target: Target) -> str | None:
    """None if the blocks of all files are exactly the rows of `target`, with the same dtypes.

    Otherwise a sentence that names the difference.
    """
    layout = target.layout()
    blocks: dict[str, list[tuple[int, int]]] = {}
    for entries in keys.values():
        for key, dtype, shape in entries:
            try:
                name, start, stop = parse_key(key)
            except ValueError as error:
                return str(error)
            if name not in layout:
                return f"holds {name}, which this model does not have"
            if DTYPES.get(dtype) != layout[name][1]:
                return f"holds {name} as {dtype}, this model has {layout[name][1]}"
            wanted = (stop - start, *target.shape_of(name))
            if shape != wanted:
                return f"holds {key} of shape {list(shape)}, this model has {list(wanted)}"
            blocks.setdefault(name, []).append((start, stop))
    for name, (rows, _) in layout.items():
        position = 0
        for start, stop in sorted(blocks.get(name, [])):
            if start != position:
                break
            position = stop
        if position != rows:
            return f"holds {position} of {rows} rows of {name}"
    return None
