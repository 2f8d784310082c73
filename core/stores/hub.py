"""The Hugging Face Hub as a store: read only, each range by one request (core/hub.py). Keys are whole URIs."""

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from core import hub, patterns
from core.errors import StorageError
from core.stores.base import Buffer, Found, Terms

TERMS = Terms(
    "hub",
    keys="HF_TOKEN",
    access="the name of the repository, and HF_TOKEN if it is private or gated",
)


class HubStore:
    terms = TERMS
    is_local = False

    def get(self, key: str, start: int = 0, end: int | None = None) -> tuple[int, Iterator[Buffer]]:
        end = self.size(key) if end is None else end
        return end - start, (hub.read_range(key, start, end) for _ in range(end > start))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [hub.read_range(key, start, end) for start, end in ranges]

    def size(self, key: str) -> int:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        where = hub.parse(key)
        found = HfApi().get_paths_info(where.repository, [where.path], **_repository(where))
        if not found or not isinstance(found[0], RepoFile):
            raise FileNotFoundError(key)
        return found[0].size

    def objects(self, folder: str) -> Iterator[Found]:
        for entry in _tree(hub.parse(folder), recursive=True):
            if hasattr(entry, "size"):  # folders have none
                yield Found(_uri(hub.parse(folder), entry.path), entry.size, None)

    def names(self, folder: str) -> list[str]:
        return [entry.path.rsplit("/", 1)[-1] for entry in _tree(hub.parse(folder), recursive=False)]

    def matching(self, pattern: str) -> Iterator[Found]:
        fits = patterns.matcher(pattern)
        return (each for each in self.objects(patterns.fixed_part(pattern).rpartition("/")[0]) if fits(each.key))

    def pinned(self, key: str) -> str:
        return hub.parse(key).at(hub.commit_of(key))

    def put(self, key: str, data: memoryview, exclusive: bool) -> NoReturn:
        raise _refusal(key)

    def put_file(self, key: str, path: str) -> NoReturn:
        raise _refusal(key)

    def delete(self, key: str) -> NoReturn:
        raise _refusal(key)

    def renew(self, error: Exception) -> bool:
        return False


def _tree(where: hub.HubPath, recursive: bool) -> Iterator[Any]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    path = where.path.strip("/") or None
    try:
        yield from HfApi().list_repo_tree(where.repository, path, recursive=recursive, **_repository(where))
    except EntryNotFoundError:
        return


def _repository(where: hub.HubPath) -> dict[str, str | None]:
    return {"repo_type": where.kind.removesuffix("s"), "revision": where.revision or None}


def _uri(where: hub.HubPath, path: str) -> str:
    revision = f"@{where.revision}" if where.revision else ""
    return f"hf://{where.kind}/{where.repository}{revision}/{path}"


def _refusal(uri: str) -> StorageError:
    return StorageError(f"{uri}: the Hub is read only here; write to a local path or a bucket")
