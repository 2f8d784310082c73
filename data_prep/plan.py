"""Plans a preparation: lists the source's files, cuts them into parts and stores DATA_URL/parts/plan.json.

A part is a byte range of one source file. A parquet row group or JSON line belongs to the part in which it starts, so
the file sizes alone determine the parts, and no footer has to be read. All processes read the same stored plan. A plan
with another source, other settings or another seed is refused if it would change the shards of a finished part. So a
dataset never mixes two preparations.

A source file is identified by its size and by a hash of its last bytes. In a parquet file, these bytes are the footer.
The footer holds the offsets and statistics of every column chunk, so files with different contents have different
footers.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from core import storage, untrusted, urls
from core.data import manifest
from core.errors import DataError, ObjectExists, ObjectNotFound
from core.settings import loader as settings
from core.settings.preparation import PrepConfig
from core.stores import hub
from data_prep.sources import columns, kinds, named
from data_prep.sources.files import Part, SourceFile, below, find_files, folder_of, has_suffix, read_range

log = logging.getLogger(__name__)

FORMAT = "data-plan"
# Raise this number if a change of the code makes other shards from the same settings. Unfinished datasets of older
# releases are then not continued.
VERSION = 1
TAIL_BYTES = 64 << 10
LARGEST_BYTES = 1 << 30  # largest size of a plan in bytes; each source file takes about 250 bytes
LISTING_THREADS = 32
# Settings that name the source. The result depends on the files in the plan, and not on these names.
NAMING = frozenset(f"source.{name}" for name in ("url", "revision", "dataset", "name", "split"))

# Settings that choose which parts are used, and do not change the content of a part.
CHOOSING = frozenset({"data.train_tokens"})

# A function of the finished parts and of the plan that made them. It returns whether a new plan would make the same
# parts.
Accepts = Callable[[set[str], "PrepPlan"], bool]


@dataclass(frozen=True)
class PrepPlan:
    """Settings that define the result, and the source files in order."""

    settings: Mapping[str, Any]
    files: tuple[SourceFile, ...]
    # The earlier plan of this preparation, if it names the same files in another way.
    begun: "PrepPlan | None" = None

    @property
    def parts(self) -> list[Part]:
        step = self.settings["data.part_bytes"]
        parts = []
        for file in self.files:
            width = step if kinds.kind_of(file).divisible else file.size
            # A remainder below half a part joins the last part.
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
            "files": [file.to_dict() for file in self.files],
        }
        return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256((self.begun or self).to_bytes()).hexdigest()

    def content_of(self, part: Part) -> str:
        """SHA-256 of everything that the documents of a part depend on.

        The source files of other parts do not change the result.
        """
        settings = {key: value for key, value in self._result().items() if key not in CHOOSING}
        document = {"settings": settings, "part": [part.index, part.start, part.end, *part.file.content]}
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def identity_of(self, part: Part) -> str:
        """SHA-256 of everything that the shards of a part depend on.

        If `drop_duplicates` is set, this includes all source files.
        """
        return self.sha256 if self.settings.get("filter.drop_duplicates") else self.content_of(part)

    def accepts(self, finished: set[str], other: "PrepPlan") -> bool:
        """Whether this plan makes the parts that were finished under `other` in the same way."""
        old, new = ({part.name: plan.identity_of(part) for part in plan.parts} for plan in (other, self))
        return all(name in old and old[name] == new.get(name) for name in finished)

    @property
    def origin(self) -> dict[str, str]:
        """The name of the source for the manifest, as it was at the start of the preparation."""
        if self.begun:
            return self.begun.origin
        revision = {"revision": hub.revision_of(self.files[0].uri)}
        if not self.settings.get("source.dataset"):
            return {"url": self.settings["source.url"], **revision}
        named = {name: self.settings[f"source.{name}"] for name in ("name", "split")}
        return {"url": f"hf://datasets/{self.settings['source.dataset']}", **named, **revision}

    def gives_the_same(self, other: "PrepPlan") -> bool:
        """Whether both plans give the same shards. The names of their sources may differ."""
        mine, theirs = ([file.content for file in plan.files] for plan in (self, other))
        return mine == theirs and self._result() == other._result()

    def _result(self) -> dict[str, Any]:
        return {key: value for key, value in self.settings.items() if key not in NAMING}


def uri_of(data_url: str) -> str:
    return storage.join(data_url, "parts/plan.json")


def make(config: PrepConfig) -> tuple[PrepConfig, PrepPlan]:
    """Lists the source's files. Returns the plan, and the settings with all columns resolved.

    Raises ConfigError. Raises DataError if the source has no files, or unsuitable files or columns.
    """
    source = config.source
    if source.dataset:
        found = named.find(source, _begun_revision(config))
        # For a gated dataset with a public card, this is the first request that the Hub refuses.
        with named.explained(source, source.revision):
            files = _identified(_named(found, folder_of([file.uri for file in found])))
    else:
        files = list_files(pinned(source.url, source.revision, config.data.url), kinds.SUFFIXES)
    config = replace(config, source=columns.resolved(files[0], source, config.filter))
    columns.check_all(files, config.source, config.filter)
    return config, PrepPlan(identity_of(config), files)


def identity_of(config: Any) -> dict[str, Any]:
    """Settings that define the result, in the stored form."""
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in settings.identity(config).items()}
    if plain.get("source.url") and not hub.is_address(str(plain["source.url"])):
        plain["source.revision"] = ""  # local files and buckets have no revisions
    # Unused settings are absent, as in plans of releases without these settings.
    if not plain.get("source.dataset"):
        for name in ("dataset", "name", "split"):
            plain.pop(f"source.{name}", None)
    if plain.get("source.text_documents") == "file":
        del plain["source.text_documents"]
    # The tolerance for bad rows can make a preparation fail, but does not change its result.
    plain.pop("source.max_bad_share", None)
    return plain


def list_files(pattern: str, suffixes: tuple[str, ...]) -> tuple[SourceFile, ...]:
    """The files of a source, sorted by name.

    Raises DataError if there is no file, or if a file is of an unknown kind.
    """
    found = [SourceFile(info.uri, info.size, "") for info in find_files(pattern, suffixes)]
    for file in found:
        if not has_suffix(file.uri, suffixes):
            raise DataError(f"{file.uri}: unknown kind of source; give files that end in {', '.join(suffixes)}")
    if urls.is_web(pattern):
        return _identified(found)
    return _identified(_named(found, storage.fixed_part(pattern)))


def _named(files: Sequence[SourceFile], folder: str) -> list[SourceFile]:
    """The files with their names. The name of a text file in a subfolder of `folder` is its path below `folder`."""
    names = [below(file.uri, folder) if kinds.is_text(file) else "" for file in files]
    return [replace(file, name=name if "/" in name else "") for file, name in zip(files, names, strict=True)]


def _identified(files: Sequence[SourceFile]) -> tuple[SourceFile, ...]:
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        return tuple(pool.map(_identify, files))


def pinned(url: str, revision: str, data_url: str) -> str:
    """An hf:// address with a commit.

    The commit is taken from `revision`, else from the unfinished preparation at `data_url`. Otherwise it is the newest
    commit. A revision in the address overrides `revision`, so that SOURCE_URL replaces a config's source entirely.
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


