"""What a checkpoint looks like in storage, and which there are. Field by field in docs/formats.md.

    RUN_URL/checkpoints/step-00000100/segment-000002-rank-00000-of-00002.safetensors   payload, one per rank
    RUN_URL/checkpoints/step-00000100/manifest-segment-000002.json                     files, sizes, checksums, state
    RUN_URL/checkpoints/step-00000100/COMPLETE                                         marker, written last

Payload and manifest carry the segment in their names: a machine that was given up but still runs cannot mix its
files with its successor's. The marker names its manifest and the manifest's checksum.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from core import storage
from core.errors import CheckpointError, ObjectNotFound
from core.ledger import segment_name

FOLDER = "checkpoints"
MARKER = "COMPLETE"
FORMAT = "checkpoint"
VERSION = 1
_STEP = re.compile(r"^step-(\d{8,})$")


@dataclass(frozen=True)
class PayloadFile:
    """One payload object: name below the checkpoint's folder, bytes, XXH3-128 of the whole object."""

    name: str
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class CheckpointManifest:
    """`state` holds what is no tensor: step, tokens, configuration, data fingerprint, versions."""

    step: int
    segment: int
    files: tuple[PayloadFile, ...]
    state: dict[str, Any]

    def to_bytes(self) -> bytes:
        return (
            json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, sort_keys=True) + "\n"
        ).encode()


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def folder_of(run_url: str, step: int) -> str:
    return storage.join(run_url, FOLDER, step_name(step))


def payload_name(segment: int, rank: int, world: int) -> str:
    return f"{segment_name(segment)}-rank-{rank:05d}-of-{world:05d}.safetensors"


def manifest_name(segment: int) -> str:
    return f"manifest-{segment_name(segment)}.json"


def checksum(data: bytes | memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def stored(run_url: str) -> dict[int, dict[str, int]]:
    """All checkpoints there are, complete or not, newest first: step → object name → bytes."""
    found: dict[int, dict[str, int]] = {}
    for info in storage.list_objects(storage.join(run_url, FOLDER)):
        folder, _, name = info.uri.rpartition("/")
        match = _STEP.match(folder.rpartition("/")[2])
        if match:
            found.setdefault(int(match.group(1)), {})[name] = info.size
    return dict(sorted(found.items(), reverse=True))


def complete_steps(run_url: str) -> list[int]:
    """Steps whose checkpoint has its marker, newest first."""
    return [step for step, names in stored(run_url).items() if MARKER in names]


def write_marker(run_url: str, manifest: CheckpointManifest) -> None:
    """Manifest, then the marker that makes the checkpoint count."""
    folder = folder_of(run_url, manifest.step)
    data = manifest.to_bytes()
    name = manifest_name(manifest.segment)
    storage.write_bytes(storage.join(folder, name), data)
    storage.write_bytes(
        storage.join(folder, MARKER), json.dumps({"manifest": name, "xxh3_128": checksum(data)}).encode()
    )


def read_manifest(run_url: str, step: int, sizes: Mapping[str, int]) -> CheckpointManifest:
    """Manifest of a complete checkpoint whose objects are `sizes` (see `stored`), all there with the right sizes.

    Raises CheckpointError saying what is wrong with this one; StorageError if the store cannot be reached.
    """
    folder = folder_of(run_url, step)
    try:
        marker = json.loads(storage.read_bytes(storage.join(folder, MARKER)))
        uri = storage.join(folder, marker["manifest"])
        data = storage.read_bytes(uri)
        if checksum(data) != marker["xxh3_128"]:
            raise CheckpointError(f"{uri}: checksum differs from its marker's")
        document = json.loads(data)
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise CheckpointError(
                f"{uri}: format {document['format']!r} version {document['version']!r} is not of this release"
            )
        files = tuple(PayloadFile(**file) for file in document["files"])
        manifest = CheckpointManifest(document["step"], document["segment"], files, document["state"])
    except ObjectNotFound as error:
        raise CheckpointError(f"{folder}: incomplete ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: damaged marker or manifest ({type(error).__name__}: {error})") from error
    for file in files:
        if file.name not in sizes:
            raise CheckpointError(f"{storage.join(folder, file.name)}: missing")
        if sizes[file.name] != file.bytes:
            raise CheckpointError(
                f"{storage.join(folder, file.name)}: {sizes[file.name]} bytes, its manifest says {file.bytes}"
            )
    return manifest


def remove(run_url: str, step: int, names: Iterable[str]) -> None:
    """Delete a checkpoint, marker first, so that it is never complete and damaged at once."""
    for name in sorted(names, key=lambda name: name != MARKER):
        storage.delete(storage.join(folder_of(run_url, step), name))


def to_remove(found: Mapping[int, Mapping[str, int]], keep: int, keep_every: int) -> list[int]:
    """Steps to delete: complete ones but the newest `keep` and the multiples of `keep_every`, and incomplete ones
    older than the newest complete (what a dead segment left behind)."""
    complete = sorted((step for step, names in found.items() if MARKER in names), reverse=True)
    newest = complete[0] if complete else -1
    old = {step for step in complete[keep:] if not keep_every or step % keep_every}
    return [step for step in found if step in old or (step not in complete and step < newest)]
