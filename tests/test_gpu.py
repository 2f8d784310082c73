"""The trainer on a real GPU. TEST_DEVICE=cpu rehearses it where there is none; TEST_DATA names a prepared token set."""

import dataclasses
import importlib.util
import os

import pytest
import torch

from bench import tokens
from bench.gpu import equivalence, resume
from core.settings.model import ModelConfig
from tests import launching, presets
from trainer.model.gpt import GPT
from trainer.model.precision import autocast

pytestmark = pytest.mark.gpu

STEPS = 24
WITHOUT_TOKENIZER = ("--train.hellaswag_items=0", "--train.sample_prompts=")


def sized(model: ModelConfig) -> ModelConfig:
    """Two layers, with the head size that the presets have and the kernels are made for."""
    wide = {"layers": 2, "heads": 4, "width": 256, "context": 256, "padded_vocab_size": 50304}
    return dataclasses.replace(model, **wide, mlp_width=384 if model.mlp_width else 0, dropout=0.0)


ARCHITECTURES = {name: sized(model) for name, model in presets.architectures().items()}


@pytest.fixture(scope="module")
def device() -> torch.device:
    kind = os.environ.get("TEST_DEVICE", "cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device(kind)


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    if ready := os.environ.get("TEST_DATA"):
        return ready
    folder = str(tmp_path_factory.mktemp("data"))
    tokens.make(folder, 1 << 20)
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_compiled_blocks_compute_what_the_plain_model_does(name: str, device: torch.device):
    tokens_BT = equivalence.tokens_of(ARCHITECTURES[name], device)
    plain, fused = (equivalence.one_pass(ARCHITECTURES[name], tokens_BT, is_compiled=each) for each in (False, True))
    found = equivalence.difference(fused, plain)
    assert found.is_small, found


def test_logits_of_the_whole_vocabulary_never_exist(device: torch.device):
    if device.type != "cuda":
        pytest.skip("only CUDA tells the peak of its memory")
    config = ARCHITECTURES["gpt2-124m"]
    tokens_BT = equivalence.tokens_of(config, device, sequences=128)
    model = GPT(config)
    model.initialise(1)
    model.to(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with autocast(device):
        model(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()
    logits_bytes = 4 * 128 * config.context * config.padded_vocab_size
    assert torch.cuda.max_memory_allocated() - before < logits_bytes / 2


def flags_of(data_url: str, run_url: str, device: torch.device, *more: str) -> list[str]:
    flags = [f"--data.url={data_url}", f"--run.url={run_url}", f"--train.device={device.type}"]
    return [*flags, f"--train.steps={STEPS}", "--checkpoint.every_steps=3", *WITHOUT_TOKENIZER, *more]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_killed_and_resumed_equals_uninterrupted_to_the_bit(name: str, data_url: str, device: torch.device, tmp_path):
    flags = [
        f"--data.url={data_url}",
        f"--train.device={device.type}",
        "--checkpoint.every_steps=3",
        *WITHOUT_TOKENIZER,
    ]
    # A step takes a GPU a few milliseconds: enough of them for a kill between two checkpoints.
    steps = 400 if device.type == "cuda" else STEPS
    runs = resume.Runs(tmp_path, steps, [*launching.TINY, *flags, f"--optimizer.name={name}"])
    with runs.beside("straight"):
        for share in (4, 2):
            assert runs.kill("killed", after=steps // share) < steps
        runs.train("killed")
    assert runs.differences() == []


def test_the_largest_micro_batch_is_tried_out_and_kept(data_url: str, device: torch.device, tmp_path):
    run_url = f"{tmp_path}/run"
    flags = flags_of(data_url, run_url, device, "--batch.micro_batch_size=0")
    process = launching.start(1, *flags)
    launching.wait_until(lambda: bool(launching.completed(run_url)), process)
    process.terminate()
    assert "16 sequences fit" in launching.finish(process)[1]
    output = launching.train(1, *flags)
    assert "sequences fit" not in output
    assert "512 tokens = 16 sequences x 32 tokens x 1 micro-batch x" in output


def test_one_batch_is_learned_by_heart(data_url: str, device: torch.device, tmp_path):
    run_url = f"{tmp_path}/run"
    flags = flags_of(data_url, run_url, device, "--overfit", "--batch.tokens_per_step=64", "--train.steps=150")
    launching.train(1, *flags, "--checkpoint.every_steps=1000")
    found = launching.metrics(run_url)
    assert found[max(found)]["loss"] < 0.1


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")
def test_fp8_trains_as_bf16_does(data_url: str, device: torch.device, tmp_path):
    if device.type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no fp8")
    wide = ("--model.width=256", "--model.heads=4", "--model.context=128", "--batch.tokens_per_step=2048")
    losses = []
    for precision in ("bf16", "fp8"):
        run_url = f"{tmp_path}/{precision}"
        launching.train(1, *flags_of(data_url, run_url, device, *wide, f"--train.precision={precision}"))
        losses.append(launching.metrics(run_url)[STEPS]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=0.1)