def _begun_revision(config: PrepConfig) -> str:
    """The commit that an unfinished preparation of the same dataset at `data.url` uses.

    The result is "" if there is no such preparation.
    """
    with contextlib.suppress(ObjectNotFound):
        begun = read(config.data.url)
        same = ("dataset", "name", "split", "revision")
        if all(begun.settings.get(f"source.{name}") == getattr(config.source, name) for name in same):
            return hub.revision_of(begun.files[0].uri)
    return ""


def claim(plan: PrepPlan, data_url: str, accepts: Accepts | None = None) -> tuple[PrepPlan, bool]:
    """Stores the plan below `data_url`, or accepts an equal stored plan.

    Returns the plan, and whether the dataset is complete. A new plan replaces the old one if no part is finished, or if
    `accepts(finished parts, old plan)` returns true; by default `accepts` is `PrepPlan.accepts`.

    Raises DataError if another source, seed or setting was used there. Raises StorageError if `data_url` is not
    writable.
    """
    try:
        stored = manifest.read(data_url) if manifest.exists(data_url) else None
        if stored and stored.source.get("plan_sha256") == plan.sha256:
            return plan, True
        if stored is None:
            try:
                storage.claim(uri_of(data_url), plan.to_bytes())
                return plan, False
            except ObjectExists:
                pass
        found = read(data_url)
    except ObjectNotFound:
        found = None
    if found and found.gives_the_same(plan) and (not stored or stored.source.get("plan_sha256") == found.sha256):
        return replace(plan, begun=found), stored is not None
    if found and not stored and (accepts or plan.accepts)(done_parts(data_url), found):
        log.info("%s: a new plan replaces the old one%s; finished parts stay", data_url, _difference(found, plan))
        storage.write_bytes(uri_of(data_url), plan.to_bytes())
        return plan, False
    raise DataError(
        f"{data_url}: holds the tokens of another preparation{_difference(found, plan)}; "
        "nothing was changed: choose another data.url, or delete that folder"
    )


def record_uri(data_url: str, name: str) -> str:
    return storage.join(data_url, f"parts/{name}.json")


def done_parts(data_url: str) -> set[str]:
    """Names of the finished parts."""
    names = storage.list_names(storage.join(data_url, "parts"))
    return {name.removesuffix(".json") for name in names if name.endswith(".json") and name != "plan.json"}


def read(data_url: str) -> PrepPlan:
    """Reads the stored plan. Raises ObjectNotFound, DataError."""
    uri = uri_of(data_url)
    try:
        document = untrusted.read_json(uri, LARGEST_BYTES)
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ValueError(f"{document['format']} version {document['version']}, not {FORMAT} version {VERSION}")
        return PrepPlan(document["settings"], tuple(SourceFile(**file) for file in document["files"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{uri}: not a plan of this release ({error}); choose another data.url, or delete that folder"
        ) from error


def _identify(file: SourceFile) -> SourceFile:
    tail = read_range(file.uri, max(0, file.size - TAIL_BYTES), file.size)
    if has_suffix(file.uri, (".parquet",)) and (file.size < 12 or not tail.endswith(b"PAR1")):
        raise DataError(
            f"{file.uri}: {file.size} bytes without the end mark of a parquet file; "
            "it is truncated or has another format: copy it again"
        )
    return replace(file, tail_sha256=hashlib.sha256(tail).hexdigest())


def _difference(found: PrepPlan | None, wanted: PrepPlan) -> str:
    """The first difference between two plans, for an error message."""
    if found is None:
        return ""
    for key in sorted(wanted.settings, key=lambda key: key in NAMING):
        old, new = found.settings.get(key), wanted.settings[key]
        if old != new:
            return f" ({key} is {old!r} there and {new!r} here)"
    for old, new in zip(found.files, wanted.files, strict=False):
        if old.content != new.content:
            what = "name" if old.content[0] != new.content[0] else "content"
            return f" (the source has changed: {re.sub('^.*/', '', new.uri)} has another {what})"
    return f" (the source had {len(found.files)} files, now it has {len(wanted.files)})"
