"""Reads and writes the layout of checkpoints in storage. docs/formats.md describes each field.

    RUN_URL/checkpoints/step-00000100/segment-000002-rank-00000-of-00002.safetensors   (payload, one per rank)
    RUN_URL/checkpoints/step-00000100/manifest-segment-000002.json            (files, sizes, checksums, state)
    RUN_URL/checkpoints/step-00000100/COMPLETE                                (marker, written last)

The names of payloads and manifests contain the segment, so a replaced machine that still runs cannot mix its files with
the files of its successor. The marker holds the name and the checksum of the manifest.
"""

import json
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core import storage, untrusted
from core.errors import CheckpointError, ObjectDamaged, ObjectNotFound, StorageError
from core.run.folder import RunFolder, segment_name
from core.storage import ObjectInfo
from core.xxh3 import xxh3_128

MARKER = "COMPLETE"
FORMAT = "checkpoint"
VERSION = 2  # version 1 named some settings in `state.config` differently
_STEP = re.compile(r"^step-(\d{8,15})\Z")
_MANIFEST = re.compile(r"^manifest-segment-\d{6,12}\.json\Z")
_PAYLOAD = re.compile(r"^segment-\d{6,12}-rank-\d{5,9}-of-\d{5,9}\.safetensors\Z")
_OBJECT = re.compile(rf"^{MARKER}\Z|{_MANIFEST.pattern}|{_PAYLOAD.pattern}")
LISTINGS = 5
# Seconds before the second listing. Each further pause is twice as long: some stores list a new object only after a
# while.
PAUSE_SECONDS = 0.5


@dataclass(frozen=True)
class PayloadFile:
    """One payload object: its name in the checkpoint's folder, its size, and the XXH3-128 hash of its content."""

    name: str
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class CheckpointManifest:
    """`state` holds the non-tensor data: step, tokens, configuration, data fingerprint, versions."""

    step: int
    segment: int
    files: tuple[PayloadFile, ...]
    state: dict[str, Any]

    def to_bytes(self) -> bytes:
        return (
            json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1, sort_keys=True) + "\n"
        ).encode()


def folder_of(run_url: str, step: int) -> str:
    return RunFolder(run_url).checkpoint(step)


def payload_name(segment: int, rank: int, world: int) -> str:
    return f"{segment_name(segment)}-rank-{rank:05d}-of-{world:05d}.safetensors"


def manifest_name(segment: int) -> str:
    return f"manifest-{segment_name(segment)}.json"


def checksum(data: bytes | memoryview) -> str:
    digest = xxh3_128()
    digest.update(data)
    return digest.hexdigest()


def stored(run_url: str) -> dict[int, dict[str, int]]:
    """All stored checkpoints, complete or not, newest first.

    The result maps a step to the names of its objects, and each name to its size in bytes.
    """
    folder = RunFolder(run_url).checkpoints
    return _by_step(folder, storage.list_objects(folder))


def restorable(run_url: str) -> dict[int, dict[str, int]]:
    """Like `stored`, but compares two listings, so that no checkpoint is missed.

    Raises CheckpointError for a step that only one listing shows, or for a step that this user may not read.
    """
    folder = RunFolder(run_url).checkpoints
    # The listings may differ because another machine of this run stores or removes a checkpoint. So list again.
    for attempt in range(LISTINGS):
        if attempt and not storage.is_local(folder):
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            names = storage.list_names(folder)
            objects = storage.list_objects(folder)
            problem = next(_problems(folder, names, objects), None)
        except StorageError as error:
            cause = error.__cause__
            if not isinstance(cause, PermissionError) or not cause.filename:
                raise
            raise CheckpointError(
                f"{cause.filename}: may not be read ({cause.strerror}); make it readable for this user, or move the "
                f"checkpoint out of {folder} to go on without it"
            ) from error
        if problem is None:
            return _by_step(folder, objects)
    raise CheckpointError(f"{problem}, or move the checkpoint out of {folder} to go on without it")


def vanished(run_url: str, found: Mapping[int, Mapping[str, int]]) -> bool:
    """Whether a checkpoint was removed after the listing `found` was made.

    This is so if the listing shows a marker that no longer exists.
    """
    markers = [storage.join(folder_of(run_url, step), MARKER) for step, names in found.items() if MARKER in names]
    return not all(map(storage.exists, markers))


def _by_step(folder: str, objects: Iterable[ObjectInfo]) -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = {}
    for info in objects:
        below = info.uri.removeprefix(f"{folder}/").split("/")
        if len(below) == 2 and (match := _STEP.match(below[0])):
            found.setdefault(int(match.group(1)), {})[below[1]] = info.size
    return dict(sorted(found.items(), reverse=True))


