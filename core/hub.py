"""The Hugging Face Hub: byte ranges of a file by one request each, and the commit behind a branch or tag.

fsspec's reader asks the Hub's interface about a file before each range; its rate limit would stop a parquet read
of a few thousand ranges. A resolve request alone is answered by the content network. HF_TOKEN is used if set,
HF_ENDPOINT names another Hub.
"""

import re
from dataclasses import dataclass
from urllib.parse import quote

from core.errors import ConfigError

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


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file. One request, no retry: the caller's loop knows how long to wait."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    where = parse(uri)
    prefix = "" if where.kind == "models" else f"{where.kind}/"
    address = f"{constants.ENDPOINT}/{prefix}{where.repository}/resolve/{where.revision or 'main'}/{quote(where.path)}"
    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}"}
    answer = get_session().get(address, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True)
    hf_raise_for_status(answer)
    return answer.content
