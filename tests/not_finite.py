"""Takes steps of the trainer's loop in which one number is not finite, on each rank that torchrun gives.

    torchrun --nproc-per-node=2 -m tests.not_finite

Prints, per case and rank, a line of JSON: the steps that changed weights or the optimizer's state, the error, and the
steps that were reported. Run by tests/test_step.py.
"""

import json
import os
import sys
from unittest import mock

import torch

from bench.gpu import presets
from bench.step_counts import make_loop, take_step
from core.errors import TrainingError
from trainer.distributed import process_group
from trainer.distributed.process_group import PeerFailed, Ranks
from trainer.loop import loop as loops

STEPS, BAD = 5, 3
# What is not finite, on which rank, with which optimizer.
CASES = [
    ("none", 0, "adamw"),
    ("loss", 1, "adamw"),
    ("loss", 0, "muon"),
    ("gradient", 1, "muon"),
    ("norm", 1, "adamw"),
    ("norm", 0, "muon"),
]
FLAGS = ["--model.layers=1", "--model.heads=2", "--model.width=16", "--model.context=8", "--model.padded_vocab_size=64"]
FLAGS += ["--batch.micro_batch_size=1", "--batch.tokens_per_step=32", "--train.norms_every=0", "--train.steps=9"]
FLAGS += ["--optimizer.warmup_steps=0"]


def main() -> None:
    torch.set_num_threads(1)
    ranks = process_group.start("cpu")
    for case in CASES:
        line = json.dumps({"case": case, "rank": ranks.rank, **outcome(*case, ranks)})
        os.write(sys.stdout.fileno(), f"{line}\n".encode())  # in one call: both ranks share the pipe
    process_group.stop()


def outcome(kind: str, where: int, optimizer: str, ranks: Ranks) -> dict:
    preset = "gpt2-124m" if optimizer == "adamw" else "speedrun-162m"
    settings = presets.settings_of(preset, *FLAGS, f"--optimizer.zero={int(where == 0)}")
    loop = make_loop(settings, ranks)
    reported: list[int] = []
    loop.reporter.step = lambda step, *_: reported.append(step)
    changed, error = [], ""
    generator = torch.Generator().manual_seed(ranks.rank)
    now = {"step": 0}
    with inject(kind, lambda: now["step"] == BAD and ranks.rank == where):
        try:
            for step in range(1, STEPS + 1):
                now["step"] = step
                before = bits(loop)
                tokens = [torch.randint(0, 64, (1, 9), generator=generator) for _ in range(loop.accumulation)]
                try:
                    take_step(loop, step, tokens)  # launches this one, then reads the one before
                finally:
                    changed += [step] * (bits(loop) != before)
        except TrainingError as problem:
            error = str(problem)
        except PeerFailed:
            error = "another rank says it"
    return {"changed": changed, "error": error, "reported": reported}


def inject(kind: str, is_now):
    """Patch the step so that a number of this rank is not finite when `is_now()`."""
    loss_of, clip = loops.Loop._loss, loops.clip

    def bad_loss(loop, batch):
        loss = loss_of(loop, batch)
        return loss + torch.inf if is_now() else loss  # its gradient stays finite

    def bad_gradient(parameters, largest):
        if is_now():
            parameters[0].grad.view(-1)[3] = torch.nan
        return clip(parameters, largest)

    def bad_norm(parameters, largest):
        norm = clip(parameters, largest)
        return norm * torch.nan if is_now() else norm

    if kind == "loss":
        return mock.patch.object(loops.Loop, "_loss", bad_loss)
    return mock.patch.object(loops, "clip", {"gradient": bad_gradient, "norm": bad_norm, "none": clip}[kind])


def bits(loop) -> bytes:
    """Every bit of the weights and of this rank's optimizer state."""
    tensors = [*loop.model.parameters(), *(tensor for _, tensor in loop.optimizer.blocks())]
    return b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)


if __name__ == "__main__":
    sys.exit(main())
