"""trainer.stages.sizing: what fits, and what to do when it does not."""

import dataclasses

import pytest
import torch

from core.errors import ConfigError
from core.settings.model import training_bytes
from tests import presets
from trainer.distributed.process_group import Ranks
from trainer.stages import sizing

PRESETS = presets.pretraining()


def ranks(world: int = 1) -> Ranks:
    return Ranks(0, world, 0, world, torch.device("cpu"), None, None)


def test_sizes_divide_the_batch_over_the_ranks():
    settings = PRESETS["gpt2-124m"]
    assert sizing.possible(settings, settings.model, 8) == [64, 32, 16, 8, 4, 2, 1]
    assert sizing.possible(settings, settings.model, 8)[0] * 1024 * 8 == settings.batch.tokens_per_step
    odd = dataclasses.replace(settings, batch=dataclasses.replace(settings.batch, tokens_per_step=96 * 1024))
    assert sizing.possible(odd, odd.model, 3) == [32, 16, 8, 4, 2, 1]
    with pytest.raises(
        ConfigError, match=r"batch.tokens_per_step = 524288 is 512 sequences of 1024, which do not divide over 7"
    ):
        sizing.possible(settings, settings.model, 7)


def test_a_preset_that_does_not_fit_is_told_what_does():
    settings = PRESETS["gpt2-1.5b"]
    plain = dataclasses.replace(
        settings,
        optimizer=dataclasses.replace(settings.optimizer, zero=0),
        train=dataclasses.replace(settings.train, activation_checkpointing=False),
    )
    assert sizing.estimate(plain, plain.model, 8, 8) > 40e9
    for memory in (80e9, 40e9):  # A100s
        advice = sizing.advice(plain, plain.model, 8, memory)
        assert advice.startswith("try --batch.micro_batch_size=")
        flags = [flag.removeprefix("--").split("=") for flag in advice.split()[1:]]
        tuned = plain
        for key, value in flags[1:]:
            section, name = key.split(".")
            changed = dataclasses.replace(
                getattr(tuned, section), **{name: int(value) if name == "zero" else value == "true"}
            )
            tuned = dataclasses.replace(tuned, **{section: changed})
        assert sizing.estimate(tuned, tuned.model, int(flags[0][1]), 8) <= memory
    assert "no setting of this preset fits" in sizing.advice(plain, plain.model, 8, 10e9)


def test_the_largest_that_fits_is_taken_and_kept(monkeypatch):
    settings = PRESETS["debug"]
    asked = dataclasses.replace(settings, batch=dataclasses.replace(settings.batch, micro_batch_size=0))
    room = sizing.estimate(asked, asked.model, 4, 1)
    monkeypatch.setattr(sizing, "_memory_bytes", lambda _: room)
    assert sizing.with_micro_batch(asked, asked.model, None, ranks()).batch.micro_batch_size == 4
    # A later segment takes what the first one found, whatever its own memory.
    assert sizing.with_micro_batch(asked, asked.model, 16, ranks()).batch.micro_batch_size == 16
    monkeypatch.setattr(sizing, "_memory_bytes", lambda _: 1e6)
    with pytest.raises(
        ConfigError, match=r"batch.micro_batch_size = 1 needs about .* GB per rank, this machine has 0.0 GB"
    ):
        sizing.with_micro_batch(asked, asked.model, None, ranks())


def test_estimate_grows_with_what_needs_memory():
    model = PRESETS["gpt2-124m"].model

    def needed(sequences=8, accumulation=1, world=8, zero=0, muon=False, recompute=False) -> float:
        return training_bytes(model, sequences, accumulation, world, zero=zero, muon=muon, recompute=recompute)

    assert needed(16) > needed(8)
    assert needed(accumulation=4) > needed(accumulation=2) > needed(accumulation=1) == needed(accumulation=3)
    assert needed(accumulation=4, zero=2) < needed(accumulation=4, zero=1)
    assert needed(recompute=True) < needed()
    assert needed(muon=True) < needed()
    assert needed(zero=1, world=8) < needed(zero=1, world=2)
