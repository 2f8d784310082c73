"""The first checkpoint of a run, out of weights that are there already: step 0, with a fresh optimizer."""

from typing import Any

import torch

from core import storage
from core.errors import RunError
from core.settings import loader
from core.settings.training import PretrainConfig
from trainer.checkpoint import layout
from trainer.checkpoint.blocks import StagedFile
from trainer.checkpoint.layout import CheckpointManifest, PayloadFile
from trainer.model.gpt import GPT
from trainer.optim.optimizer import BlockOptimizer

SEGMENT = 0  # none has begun yet


def write_first_checkpoint(settings: PretrainConfig, model: GPT, origin: str, data_fingerprint: str) -> str:
    """Store it, as a run of these settings would have. Returns its folder. Raises RunError if the run has objects."""
    run_url = settings.run.url
    if storage.list_objects(run_url):
        raise RunError(f"{run_url}: there is something already; give the import a run.url of its own")
    optimizer = BlockOptimizer(model, settings.optimizer, 0, 1)
    staged = StagedFile(optimizer.blocks())
    staged.fill(optimizer.blocks())
    name = layout.payload_name(SEGMENT, 0, 1)
    storage.write_bytes(storage.join(layout.folder_of(run_url, 0), name), staged.data)
    state: dict[str, Any] = {
        "step": 0,
        "tokens": 0,
        "rng": {"rule": "seeded per micro-batch from (train.seed, step, index)", "seed": settings.train.seed},
        "config": loader.to_dict(settings),
        "data_fingerprint": data_fingerprint,
        "torch": torch.__version__,
        "origin": origin,
    }
    file = PayloadFile(name, len(staged.data), layout.checksum(staged.data))
    layout.write_marker(run_url, CheckpointManifest(0, SEGMENT, (file,), state))
    return layout.folder_of(run_url, 0)
