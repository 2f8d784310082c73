"""Reads and publishes a model's folder in Hugging Face's format: local, in a bucket, or on the Hub.

    where = resolve("gpt2")            # a local folder; Hugging Face's cache keeps the download
    kind, config = read_config(where)
    tensors = read_tensors(where)
    publish(Path("exported/first"), "hf:OWNER/NAME", private=True)

The reader accepts safetensors only, because a pickle can run code.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from core import storage, untrusted, urls
from core.data.vocabulary import Vocabulary
from core.data.vocabulary import parse as parse_vocabulary
from core.data.vocabulary import read as read_vocabulary
from core.errors import CheckpointError, ConfigError, ObjectNotFound, StorageError
from trainer.weights import huggingface

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
INDEX = f"{WEIGHTS}.index.json"
MERGES = "merges.txt"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
HUB_REPOSITORY = re.compile(r"^hf:(?!//)([\w.-]+/[\w.-]+)$")
PUBLIC = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def is_public(where: str) -> bool:
    """Whether `where` is a model on the Hub: hf:OWNER/NAME[@REVISION], gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    return where in PUBLIC or where.lower().startswith("hf:")


def is_folder(where: str) -> bool:
    """Whether this URL holds a model in Hugging Face's format."""
    return storage.exists(storage.join(where, CONFIG))


def refuse_file(where: str) -> None:
    """Raises CheckpointError if `where` is a file, and for a folder whose weights are pickles."""
    path = where.rstrip("/")
    if path.lower().endswith(".safetensors"):
        raise CheckpointError(f"{where}: is a file; give its folder, with {CONFIG} and {WEIGHTS}")
    pickled = path if path.lower().endswith(PICKLES) else ""
    if not pickled and not is_public(where) and not is_folder(where):
        names = storage.list_names(where)
        found = [name for name in names if name.lower().endswith(PICKLES)]
        pickled = storage.join(path, found[0]) if found and "checkpoints" not in names else ""
    if pickled:
        raise CheckpointError(
            f"{pickled}: is a pickle, which can run code and is not loaded; let the program that wrote it store "
            f"a folder with {CONFIG} and {WEIGHTS}, as transformers does: model.save_pretrained(FOLDER)"
        )


def resolve(where: str) -> str:
    """The local folder of a public model, downloaded on first use. Any other URL is returned unchanged.

    Raises ConfigError for a malformed name, StorageError if the download fails.
    """
    if not is_public(where):
        return where.rstrip("/")
    match = urls.HUB_MODEL.match(f"hf:{PUBLIC[where]}" if where in PUBLIC else where)
    if not match:
        raise ConfigError(f"{where}: not of the form hf:OWNER/NAME[@REVISION]")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise ConfigError(f"{where}: needs huggingface-hub; run `pip install huggingface-hub`") from error
    try:
        return snapshot_download(
            match["name"],
            revision=match["revision"],
            allow_patterns=[CONFIG, "model*.safetensors", INDEX, MERGES, "vocab.json", TOKENIZER, TOKENIZER_CONFIG],
        )
    except errors.LocalEntryNotFoundError as error:
        raise StorageError(
            f"{where}: the Hub cannot be reached, and it was not downloaded before; connect once, or name a folder"
        ) from error
    except Exception as error:  # the library raises errors of its HTTP client and of the system, too
        raise StorageError(f"{where}: cannot be downloaded: {' '.join(str(error).split())[:300]}") from error


def read_config(folder: str) -> tuple[str, huggingface.ModelConfig]:
    """The model_type and the settings of the model. Raises CheckpointError."""
    uri = storage.join(folder, CONFIG)
    document = _json(uri)
    return str(document.get("model_type")), huggingface.config_of(document, uri)


