"""A few steps of every small preset on the ranks that torchrun gives, from the newest checkpoint to a last step.

    torchrun --nproc-per-node=2 -m tests.elastic_presets FOLDER LAST_STEP [shard] [deal]

Writes FOLDER/<preset>/checkpoints, as training does. Run by tests/test_optim.py.
"""

import dataclasses
import sys

import torch
from torch.nn.parallel import DistributedDataParallel

from core.settings.training import CheckpointConfig, OptimizerConfig
from tests import presets
from trainer.checkpoint.load import load_newest
from trainer.checkpoint.save import Saver
from trainer.data.order import micro_batch_numbers
from trainer.distributed import process_group
from trainer.model.gpt import GPT
from trainer.optim.optimizer import BlockOptimizer
from trainer.optim.reduce import TreeReducer
from trainer.optim.schedule import rate_factor

MICRO_BATCHES = 24  # two ranks have four turns of three each
STEPS = 8


def optimizer_of(name: str) -> OptimizerConfig:
    found = presets.pretraining()
    config = found[name].optimizer if name in found else OptimizerConfig(name="muon")
    return dataclasses.replace(config, warmup_steps=2)


def main(folder: str, last: int, shard: bool, deal: bool) -> None:
    torch.set_num_threads(1)
    ranks = process_group.start("cpu")
    for number, (name, architecture) in enumerate(presets.architectures().items()):
        model = GPT(architecture)
        config = dataclasses.replace(optimizer_of(name), zero=int(shard))
        optimizer = BlockOptimizer(model, config, ranks.rank, ranks.world)
        url = f"{folder}/{name}"
        restored = load_newest(url, optimizer, ranks)
        first = restored.step if restored else 0
        optimizer.set_step(first)
        if not restored:
            model.initialise(1)
        # Ranks tell each other of their uploads by segment and step, so each of these needs a segment of its own.
        saver = Saver(url, 100 * last + number, ranks, CheckpointConfig(), None, lambda: True, optimizer.blocks)
        accumulation = MICRO_BATCHES // ranks.world
        ddp = DistributedDataParallel(model.train(), gradient_as_bucket_view=True)
        reducer = TreeReducer(ddp, accumulation, round_robin=deal)
        numbers = micro_batch_numbers(ranks.rank, ranks.world, accumulation, deal)
        some = torch.zeros(2, architecture.context, dtype=torch.int32)
        reducer.settle(lambda ddp=ddp, some=some: ddp(some, some))
        for step in range(first + 1, last + 1):
            reducer.reset()
            for index, each in enumerate(numbers):
                torch.manual_seed(step * MICRO_BATCHES + each)  # of the tokens, and of dropout
                tokens = torch.randint(0, 64, (2, architecture.context + 1))
                with reducer.context(index):
                    (ddp(tokens[:, :-1], tokens[:, 1:]) / MICRO_BATCHES).backward()
                reducer.micro_batch_done(index)
            optimizer.step(rate_factor(step, STEPS, config))
        saver.begin(last, {"step": last})
        saver.finish(last)
    process_group.stop()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "shard" in sys.argv[3:], "deal" in sys.argv[3:])
