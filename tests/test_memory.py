"""core.settings.model's estimate of activations, against what training really keeps (tests/activations.py)."""

import pytest

from core.settings.model import ModelConfig, activation_bytes
from tests import activations, presets
from tests.rare import fast_only

PRESETS = presets.pretraining()
# Each has a choice, or a combination of choices, that the ones before have not.
DIFFERENT = {
    "gpt2-163m-untied": PRESETS["gpt2-163m-untied"].model,
    "gpt2-270m": PRESETS["gpt2-270m"].model,
    "llama-416m": PRESETS["llama-416m"].model,
    "speedrun-162m": PRESETS["speedrun-162m"].model,
    "skips": ModelConfig(embedding_skip=True, value_skip=True),
}
CLOSE = 0.05


def measured(config: ModelConfig, sequences: int, recompute: bool, residual: str = "fp32") -> int:
    block = activations.of_compiled_block(config, sequences, residual).activations
    around, kept_block = activations.around_blocks(config, sequences, recompute, residual)
    # The backward pass of one block needs all of it, while the others have only what `recompute` leaves.
    return around + (kept_block * (config.layers - 1) + block if recompute else block * config.layers)


def check(config: ModelConfig, sequences: int) -> None:
    for recompute in (False, True):
        expected = pytest.approx(measured(config, sequences, recompute), rel=CLOSE)
        assert activation_bytes(config, sequences, recompute) == expected, f"recompute={recompute}"


@pytest.mark.parametrize("name", fast_only(DIFFERENT, {"gpt2-270m", "speedrun-162m"}))
def test_activations_are_what_compiled_blocks_and_the_rest_keep(name: str):
    check(DIFFERENT[name], sequences=2)


@pytest.mark.parametrize("name", fast_only(["gpt2-124m", "speedrun-162m"], {"gpt2-124m"}))
def test_a_residual_stream_in_bf16_keeps_less(name: str):
    config = PRESETS[name].model
    for recompute in (False, True):
        found = activation_bytes(config, 2, recompute, residual_bytes=2)
        assert found == pytest.approx(measured(config, 2, recompute, "bf16"), rel=CLOSE), f"recompute={recompute}"
        assert found < activation_bytes(config, 2, recompute)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_activations_of_every_preset_and_micro_batch(name: str):
    for sequences in (1, PRESETS[name].batch.micro_batch_size):
        check(PRESETS[name].model, sequences)


def test_compiled_blocks_keep_their_weights_in_bfloat16():
    """As core.settings.model.training_bytes counts them."""
    config = PRESETS["gpt2-124m"].model
    matrices = 12 * config.width**2
    assert activations.of_compiled_block(config, 2).weight_copies == 2 * matrices