def read_tensors(folder: str) -> dict[str, torch.Tensor]:
    """All tensors by their stored names. Raises CheckpointError for a missing or truncated file."""
    import safetensors.torch  # imported here because training does not need it

    try:
        index = _json(storage.join(folder, INDEX)) if storage.exists(storage.join(folder, INDEX)) else None
        names = sorted(set(index["weight_map"].values())) if index else [WEIGHTS]
        if not all(untrusted.mistake_in_name(name) is None and name.endswith(".safetensors") for name in names):
            raise ValueError("a name that is not a safetensors file of the folder")
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {INDEX} is not an index of weights; copy the model again") from error
    tensors = {}
    for name in names:
        uri = storage.join(folder, name)
        try:
            tensors |= safetensors.torch.load(storage.read_bytes(uri, untrusted.memory_bytes()))
        except ObjectNotFound as error:
            pickled = storage.exists(storage.join(folder, "pytorch_model.bin"))
            why = "; its pytorch_model.bin is a pickle, which is not loaded: convert it to safetensors" * pickled
            raise CheckpointError(f"{uri}: not found{why or '; copy the model again'}") from error
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{uri}: cut off or damaged ({error}); copy or download it again") from error
    return tensors


def vocabulary_of(folder: str) -> Vocabulary:
    """Reads GPT-2's byte pairs from merges.txt or tokenizer.json.

    Raises ObjectNotFound if neither exists, DataError for the byte pairs of another vocabulary.
    """
    merges = storage.join(folder, MERGES)
    if storage.exists(merges):
        return read_vocabulary(merges)
    uri = storage.join(folder, TOKENIZER)
    try:
        document = untrusted.read_json(uri)
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
        merges_file = "\n".join(["#version: 0.2", *pairs]).encode()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{uri}: holds no byte pairs; GPT-2's tokenizer is needed") from error
    return parse_vocabulary(merges_file, uri)


def chat_template_of(folder: str) -> str:
    """The chat template (Jinja) of the model's tokenizer. It is empty if the tokenizer has none."""
    uri = storage.join(folder, TOKENIZER_CONFIG)
    template = _json(uri).get("chat_template") if storage.exists(uri) else None
    return template if isinstance(template, str) else ""


def _json(uri: str) -> dict[str, Any]:
    try:
        return untrusted.read_object(uri)
    except ObjectNotFound as error:
        raise CheckpointError(f"{uri}: not found; copy the model again") from error
    except ValueError as error:
        raise CheckpointError(f"{uri}: not valid JSON ({error}); copy the model again") from error


# --- publishing ------------------------------------------------------------------------------------------------


def check_publishable(where: str) -> None:
    """Called before any computation. Raises ConfigError for an address or a key that cannot work."""
    if where.lower().startswith("hf:"):
        if not HUB_REPOSITORY.match(where):
            raise ConfigError(f"publish: {where} is not of the form hf:OWNER/NAME")
        if not os.environ.get("HF_TOKEN"):
            raise ConfigError(f"publish: {where} needs HF_TOKEN, a token with the right to write, in the environment")
    elif where:
        check_empty(where)


def check_empty(where: str) -> None:
    """Raises ConfigError if `where` holds objects."""
    found = storage.list_objects(where)
    if found:
        raise ConfigError(f"{where}: holds {len(found)} objects already, such as {found[0].name}; name a new folder")


def store(folder: Path, where: str, resumes: bool = False) -> None:
    """Copies a local folder to a URL. If `resumes` is false, raises ConfigError if the URL holds objects.

    config.json is written last, so a reader that finds config.json also finds all other files.
    """
    if not resumes:
        check_empty(where)
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name == CONFIG)
    for path in files:
        storage.write_file(storage.join(where, path.relative_to(folder).as_posix()), path)


def publish(folder: Path, where: str, private: bool) -> str:
    """Stores a local folder on the Hub (hf:OWNER/NAME) or at a URL. Returns its address.

    Raises StorageError if the Hub refuses.
    """
    match = HUB_REPOSITORY.match(where)
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
    except Exception as error:  # the library raises errors of its HTTP client and of the system, too
        raise StorageError(f"{where}: the Hub refused: {' '.join(str(error).split())[:300]}") from error
    return commit.commit_url
