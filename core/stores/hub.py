"""Reads the Hugging Face Hub as a store, and looks up commits, web pages and names of datasets there.

Each byte range is one request to a `resolve` address, which the Hub's content network answers. fsspec's reader is not
used: it also asks the Hub's API before each range, and a parquet file has thousands of ranges, which would exceed the
API's rate limit. A file in the local cache (below HF_HOME) is read from there. HF_TOKEN is used if set. HF_ENDPOINT
names another Hub. The store's keys are whole URIs.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn
from urllib.parse import quote, unquote

from core.errors import ConfigError, StorageError
from core.stores.base import Buffer, Found, Terms, copy_into, matching

TIMEOUT_SECONDS = 60.0
# These revisions may contain slashes, as in huggingface_hub. In other revisions, a slash must be written as %2F.
_SPECIAL = r"refs/(?:convert/\w+|pr/\d+)"
_URI = re.compile(rf"^hf://(datasets|models|spaces)/([^/@]+/[^/@]+)(?:@({_SPECIAL}(?![^/])|[^/]+))?(?:/(.*))?$")
TERMS = Terms(
    "hub",
    keys="HF_TOKEN",
    access="the name of the repository, and HF_TOKEN if it is private or gated",
)


@dataclass(frozen=True)
class HubPath:
    """The parts of hf://KIND/OWNER/NAME@REVISION/PATH; `revision` is empty if the URI has none."""

    kind: str
    repository: str
    revision: str
    path: str

    def at(self, revision: str) -> str:
        """The same path at a revision, as a URI."""
        return f"hf://{self.kind}/{self.repository}@{quote(revision, safe='')}/{self.path}"


def parse(uri: str) -> HubPath:
    """Split a URI. Raises ConfigError for a URI that does not name a repository."""
    match = _URI.match(uri)
    if not match:
        raise ConfigError(f"{uri}: not of the form hf://datasets/OWNER/NAME[@REVISION]/PATH")
    kind, repository, revision, path = match.groups()
    return HubPath(kind, repository, unquote(revision or ""), path or "")


def is_address(uri: str) -> bool:
    """Whether a URI is an address on the Hub. Only such a URI can have a revision."""
    return uri.startswith("hf://")


def revision_of(uri: str) -> str:
    """The revision in a URI. It is empty if the URI has no revision, and for URIs of other stores."""
    return parse(uri).revision if is_address(uri) else ""


def commit_of(uri: str) -> str:
    """The current commit of the URI's revision, or of the main branch. One request, no retry."""
    from huggingface_hub import HfApi

    where = parse(uri)
    kind = where.kind.removesuffix("s")
    return HfApi().repo_info(where.repository, repo_type=kind, revision=where.revision or None).sha


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids requests to the Hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def page_of(dataset: str) -> str:
    """Address of a dataset's web page."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/datasets/{dataset}"


def similar_datasets(name: str) -> list[str]:
    """Names of datasets on the Hub with the same owner or a similar name, for a message.

    The list is empty if the Hub does not answer.
    """
    from huggingface_hub import HfApi

    owner, _, last = name.rpartition("/")
    found: list[str] = []
    for query in ({"author": owner} if owner else {}, {"search": last}):
        with contextlib.suppress(Exception):
            found += [each.id for each in HfApi().list_datasets(limit=500, **query)] if query else []
    return list(dict.fromkeys(found))


def cached(uri: str) -> str | None:
    """Path of a file in the Hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    where = parse(uri)
    kind = where.kind.removesuffix("s")
    found = try_to_load_from_cache(where.repository, where.path, revision=where.revision or None, repo_type=kind)
    return found if isinstance(found, str) else None


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file. One request, no retry: core/stores/retries.py decides how long to wait."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if path := cached(uri):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    if is_offline():
        raise StorageError(
            f"{uri}: is not in the Hub's cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE "
            "forbids fetching it; unset it, or download the set (hf download --repo-type dataset OWNER/NAME)"
        )
    where = parse(uri)
    prefix = "" if where.kind == "models" else f"{where.kind}/"
    revision = quote(where.revision or "main", safe="")
    address = f"{constants.ENDPOINT}/{prefix}{where.repository}/resolve/{revision}/{quote(where.path)}"
    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
    answer = get_session().get(address, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True)
    hf_raise_for_status(answer)
    return answer.content


class HubStore:
    terms = TERMS
    is_local = False

    def get(self, key: str, start: int = 0, end: int | None = None) -> tuple[int, Iterator[Buffer]]:
        end = self.size(key) if end is None else end
        return end - start, (read_range(key, start, end) for _ in range(end > start))

    def fill(self, key: str, start: int, target: memoryview) -> int:
        return copy_into(target, self.get(key, start, start + len(target))[1])

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [read_range(key, start, end) for start, end in ranges]

    def size(self, key: str) -> int:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        where = parse(key)
        found = HfApi().get_paths_info(where.repository, [where.path], **_repository(where))
        if not found or not isinstance(found[0], RepoFile):
            raise FileNotFoundError(key)
        return found[0].size

    def objects(self, folder: str) -> Iterator[Found]:
        for entry in _tree(parse(folder), recursive=True):
            if hasattr(entry, "size"):  # folders have none
                yield Found(_uri(parse(folder), entry.path), entry.size, None)

    def names(self, folder: str) -> list[str]:
        return [entry.path.rsplit("/", 1)[-1] for entry in _tree(parse(folder), recursive=False)]

    def matching(self, pattern: str) -> Iterator[Found]:
        return matching(self, pattern)

    def pinned(self, key: str) -> str:
        return parse(key).at(commit_of(key))

    def put(self, key: str, data: memoryview, exclusive: bool) -> NoReturn:
        raise _refusal(key)

    def put_file(self, key: str, path: str) -> NoReturn:
        raise _refusal(key)

    def delete(self, key: str) -> NoReturn:
        raise _refusal(key)

    def renew(self, error: Exception) -> bool:
        return False


def _tree(where: HubPath, recursive: bool) -> Iterator[Any]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    path = where.path.strip("/") or None
    try:
        yield from HfApi().list_repo_tree(where.repository, path, recursive=recursive, **_repository(where))
    except EntryNotFoundError:
        return


def _repository(where: HubPath) -> dict[str, str | None]:
    return {"repo_type": where.kind.removesuffix("s"), "revision": where.revision or None}


def _uri(where: HubPath, path: str) -> str:
    if where.revision:
        return replace(where, path=path).at(where.revision)
    return f"hf://{where.kind}/{where.repository}/{path}"


def _refusal(uri: str) -> StorageError:
    return StorageError(f"{uri}: the Hub is read only here; write to a local path or a bucket")
