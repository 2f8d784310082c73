"""trainer.optim: Muon, the schedule, and that no preset or optimizer breaks resuming on other ranks."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import numpy as safetensors

from core import storage
from core.settings.model import ModelConfig
from core.settings.training import OptimizerConfig
from tests import launching, presets
from tests.patience import PATIENCE_SECONDS
from trainer.checkpoint import layout
from trainer.checkpoint.blocks import parse_key
from trainer.model.gpt import GPT
from trainer.optim import muon
from trainer.optim.optimizer import BlockOptimizer
from trainer.optim.schedule import rate_factor


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_muon_makes_matrices_nearly_orthogonal(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = muon.orthogonalise(matrix, rounds=5)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3
    assert values.max() < 1.3
    # It is the orthogonal factor of the matrix itself: U V^T of its decomposition, up to those values.
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inner = (found * (u @ vt)).sum() / (found.norm() * (u @ vt).norm())
    assert inner > 0.97


def test_muon_moves_matrices_and_adamw_the_rest():
    model = GPT(ModelConfig(layers=1, heads=2, width=8, context=4, padded_vocab_size=32, tie_embeddings=False))
    model.initialise(1)
    optimizer = BlockOptimizer(model, OptimizerConfig(name="muon", embedding_lr=0.5, lr=0.25), rank=0, world=1)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.step(1.0)
    moved = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    # AdamW's first step is the rate itself, up to decay and eps.
    assert moved["wpe.weight"].abs().median() == pytest.approx(0.5, rel=0.02)
    assert moved["ln_f.weight"].abs().median() == pytest.approx(0.25, rel=0.02)
    assert moved["lm_head.weight"].abs().median() == pytest.approx(0.25, rel=0.02)
    # Queries, keys and values are three matrices, each nearly orthogonal at Muon's rate.
    for part in moved["h.0.attn.c_attn.weight"].split(8):
        values = torch.linalg.svdvals(part / 0.02)
        assert values.min() > 0.3
        assert values.max() < 1.3
    names = set(optimizer.layout())
    assert "momentum.h.0.mlp.c_fc.weight" in names
    assert "exp_avg.h.0.mlp.c_fc.weight" not in names
    assert "exp_avg_sq.wte.weight" in names


def test_muon_learns_faster_than_adamw_on_a_small_task():
    """A matrix of rank two out of noise-free products: both get there, Muon in fewer steps."""

    def loss_after(name: str) -> float:
        torch.manual_seed(0)
        model = GPT(ModelConfig(layers=2, heads=2, width=32, context=16, padded_vocab_size=64))
        model.initialise(1)
        config = OptimizerConfig(name=name, lr=3e-3, muon_lr=0.02, weight_decay=0.0)
        optimizer = BlockOptimizer(model, config, rank=0, world=1)
        tokens = torch.randint(0, 64, (8, 17), generator=torch.Generator().manual_seed(2))
        for _ in range(60):
            model.zero_grad(set_to_none=False)
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            optimizer.step(1.0)
        return loss.item()

    assert loss_after("muon") < loss_after("adamw") < 3.0


def test_cosine_warms_up_and_ends_at_its_floor():
    config = OptimizerConfig(warmup_steps=10, min_lr_ratio=0.1)
    factors = [rate_factor(step, 110, config) for step in range(1, 111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert factors[59] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)
    assert max(factors) == factors[9]
    assert rate_factor(1, 1, dataclasses.replace(config, warmup_steps=0)) == pytest.approx(0.1)


def test_linear_cooldown_stays_then_falls_and_the_last_step_still_moves():
    config = OptimizerConfig(warmup_steps=0, min_lr_ratio=0.0, schedule="linear", cooldown_fraction=0.25)
    factors = [rate_factor(step, 100, config) for step in range(1, 101)]
    assert factors[:75] == [1.0] * 75
    np.testing.assert_allclose(factors[75:], 1 - np.arange(1, 26) / 26, atol=1e-12)
    assert factors[-1] > 0
    assert 0 < rate_factor(1, 1, dataclasses.replace(config, cooldown_fraction=1.0)) <= 1
    floor = dataclasses.replace(config, min_lr_ratio=0.1)
    assert rate_factor(100, 100, floor) == pytest.approx(0.1 + 0.9 / 26)
    flat = dataclasses.replace(config, cooldown_fraction=0.0)
    assert [rate_factor(step, 100, flat) for step in (1, 99)] == [1.0, 1.0]


def run_ranks(ranks: int, folder, last: int, *flags: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["--local-addr=127.0.0.1", "-m", "tests.elastic_presets", str(folder), str(last), *flags]
    done = subprocess.run(command, cwd=launching.REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr


def whole_tensors(url: str, step: int) -> dict[str, bytes]:
    """Every tensor of a checkpoint, its row blocks joined: how they were cut depends on the number of ranks."""
    blocks: dict[str, list[tuple[int, bytes]]] = {}
    for file in layout.read_manifest(url, step, layout.stored(url)[step]).files:
        for key, array in safetensors.load(
            storage.read_bytes(storage.join(layout.folder_of(url, step), file.name))
        ).items():
            name, start, _ = parse_key(key)
            blocks.setdefault(name, []).append((start, array.tobytes()))
    return {name: b"".join(data for _, data in sorted(parts)) for name, parts in blocks.items()}


@pytest.mark.slow
def test_every_preset_resumes_on_other_ranks_to_the_bit(tmp_path):
    """One rank to step 6, against 2 ranks sharded and dealt, 4 ranks dealt, 1 rank sharded, two steps each."""
    run_ranks(1, tmp_path / "straight", 6)
    run_ranks(2, tmp_path / "moved", 2, "shard", "deal")
    run_ranks(4, tmp_path / "moved", 4, "deal")
    run_ranks(1, tmp_path / "moved", 6, "shard")
    for name in presets.architectures():
        expected = whole_tensors(f"{tmp_path}/straight/{name}", 6)
        found = whole_tensors(f"{tmp_path}/moved/{name}", 6)
        assert found.keys() == expected.keys()
        different = [key for key in expected if found[key] != expected[key]]
        assert not different, (name, different)
