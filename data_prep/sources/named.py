"""Finds the files of a Hugging Face dataset by its name, and determines how to read them.

`datasets` chooses files and reader as in `load_dataset`, but only from the repository's list of files and its card. So
nothing is downloaded twice, and core.storage makes the requests. If HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set, a
copy in the Hub's cache is read (`hf download --repo-type dataset OWNER/NAME`). The plan and the result are the same as
from the Hub.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from core import storage
from core.errors import ConfigError, DataError, StorageError
from core.settings.preparation import SourceConfig
from core.stores import hub
from data_prep.sources import kinds, streamed
from data_prep.sources.columns import nearest
from data_prep.sources.files import SourceFile

# Files that describe how to read the other files.
CARDS = ("README.md", ".huggingface.yaml", "dataset_infos.json")
# Settings of a builder that select data or name types, but do not change how files are read.
_NOT_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "features"}
# Modules whose settings our readers ignore. These settings select columns of parquet or divide text.
_OWN = {"parquet", "text"}


@dataclass(frozen=True)
class _Copy:
    """A dataset at a commit, as a local folder. The files in the folder are empty, except for the cards.

    `sizes` holds the true size of each file.
    """

    repository: str
    commit: str
    folder: Path
    sizes: Mapping[str, int]

    def uri(self, path: str) -> str:
        return hub.HubPath("datasets", self.repository, "", path).at(self.commit)


def find(source: SourceConfig, begun_revision: str = "") -> list[SourceFile]:
    """The files of a split, sorted by name, without the hashes of their tails.

    If the settings name no revision, `begun_revision` is used or, if that is empty, the newest revision. Raises
    ConfigError for an unknown name, StorageError.
    """
    with contextlib.ExitStack() as stack:
        copy = stack.enter_context(_copy_of(source, source.revision or begun_revision))
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        module, options, splits = _layout(source, copy, cache)
    if source.split not in splits:
        raise ConfigError(
            f"source.split is {source.split!r}, but {source.dataset}"
            f"{f' ({source.name})' if source.name else ''} has only {', '.join(splits)}{nearest(source.split, splits)}"
        )
    return [_file(copy.uri(path), copy.sizes[path], module, options) for path in sorted(splits[source.split])]


def _file(uri: str, size: int, module: str, options: dict[str, Any]) -> SourceFile:
    """A source file. It names a reader only if the file's suffix does not determine the reader."""
    own = kinds.of_name(uri)
    if own and (module in _OWN or (module == "json" and not options) or streamed.reader_of(uri) == (module, options)):
        return SourceFile(uri, size, "")
    return SourceFile(uri, size, "", module, json.dumps(options, sort_keys=True) if options else "")


