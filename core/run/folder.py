"""Names the objects below a run's URL, and reads and writes run.json, which describes the run.

    folder = RunFolder("s3://bucket/runs/first")
    folder.segment(3).start, folder.checkpoint(1000), folder.evaluations

The first segment writes RUN_URL/run.json once: the settings and the data that define the run.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from shlex import quote
from typing import Any

from core import storage, untrusted
from core.errors import ObjectExists, RunError
from core.secrets import without_keys

VERSION = 2  # version 1 named some settings differently
# A branch (--from) must keep these settings, because the tensors and the steps of its checkpoint depend on them.
FIXED_IN_A_BRANCH = ("model.", "stage", "start.", "teacher.", "lora.", "optimizer.name", "batch.tokens_per_step")
_SEGMENT = re.compile(r"^segment-(\d{6}|[1-9]\d{6,8})\Z")  # one spelling per number
_ID = re.compile(r"^[0-9a-z]{1,64}\Z")  # trackers use the id in file names


@dataclass(frozen=True)
class SegmentFolder:
    """The objects of one segment. `events` and `metrics` are journals (core.run.journal)."""

    url: str
    number: int

    @property
    def name(self) -> str:
        return segment_name(self.number)

    @property
    def start(self) -> str:
        """The first object of a segment. Its creation is exclusive: the machine that creates it owns the number."""
        return storage.join(self.url, "ledger", self.name, "start.jsonl")

    @property
    def events(self) -> str:
        return storage.join(self.url, "ledger", self.name, "events")

    @property
    def metrics(self) -> str:
        return storage.join(self.url, "metrics", self.name)

    @property
    def answers(self) -> str:
        """A journal of a paid endpoint's answers."""
        return storage.join(self.url, "answers", self.name)


@dataclass(frozen=True)
class RunFolder:
    """A run's URL, without a trailing slash."""

    url: str

    def __post_init__(self):
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def _at(self, *names: str) -> str:
        return storage.join(self.url, *names)

    @property
    def description(self) -> str:
        return self._at("run.json")

    @property
    def ledger(self) -> str:
        return self._at("ledger")

    @property
    def metrics(self) -> str:
        return self._at("metrics")

    @property
    def checkpoints(self) -> str:
        return self._at("checkpoints")

    @property
    def evaluations(self) -> str:
        """Folder for the results of evaluations. It is a run folder with a separate ledger.

        A new segment in the training run's own ledger would take over the training run.
        """
        return self._at("evaluations")

    @property
    def serving(self) -> str:
        """Run folder for the ledger of this run's servers."""
        return self._at("serving")

    @property
    def exports(self) -> str:
        """Run folder with the ledger of exports, and the exported folders."""
        return self._at("exports")

    @property
    def preparation(self) -> str:
        """A run folder with a separate ledger, for a preparation that is a stage of this run."""
        return self._at("preparation")

    @property
    def beside(self) -> tuple[str, ...]:
        """Run folders inside this one with separate ledgers: for the preparation, and for work on the trained model."""
        return (self.preparation, self.evaluations, self.serving, self.exports)

    @property
    def budget(self) -> str:
        """Records of the run's budgets, with their plans, launches and outcomes (core.run.budget)."""
        return self._at("budget")

    @property
    def answers(self) -> str:
        return self._at("answers")

    @property
    def logs(self) -> str:
        return self._at("logs")

    @property
    def preflight(self) -> str:
        return self._at("preflight")

    @property
    def forecast(self) -> str:
        """The forecast of the newest launch (costs.foreseen)."""
        return self._at("forecast.json")

    @property
    def machines(self) -> str:
        """Records of the machines' paid time (core.run.paid)."""
        return self._at("machines")

    @property
    def bills(self) -> str:
        """Bills from other sources (costs.added)."""
        return self._at("bills")

    @property
    def refusals(self) -> str:
        """Records of machines that preflight refused."""
        return self._at("refused")

    @property
    def course(self) -> str:
        """Cooldowns, extensions and the origin of a branch (core.run.course)."""
        return self._at("course")

    @property
    def reference(self) -> str:
        """Log-probabilities of the pairs of a DPO run under its initial weights."""
        return self._at("reference.safetensors")

    def profile(self, segment: int, first: int, last: int) -> str:
        """The trace of a profiler over steps `first` to `last`."""
        return self._at("profile", f"{segment_name(segment)}-steps-{first}-{last}.json.gz")

    def segment(self, number: int) -> SegmentFolder:
        return SegmentFolder(self.url, number)

    def segment_numbers(self) -> list[int]:
        """Numbers of all started segments, ascending."""
        return sorted(number for name in storage.list_names(self.ledger) if (number := segment_number(name)))

    def checkpoint(self, step: int) -> str:
        return storage.join(self.checkpoints, step_name(step))


