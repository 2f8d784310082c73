"""The Hugging Face Hub: byte ranges of a file by one request each, and the commit behind a branch or tag.

fsspec's reader asks the Hub's interface about a file before each range; its rate limit would stop a parquet read
of a few thousand ranges. A resolve request alone is answered by the content network. A file that is in the Hub's cache
(below HF_HOME) is read there. HF_TOKEN is used if set, HF_ENDPOINT names another Hub.
"""

import contextlib
import os
import re
from dataclasses import dataclass
from urllib.parse import quote

from core.errors import ConfigError, StorageError

TIMEOUT_SECONDS = 60.0
_URI = re.compile(r"^hf://(datasets|models|spaces)/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?$")


@dataclass(frozen=True)
class HubPath:
    """hf://KIND/OWNER/NAME@REVISION/PATH in pieces; `revision` is empty where none is named."""

    kind: str
    repository: str
    revision: str
    path: str

    def at(self, revision: str) -> str:
        """The same path at a revision, as a URI."""
        return f"hf://{self.kind}/{self.repository}@{revision}/{self.path}"


def parse(uri: str) -> HubPath:
    """Raises ConfigError for a URI that names no file of a repository."""
    match = _URI.match(uri)
    if not match:
        raise ConfigError(f"{uri}: not of the form hf://datasets/OWNER/NAME[@REVISION]/PATH")
    kind, repository, revision, path = match.groups()
    return HubPath(kind, repository, revision or "", path or "")


def is_address(uri: str) -> bool:
    """Whether a URI is of the Hub, and so has revisions."""
    return uri.startswith("hf://")


def revision_of(uri: str) -> str:
    """The revision that a URI names; empty for one that names none, or is not of the Hub."""
    return parse(uri).revision if is_address(uri) else ""


def commit_of(uri: str) -> str:
    """The commit hash that the URI's revision (or the main branch) stands for now. One request, no retry."""
    from huggingface_hub import HfApi

    where = parse(uri)
    kind = where.kind.removesuffix("s")
    return HfApi().repo_info(where.repository, repo_type=kind, revision=where.revision or None).sha


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbid to ask the Hub."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def page_of(dataset: str) -> str:
    """Where people look at a data set."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/datasets/{dataset}"


def similar_datasets(name: str) -> list[str]:
    """Names on the Hub of the same owner, or with the same word in them, for a message; none if it does not answer."""
    from huggingface_hub import HfApi

    owner, _, last = name.rpartition("/")
    found: list[str] = []
    for query in ({"author": owner} if owner else {}, {"search": last}):
        with contextlib.suppress(Exception):
            found += [each.id for each in HfApi().list_datasets(limit=500, **query)] if query else []
    return list(dict.fromkeys(found))


def cached(uri: str) -> str | None:
    """The path of a file in the Hub's cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    where = parse(uri)
    kind = where.kind.removesuffix("s")
    found = try_to_load_from_cache(where.repository, where.path, revision=where.revision or None, repo_type=kind)
    return found if isinstance(found, str) else None


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file. One request, no retry: the caller's loop knows how long to wait."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if path := cached(uri):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)
    if is_offline():
        raise StorageError(
            f"{uri}: is not in the Hub's cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE "
            "forbids to fetch it; unset it, or download the set (hf download --repo-type dataset OWNER/NAME)"
        )
    where = parse(uri)
    prefix = "" if where.kind == "models" else f"{where.kind}/"
    address = f"{constants.ENDPOINT}/{prefix}{where.repository}/resolve/{where.revision or 'main'}/{quote(where.path)}"
    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
    answer = get_session().get(address, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True)
    hf_raise_for_status(answer)
    return answer.content