def _layout(source: SourceConfig, copy: _Copy, cache: str) -> tuple[str, dict[str, Any], dict[str, list[str]]]:
    """Returns the module of `datasets` for the files, its settings, and the paths of each split's files."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        builder = datasets.load_dataset_builder(str(copy.folder), name=source.name or None, cache_dir=cache)
    except FileNotFoundError as error:  # datasets found no data files
        some = ", ".join(sorted(copy.sizes)[:5]) or "none"
        raise DataError(
            f"source.dataset is {source.dataset!r}, which has no data files (only {some}); datasets that a script "
            "makes cannot be read: name another dataset, or give files with source.url"
        ) from error
    except ValueError as error:
        known = datasets.get_dataset_config_names(str(copy.folder))
        if source.name in known:
            raise DataError(f"{source.place}: cannot be read ({' '.join(str(error).split())[:160]})") from error
        what = f"source.name is {source.name!r}, but" if source.name else "source.name is empty, and"
        raise ConfigError(
            f"{what} {source.dataset} has the configurations {', '.join(known)}"
            f"{nearest(source.name, known) or '; choose one'}"
        ) from error
    module = type(builder).__module__.rpartition(".")[2]
    folder = copy.folder.resolve()
    splits = {
        str(split): [Path(path).relative_to(folder).as_posix() for path in paths]
        for split, paths in builder.config.data_files.items()
    }
    return module, _options(builder.config), splits


def _options(config: Any) -> dict[str, Any]:
    """Settings of a builder that differ from their defaults."""
    default = type(config)()
    changed = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in _NOT_OPTIONS and getattr(config, field.name) != getattr(default, field.name)
    }
    return changed


# --- the copy -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _copy_of(source: SourceConfig, revision: str) -> Iterator[_Copy]:
    if hub.is_offline():
        yield _cached(source, revision)
        return
    repository, commit = _resolved(source, revision)
    root = hub.HubPath("datasets", repository, "", "").at(commit)
    with explained(source, revision):
        sizes = {info.uri.removeprefix(root): info.size for info in storage.list_objects(root)}
        with tempfile.TemporaryDirectory() as folder:
            for path in sizes:
                if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                    raise DataError(f"{root}{path}: leads out of the data set; name another one")
                target = Path(folder, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(storage.read_range(f"{root}{path}", 0, sizes[path]) if path in CARDS else b"")
            yield _Copy(repository, commit, Path(folder), sizes)


def _cached(source: SourceConfig, revision: str) -> _Copy:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(source.dataset, repo_type="dataset", revision=revision or None, local_files_only=True)
        )
    except (LocalEntryNotFoundError, ValueError) as error:
        cache = Path(constants.HF_HUB_CACHE)
        names = [path.name.removeprefix("datasets--").replace("--", "/") for path in cache.glob("datasets--*")]
        at = f" at revision {revision!r}" if revision else ""
        hint = "" if source.dataset in names else nearest(source.dataset, names)
        raise ConfigError(
            f"source.dataset is {source.dataset!r}, of which {cache} has no copy{at}"
            f"{hint or '; download it (hf download --repo-type dataset OWNER/NAME)'}, "
            "or unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE"
        ) from error
    paths = (path for path in folder.rglob("*") if path.is_file())
    return _Copy(
        source.dataset,
        folder.name,
        folder,
        {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths},
    )


def _resolved(source: SourceConfig, revision: str) -> tuple[str, str]:
    """The repository's full name and the commit."""
    repository = source.dataset if "/" in source.dataset else _full_name(source)
    with explained(source, revision):
        address = hub.HubPath("datasets", repository, "", "")
        return repository, hub.revision_of(storage.pinned(address.at(revision or "main")))


def _full_name(source: SourceConfig) -> str:
    """The full name of a dataset given without its owner, such as `wikitext`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().dataset_info(source.dataset).id
    except (HfHubHTTPError, HFValidationError) as error:
        raise _unknown(source) from error


@contextlib.contextmanager
def explained(source: SourceConfig, revision: str) -> Iterator[None]:
    """Converts a refusal by the Hub to a ConfigError that names the setting."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, GatedRepoError):
            raise _gated(source) from error
        if isinstance(cause, RevisionNotFoundError):
            raise ConfigError(
                f"source.revision is {revision!r}, which {source.dataset} does not have; "
                f"name a commit, tag or branch of {hub.page_of(source.dataset)}/commits"
            ) from error
        if isinstance(cause, RepositoryNotFoundError):
            raise _unknown(source) from error
        raise


def _gated(source: SourceConfig) -> ConfigError:
    return ConfigError(
        f"source.dataset is {source.dataset!r}, which is gated: accept its terms at {hub.page_of(source.dataset)}, "
        "and set HF_TOKEN to a token of that account"
    )


def _unknown(source: SourceConfig) -> ConfigError:
    hint = nearest(source.dataset, hub.similar_datasets(source.dataset))
    return ConfigError(
        f"source.dataset is {source.dataset!r}, which the Hub does not have or does not show"
        f"{hint or '; check the name'}, or set HF_TOKEN if it is private"
    )