def _problems(folder: str, names: Sequence[str], objects: Sequence[ObjectInfo]) -> Iterator[str]:
    """Yields a sentence for each step that only one of two listings shows. A step without objects is not a problem."""
    for name in filter(_STEP.match, names):
        uri = storage.join(folder, name)
        shown = {info.uri for info in objects if info.uri == uri or info.uri.startswith(f"{uri}/")}
        for each in sorted(shown):
            if target := storage.link_to_nothing(each):
                yield f"{each}: is a link to {target}, which does not exist; mount or restore it"
        if uri in shown:
            yield f"{uri}: is a file, but should be a checkpoint's folder; restore the folder"
        elif shown:
            hidden = storage.join(uri, MARKER) not in shown and storage.exists(storage.join(uri, MARKER))
        else:
            hidden = bool(storage.list_names(uri))
        if uri not in shown and hidden:
            yield f"{uri}: one listing of the store shows it and another does not; check the store"


def complete_steps(run_url: str) -> list[int]:
    """Steps whose checkpoint has its marker, newest first."""
    return [step for step, names in stored(run_url).items() if MARKER in names]


def write_marker(run_url: str, manifest: CheckpointManifest) -> None:
    """Write the manifest, then the marker, which completes the checkpoint."""
    folder = folder_of(run_url, manifest.step)
    data = manifest.to_bytes()
    name = manifest_name(manifest.segment)
    storage.write_bytes(storage.join(folder, name), data)
    storage.write_bytes(
        storage.join(folder, MARKER), json.dumps({"manifest": name, "xxh3_128": checksum(data)}).encode()
    )


def read_manifest(run_url: str, step: int, sizes: Mapping[str, int]) -> CheckpointManifest:
    """The manifest of a complete checkpoint. `sizes` maps the names of its objects to their sizes (see `stored`).

    Raises CheckpointError if an object is missing, damaged or of another size. Raises StorageError if the store does
    not answer.
    """
    folder = folder_of(run_url, step)
    try:
        marker = untrusted.read_json(storage.join(folder, MARKER))
        if not _MANIFEST.match(marker["manifest"]):
            raise ValueError(f"{marker['manifest']!r} is not the name of a manifest")
        uri = storage.join(folder, marker["manifest"])
        data = storage.read_bytes(uri, untrusted.DOCUMENT_BYTES)
        if checksum(data) != marker["xxh3_128"]:
            raise CheckpointError(f"{uri}: checksum differs from its marker's")
        document = untrusted.parse_json(data)
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise CheckpointError(
                f"{uri}: format {document['format']!r} version {document['version']!r} cannot be read by this release"
            )
        files = tuple(PayloadFile(**file) for file in document["files"])
        manifest = CheckpointManifest(document["step"], document["segment"], files, document["state"])
        if problem := _mistake(manifest, step):
            raise ValueError(problem)
    except ObjectNotFound as error:
        raise CheckpointError(f"{folder}: incomplete ({error})") from error
    except ObjectDamaged as error:
        raise CheckpointError(str(error)) from error
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


def _mistake(manifest: CheckpointManifest, step: int) -> str | None:
    """A mistake in the fields of the manifest of `step`, or None. The checksum does not show such a mistake."""
    for file in manifest.files:
        if not isinstance(file.name, str) or not _PAYLOAD.match(file.name):
            return f"{file.name!r} is not the name of a payload"
        if type(file.bytes) is not int or not isinstance(file.xxh3_128, str):
            return f"{file.name} has {file.bytes!r} bytes and the checksum {file.xxh3_128!r}"
    if len({file.name for file in manifest.files}) < len(manifest.files):
        return "it names a payload twice"
    if type(manifest.step) is not int or manifest.step != step or type(manifest.segment) is not int:
        return f"it is of step {manifest.step!r} and segment {manifest.segment!r}"
    if not isinstance(manifest.state, dict) or not isinstance(manifest.state.get("config", {}), dict):
        return "its state is not a JSON object"
    return None


def remove(run_url: str, step: int, names: Iterable[str]) -> None:
    """Delete a checkpoint.

    The marker is deleted first, so that a checkpoint with missing objects is never marked complete. If the folder is a
    symbolic link to a checkpoint of another run, only the link is removed. If it is a link to another folder, only
    files with the names of checkpoint files are deleted there.
    """
    folder = folder_of(run_url, step)
    path = storage.local_path(folder) if storage.is_local(folder) else None
    if path and path.is_symlink():
        if path.resolve().parent.name == "checkpoints":
            path.unlink()
            return
        names = filter(_OBJECT.match, names)
    for name in sorted(names, key=lambda name: name != MARKER):
        storage.delete(storage.join(folder, name))


def to_remove(
    found: Mapping[int, Mapping[str, int]], keep: int, keep_every: int, kept: Collection[int] = ()
) -> list[int]:
    """The steps whose checkpoints are to be deleted.

    Of the complete checkpoints, three kinds are kept: the newest `keep`, those at multiples of `keep_every`, and those
    of the steps in `kept`. All others are deleted. An incomplete checkpoint is deleted if a later one is complete.
    """
    complete = sorted((step for step, names in found.items() if MARKER in names), reverse=True)
    newest = complete[0] if complete else -1
    old = {step for step in complete[keep:] if step not in kept and (not keep_every or step % keep_every)}
    return [step for step in found if step in old or (step not in complete and step < newest)]
