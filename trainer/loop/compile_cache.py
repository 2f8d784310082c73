"""Compiled kernels kept with the run, so that a machine that takes over does not compile them again.

    RUN_URL/compile-cache/<key>.bin    torch.compiler.save_cache_artifacts(): Inductor, FX graph, Triton

The key names torch, the device and the model, so that artifacts of another machine are never tried. The content is
torch's own and holds pickles: whoever can write to the bucket could run code on the nodes with it. Everything else
that we load from storage cannot, so this is off unless `train.compile_cache` is set.
"""

import hashlib
import json
import logging

import torch

from core import storage
from core.errors import LauncherError, ObjectNotFound
from core.run.folder import RunFolder
from core.settings import loader
from core.settings.training import ModelConfig

log = logging.getLogger("train")


def uri_of(run_url: str, model: ModelConfig, micro_batch_size: int, device: str) -> str:
    """Where the artifacts of this model on this kind of device are kept."""
    facts = [torch.__version__, device, micro_batch_size, loader.to_dict(model)]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return storage.join(RunFolder(run_url).compiled_kernels, f"{key}.bin")


def load(uri: str) -> bool:
    """Put stored artifacts into torch's caches. False if there are none, or if they are of no use."""
    try:
        found = torch.compiler.load_cache_artifacts(storage.read_bytes(uri))
    except ObjectNotFound:
        return False
    except LauncherError as error:
        log.warning("compiled kernels were not fetched, so they are compiled again: %s", error)
        return False
    return found is not None


def save(uri: str) -> None:
    """Store what was compiled since the start of this process; a failure costs only the next start."""
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is None:
        return
    try:
        storage.write_bytes(uri, artifacts[0])
    except LauncherError as error:
        log.warning("compiled kernels were not stored: %s", error)
