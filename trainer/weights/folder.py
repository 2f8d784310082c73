"""Read a model's folder in Hugging Face's form: local, in a bucket, or a public name.

    where = resolve("gpt2")            # a local folder, downloaded once into Hugging Face's own cache
    kind, config = read_config(where)
    tensors = read_tensors(where)

Only safetensors are read: a pickle may run code.
"""

import json
from typing import Any

import torch

from core import storage, urls
from core.data.vocabulary import Vocabulary
from core.data.vocabulary import parse as parse_vocabulary
from core.data.vocabulary import read as read_vocabulary
from core.errors import CheckpointError, ConfigError, ObjectNotFound, StorageError
from trainer.weights import huggingface

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MERGES = "merges.txt"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
PUBLIC = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}


def is_public(where: str) -> bool:
    """Whether this names a model on the Hub: hf:OWNER/NAME[@REVISION], or gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
    return where in PUBLIC or where.lower().startswith("hf:")


def is_folder(where: str) -> bool:
    """Whether a model in Hugging Face's form lies at this URL."""
    return storage.exists(storage.join(where, CONFIG))


def resolve(where: str) -> str:
    """The folder of a public model, downloaded if need be; any other URL as it is. Raises StorageError, ConfigError."""
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
            f"{where}: the Hub cannot be reached, and it was not downloaded before; go online once, or name a folder"
        ) from error
    except Exception as error:  # its own, the system's, and those of whichever HTTP library it uses
        raise StorageError(f"{where}: cannot be downloaded: {' '.join(str(error).split())[:300]}") from error


def read_config(folder: str) -> tuple[str, huggingface.ModelConfig]:
    """What kind of model, and its choices. Raises CheckpointError."""
    uri = storage.join(folder, CONFIG)
    document = _json(uri)
    return str(document.get("model_type")), huggingface.config_of(document, uri)


def read_tensors(folder: str) -> dict[str, torch.Tensor]:
    """All tensors under their stored names. Raises CheckpointError for a file that is missing or cut off."""
    import safetensors.torch  # here, so that training starts without it

    try:
        index = _json(storage.join(folder, INDEX)) if storage.exists(storage.join(folder, INDEX)) else None
        names = sorted(set(index["weight_map"].values())) if index else [WEIGHTS]
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{storage.join(folder, INDEX)}: is no index of weights; copy the model again") from error
    tensors = {}
    for name in names:
        uri = storage.join(folder, name)
        try:
            tensors |= safetensors.torch.load(storage.read_bytes(uri))
        except ObjectNotFound as error:
            pickled = storage.exists(storage.join(folder, "pytorch_model.bin"))
            why = "; its pytorch_model.bin is a pickle, which is not loaded: convert it to safetensors" * pickled
            raise CheckpointError(f"{uri}: is not there{why or '; copy the model again'}") from error
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{uri}: cut off or damaged ({error}); copy or download it again") from error
    return tensors


def vocabulary_of(folder: str) -> Vocabulary:
    """GPT-2's byte pairs out of merges.txt or tokenizer.json. Raises ObjectNotFound, DataError if they are others."""
    merges = storage.join(folder, MERGES)
    if storage.exists(merges):
        return read_vocabulary(merges)
    uri = storage.join(folder, TOKENIZER)
    document = json.loads(storage.read_bytes(uri))
    try:
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{uri}: holds no byte pairs; GPT-2's tokenizer is needed") from error
    return parse_vocabulary("\n".join(["#version: 0.2", *pairs]).encode(), uri)


def turn_template_of(folder: str) -> str:
    """The turn template that the model was tuned on, in `transformers`' language; empty for none."""
    uri = storage.join(folder, TOKENIZER_CONFIG)
    template = _json(uri).get("chat_template") if storage.exists(uri) else None
    return template if isinstance(template, str) else ""


def _json(uri: str) -> dict[str, Any]:
    try:
        document = json.loads(storage.read_bytes(uri))
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
        return document
    except ObjectNotFound as error:
        raise CheckpointError(f"{uri}: is not there; copy the model again") from error
    except ValueError as error:
        raise CheckpointError(f"{uri}: not valid JSON ({error}); copy the model again") from error
