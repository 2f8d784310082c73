"""Records a run's course: cooldowns that were decided while it trained, extensions, and the start as a branch.

    RUN_URL/course/000001.json      one change, created exclusively and never changed

A change names a step and applies to the steps after it. It is stored before the first of these steps, and every later
segment reads it. So all segments compute the same learning rates, and a resume stays exact to the bit.
"""

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from core import storage, untrusted
from core.errors import ObjectExists, ObjectNotFound, RunError
from core.run.folder import RunFolder

VERSION = 1
KINDS = ("branch", "extend", "anneal", "replan")
COOLDOWNS = ("anneal", "replan")
_NAME = re.compile(r"^(\d{6})\.json\Z")
_REQUEST = "anneal-request.json"


@dataclass(frozen=True)
class Change:
    """A change that applies to the steps after `step`.

    For a cooldown, `steps` is its length. For an extension, `steps` is the new length of the run and `before` the old
    length. After a branch or an extension, the learning rate rises within `warmup` steps from the share `factor` of its
    peak to the peak. If `warmup` is None, the learning rate continues as before. `source` is the origin of a branch, as
    RUN@STEP. `facts` are the figures behind a decision, for people.
    """

    kind: str
    step: int
    steps: int = 0
    why: str = ""
    before: int = 0
    warmup: int | None = None
    factor: float = 1.0
    source: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_cooldown(self) -> bool:
        return self.kind in COOLDOWNS

    @property
    def end(self) -> int:
        """The last step of a cooldown."""
        return self.step + self.steps


def read(folder: RunFolder) -> list[Change]:
    """The changes of a run in order. Raises RunError for a record that cannot be understood."""
    numbers = sorted(int(match[1]) for name in storage.list_names(folder.course) if (match := _NAME.match(name)))
    if numbers != list(range(1, len(numbers) + 1)):
        raise RunError(f"{folder.course}: holds the changes {numbers}, so one is missing; restore it from a backup")
    return [_read(_uri(folder, number)) for number in numbers]


def add(folder: RunFolder, number: int, change: Change) -> None:
    """Store a change under `number`, counted from 1. Raises RunError if a change with this number already exists."""
    document = {"format": "course", "version": VERSION, "number": number, "time": time.time(), **asdict(change)}
    uri = _uri(folder, number)
    try:
        storage.write_bytes(uri, (json.dumps(document, indent=1) + "\n").encode(), exclusive=True)
    except ObjectExists as error:
        raise RunError(
            f"{uri}: another machine of this run has stored a change already; two machines may not train one run: "
            "stop one of them, then the same command goes on"
        ) from error


def trunks(changes: Sequence[Change]) -> list[int]:
    """The last step before each cooldown, that is, the end of each trunk.

    A re-planned cooldown has the trunk of the cooldown that it replaces. Of their two steps, the earlier one counts.
    """
    found: list[int] = []
    for change in changes:
        if change.kind == "anneal":
            found.append(change.step)
        elif change.kind == "replan" and found:
            found[-1] = min(found[-1], change.step)
    return found


def kept_steps(changes: Sequence[Change]) -> set[int]:
    """Steps whose checkpoints are kept: the last step before each cooldown, and the step of each extension."""
    return {*trunks(changes), *(each.step for each in changes if each.kind == "extend")}


def _uri(folder: RunFolder, number: int) -> str:
    return storage.join(folder.course, f"{number:06d}.json")


def _read(uri: str) -> Change:
    try:
        document = untrusted.read_object(uri)
        if (document["format"], document["version"]) != ("course", VERSION):
            raise ValueError(f"format {document['format']!r} version {document['version']!r}")
        change = Change(**{name: document[name] for name in Change.__dataclass_fields__})
        counts = (change.step, change.steps, change.before, 0 if change.warmup is None else change.warmup)
        if change.kind not in KINDS or any(type(each) is not int or each < 0 for each in counts):
            raise ValueError(f"kind {change.kind!r} with the numbers {counts}")
        if not isinstance(change.factor, float | int) or not 0 <= change.factor <= 1:
            raise ValueError(f"factor {change.factor!r}")
        if not isinstance(change.source, str) or not isinstance(change.why, str):
            raise ValueError(f"source {change.source!r}")
        return replace(change, factor=float(change.factor))
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{uri}: is not a change of a run's course ({error}); restore it from a backup") from error


# --- a request to anneal ----------------------------------------------------------------------------------------


def request_anneal(folder: RunFolder) -> str:
    """Ask the trainer of a run to begin its cooldown. Returns the id of the request."""
    request = secrets.token_hex(4)
    document = {"format": "anneal-request", "version": VERSION, "id": request, "time": time.time()}
    storage.write_bytes(storage.join(folder.url, _REQUEST), (json.dumps(document) + "\n").encode())
    return request


def requested_anneal(folder: RunFolder) -> str | None:
    """The id of the newest request. None if there is no request, or if it cannot be read. Raises StorageError."""
    try:
        request = untrusted.read_object(storage.join(folder.url, _REQUEST))["id"]
        return request if isinstance(request, str) else None
    except (ObjectNotFound, ValueError, KeyError):
        return None
