"""What is to be done: the source's files, cut into parts, fixed in `DATA_URL/parts/plan.json` before any work.

A part is a byte range of one source file. A parquet row group (or a JSON line) belongs to the part in whose range
it starts, so the parts follow from the file sizes alone and no footer has to be parsed to share out the work.
Every process that prepares this set reads the same plan, and a plan of another source, other settings or another
seed is refused; so a set is never a mixture of two.

A source file is recognized by its size and the hash of its last bytes. In a parquet file these are the footer,
with the offsets and statistics of every column chunk: another content has another footer.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from core import config as settings
from core import hub, manifest, storage
from core.errors import DataError, ObjectExists, ObjectNotFound
from core.schema_prep import PrepConfig

FORMAT = "data-plan"
# Increased whenever the same settings would give other shards: an unfinished set is then not continued.
VERSION = 1
TAIL_BYTES = 64 << 10
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
LISTING_THREADS = 32


@dataclass(frozen=True)
class SourceFile:
    uri: str
    size: int
    tail_sha256: str


@dataclass(frozen=True)
class Part:
    """Bytes [start, end) of a source file; `index` numbers the parts of a set."""

    index: int
    file: SourceFile
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.index:05d}"

    def __str__(self) -> str:
        whole = self.start == 0 and self.end == self.file.size
        return self.file.uri if whole else f"{self.file.uri}[{self.start}:{self.end}]"


@dataclass(frozen=True)
class Plan:
    """The settings that define the result, and the source files in order."""

    settings: Mapping[str, Any]
    files: tuple[SourceFile, ...]

    @property
    def parts(self) -> list[Part]:
        step = self.settings["data.part_bytes"]
        parts = []
        for file in self.files:
            # Compressed text has no points to enter at.
            width = step if file.uri.endswith((".parquet", ".jsonl")) else file.size
            # A last range below half a part joins the one before.
            count = max(1, (file.size + width // 2) // width) if width else 1
            bounds = [number * width for number in range(count)] + [file.size]
            for start, end in pairwise(bounds):
                parts.append(Part(len(parts), file, start, end))
        return parts

    @property
    def source_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def to_bytes(self) -> bytes:
        document = {
            "format": FORMAT,
            "version": VERSION,
            "settings": dict(self.settings),
            "files": [asdict(file) for file in self.files],
        }
        return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()


def uri_of(data_url: str) -> str:
    return storage.join(data_url, "parts/plan.json")


def make(config: PrepConfig) -> Plan:
    """List the source. Raises DataError when there is nothing to read or a file is no parquet file."""
    files = list_files(pinned(config.source.url, config.source.revision, config.data.url), SUFFIXES)
    return Plan(identity_of(config), files)


def identity_of(config: Any) -> dict[str, Any]:
    """The settings that define the result, as they are stored."""
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in settings.identity(config).items()}
    if "source.url" in plain and not hub.is_address(str(plain["source.url"])):
        plain["source.revision"] = ""  # a config's, for the source that this one replaces
    # How many bad rows are tolerated decides whether there is a result, not which one.
    plain.pop("source.max_bad_share", None)
    return plain


def list_files(pattern: str, suffixes: tuple[str, ...]) -> tuple[SourceFile, ...]:
    """The files of a source in the order of their names. Raises DataError if there is none, or one of another kind."""
    found = storage.expand_objects(pattern)
    if not found:
        raise DataError(f"{pattern}: no file matches; check the address and the pattern")
    for info in found:
        if not info.uri.endswith(suffixes):
            raise DataError(f"{info.uri}: unknown kind of source; give files that end in {', '.join(suffixes)}")
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        return tuple(pool.map(_identify, found))


def pinned(url: str, revision: str, data_url: str) -> str:
    """An hf:// address at a commit: of the set that is begun at `data_url`, if no revision is asked for.

    What the address itself says wins, so that SOURCE_URL replaces a config's source whole.
    """
    if not hub.is_address(url):
        return url
    where = hub.parse(url)
    if not revision and not where.revision:
        try:
            begun = read(data_url)
        except ObjectNotFound:
            begun = None
        if begun and url in begun.settings.values():
            sources = [hub.parse(file.uri) for file in begun.files if hub.is_address(file.uri)]
            return where.at(next(each.revision for each in sources if each.repository == where.repository))
    return storage.pinned(where.at(revision) if revision and not where.revision else url)


def claim(plan: Plan, data_url: str) -> bool:
    """Fix the plan below `data_url`, or meet the same one there. True when the set is complete already.

    Raises DataError if another source, seed or setting was used there, and StorageError if it is not writable.
    """
    try:
        stored = manifest.read(data_url) if manifest.exists(data_url) else None
        if stored and stored.source.get("plan_sha256") == plan.sha256:
            return True
        if stored is None:
            try:
                storage.write_bytes(uri_of(data_url), plan.to_bytes(), exclusive=True)
                return False
            except ObjectExists:
                pass
        found = read(data_url)
    except ObjectNotFound:
        found = None
    if found == plan and stored is None:
        return False
    raise DataError(
        f"{data_url}: holds the tokens of another preparation{_difference(found, plan)}; "
        "nothing was changed: choose another data.url, or delete that folder"
    )


def read(data_url: str) -> Plan:
    """The stored plan. Raises ObjectNotFound, DataError."""
    uri = uri_of(data_url)
    try:
        document = json.loads(storage.read_bytes(uri))
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ValueError(f"{document['format']} version {document['version']}, not {FORMAT} version {VERSION}")
        return Plan(document["settings"], tuple(SourceFile(**file) for file in document["files"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{uri}: no plan of this release ({error}); choose another data.url, or delete that folder"
        ) from error


def _identify(info: storage.ObjectInfo) -> SourceFile:
    tail = storage.read_range(info.uri, max(0, info.size - TAIL_BYTES), info.size)
    if info.uri.endswith(".parquet") and (info.size < 12 or not tail.endswith(b"PAR1")):
        raise DataError(
            f"{info.uri}: {info.size} bytes without the end mark of a parquet file; "
            "it is truncated or of another kind: copy it again"
        )
    return SourceFile(info.uri, info.size, hashlib.sha256(tail).hexdigest())


def _difference(found: Plan | None, wanted: Plan) -> str:
    """The first thing that differs, for the message."""
    if found is None:
        return ""
    for key, value in wanted.settings.items():
        if found.settings.get(key) != value:
            return f" ({key} is {found.settings.get(key)!r} there and {value!r} here)"
    for old, new in zip(found.files, wanted.files, strict=False):
        if old != new:
            what = "content" if old.uri == new.uri else "name"
            return f" (the source has changed: {re.sub('^.*/', '', new.uri)} has another {what})"
    return f" (the source had {len(found.files)} files, now it has {len(wanted.files)})"
