"""Put an exported folder where others find it: the Hugging Face Hub, or any URL of ours."""

import os
import re
from pathlib import Path

from core import storage
from core.errors import ConfigError, StorageError

_HUB = re.compile(r"^hf:(?!//)([\w.-]+/[\w.-]+)$")


def check(where: str) -> None:
    """Before anything is computed: raise ConfigError for an address or a key that cannot work."""
    if where.lower().startswith("hf:"):
        if not _HUB.match(where):
            raise ConfigError(f"publish: {where} is not of the form hf:OWNER/NAME")
        if not os.environ.get("HF_TOKEN"):
            raise ConfigError(f"publish: {where} needs HF_TOKEN, a token with the right to write, in the environment")
    elif where:
        check_empty(where)


def check_empty(where: str) -> None:
    """Raise ConfigError if something lies there already."""
    found = storage.list_objects(where)
    if found:
        raise ConfigError(f"{where}: holds {len(found)} objects already, such as {found[0].name}; name a new folder")


def store(folder: Path, where: str) -> None:
    """Copy a local folder to a URL, config.json last: where it is, all is there. Raises ConfigError if not empty."""
    check_empty(where)
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == "config.json")
    for path in files:
        storage.write_file(storage.join(where, path.relative_to(folder).as_posix()), path)


def publish(folder: Path, where: str, private: bool) -> str:
    """Returns the address. Raises StorageError if the Hub refuses."""
    match = _HUB.match(where)
    if not match:
        store(folder, where)
        return where
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError("publishing needs huggingface-hub: pip install huggingface-hub") from error
    api = HfApi(token=os.environ["HF_TOKEN"])
    try:
        api.create_repo(match[1], private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=match[1], folder_path=folder, commit_message="Upload by pretrain-launcher")
    except Exception as error:  # its own, the system's, and those of whichever HTTP library it uses
        raise StorageError(f"{where}: the Hub refused: {' '.join(str(error).split())[:300]}") from error
    return commit.commit_url