def segment_name(number: int) -> str:
    return f"segment-{number:06d}"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def segment_number(name: str) -> int | None:
    """The number in a segment's name, or None for any other name."""
    match = _SEGMENT.match(name)
    return int(match.group(1)) if match else None


def open_run(folder: RunFolder, identity: Mapping[str, Any], config: Mapping[str, Any], data_fingerprint: str) -> bool:
    """Create the run, or check that the existing one has the same settings and data. Returns whether it was created.

    `identity` holds the settings that define the result, by dotted key. Raises RunError, which names a setting that
    differs.
    """
    identity = without_keys(identity)
    document = {
        "format": "run",
        "version": VERSION,
        "identity": identity,
        "data_fingerprint": data_fingerprint,
        "config": without_keys(config),
        "id": secrets.token_hex(8),
    }
    data = (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
    try:
        storage.claim(folder.description, data)
        return True
    except ObjectExists:
        pass
    stored = read_description(folder)
    remedy = "use the settings it was started with, or another run.url"
    for key in sorted({*stored["identity"], *identity}):
        there, here = without_keys(stored["identity"].get(key)), identity.get(key)
        if _plain(there) != _plain(here):
            more = continued_elsewhere(folder, stored["identity"], key)
            if key == "train.steps" and isinstance(there, int) and there < here:
                more = f"; to train this run for more steps: --extend{more}"
            raise RunError(
                f"{folder}: holds a run with {key}={there!r}, this config has {key}={here!r}; {remedy}{more}"
            )
    if stored["data_fingerprint"] != data_fingerprint:
        raise RunError(
            f"{folder}: this run was started on data {stored['data_fingerprint'][:12]}…, "
            f"data.url now holds {data_fingerprint[:12]}…; "
            f"point data.url at the data it was started on, or use another run.url"
            f"{continued_elsewhere(folder, stored['identity'])}"
        )
    return False


def continued_elsewhere(folder: RunFolder, identity: Mapping[str, Any], key: str = "") -> str:
    """The end of a message that says how to continue a run with another value of `key`; "" without a checkpoint.

    The settings that define the result of a run cannot change, so other values need a new run. The new run can be a
    branch of the old one. If a branch must keep the setting `key`, the new run can start from the old run's weights.
    """
    stage = identity.get("stage")
    if (
        not stage
        or key.startswith(("model.", "start."))
        or key == "stage"
        or not storage.list_names(folder.checkpoints)
    ):
        return ""
    run, other = str(folder), f"{folder}-2"
    if not key.startswith(FIXED_IN_A_BRANCH):
        how = f"{quote(f'--from={run}')} {quote(f'--run.url={other}')}"
        return f"; to go on from its newest step with other settings: {how}"
    if stage == "pretrain":
        places = f"{quote(run)} {quote(other)}"
        how = f"python -m trainer.import_weights {places} CONFIG.yaml, then train with run.url={other}"
    else:
        how = f"{quote(f'--start.weights={run}')} {quote(f'--run.url={other}')}"
    return f"; to go on from its weights with other settings: {how}"


def read_description(folder: RunFolder) -> dict[str, Any]:
    """The document in run.json. Raises ObjectNotFound, RunError."""
    uri = folder.description
    try:
        document = untrusted.read_json(uri)
        if document["format"] != "run" or document["version"] != VERSION:
            raise ValueError(f"format {document['format']!r} version {document['version']!r}")
        for key, kind in (("identity", dict), ("config", dict), ("data_fingerprint", str)):
            if not isinstance(document[key], kind):
                raise ValueError(f"{key} is {repr(document[key])[:80]}")
        if not _ID.match(document.get("id", "0")):
            raise ValueError(f"id is {repr(document['id'])[:80]}")
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{uri}: is not a run description of this release ({error}); use another run.url") from error
    return document


def id_of(folder: RunFolder) -> str:
    """The id of a run in experiment trackers, drawn at random when the run was created.

    The URL would not be unique: two URLs may end in the same name, and a new run may get the URL of a deleted one.
    """
    known = read_description(folder).get("id")
    return known or hashlib.sha256(folder.url.encode()).hexdigest()[:16]  # a run of an earlier release has no id


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
