"""A training step: what the host waits for, what changes weights, how many operations it takes, and their results."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import presets as bench_presets
from bench.step_counts import count_steps
from core.settings.loader import SettingError, identity
from core.settings.model import ModelConfig
from core.settings.training import OptimizerConfig, PretrainConfig, TrainLoopConfig
from tests import launching, not_finite
from trainer.checkpoint.blocks import assign_blocks
from trainer.loop.numbers import Gate, StepNumbers
from trainer.model import kernels, loss
from trainer.model.gpt import GPT
from trainer.optim import muon
from trainer.optim.optimizer import BlockOptimizer

TINY = ModelConfig(layers=2, heads=2, width=16, context=8, padded_vocab_size=64)


# --- no number that is not finite reaches a weight ------------------------------------------------------------------


def test_no_weight_changes_on_a_number_that_is_not_finite_on_any_rank():
    """In a loss, a gradient after the reduction, or a norm of one rank: no rank's weights or state change, also not by
    the step that was launched behind it."""
    code, output = launching.finish(launching.start(2, module="tests.not_finite", base=()))
    assert code == 0, output
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(found) == 2 * len(not_finite.CASES)
    for each in found:
        kind, where, _ = each["case"]
        if kind == "none":
            assert (each["changed"], each["error"], each["reported"]) == ([1, 2, 3, 4, 5], "", [1, 2, 3, 4])
            continue
        assert each["changed"] == [1, 2], each
        assert each["reported"] == [1, 2], each
        if each["rank"]:
            assert each["error"] == "another rank says it"
            continue
        number = f"loss on rank {where} is inf" if kind == "loss" else f"gradient norm on rank {where} is nan"
        assert each["error"].startswith(f"step 3: the {number}; the weights were not changed. Start again to retry")
        assert "--train.skip_steps=3" in each["error"]


def test_the_gate_closes_for_good():
    gate = Gate(torch.device("cpu"))
    assert gate.check(torch.tensor([[1e38, -3e38], [0.0, 1.0]])) == 0
    assert gate.check(torch.tensor([[1.0, math.inf]])) == 1
    assert gate.check(torch.tensor([[1.0, 2.0]])) == 1
    assert Gate(torch.device("cpu")).check(torch.tensor([math.nan])) == 1


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], ""),
        ([[1.0, 2.0, math.nan], [1.0, -math.inf, math.nan]], "the loss on rank 1 is -inf"),
        ([[1.0, 2.0, math.inf], [1.0, 2.0, math.inf]], "the gradient norm is inf"),
        ([[1.0, 2.0, 3.0], [1.0, 2.0, math.nan]], "the gradient norm on rank 1 is nan"),
    ],
)
def test_the_number_and_its_rank_are_named(numbers: list[list[float]], problem: str):
    assert StepNumbers(7, 1.0, torch.tensor(numbers), None, None, None, None).problem() == problem


# --- what the host waits for, and how much is launched --------------------------------------------------------------


def settings_of(preset: str, layers: int, world: int, *flags: str) -> PretrainConfig:
    small = [f"--model.layers={layers}", "--model.heads=2", "--model.width=16", "--model.context=8"]
    tokens = [f"--batch.tokens_per_step={16 * world}", "--batch.micro_batch_size=1", "--train.norms_every=3"]
    return bench_presets.settings_of(preset, *small, *tokens, *flags)


@pytest.mark.parametrize(
    ("preset", "world"),
    [
        ("gpt2-124m", 1),
        ("speedrun-162m", 8),
        pytest.param("gpt2-124m", 8, marks=pytest.mark.slow),
        pytest.param("speedrun-162m", 1, marks=pytest.mark.slow),
    ],
)
def test_a_step_waits_for_nothing_and_its_launches_follow_from_shapes(preset: str, world: int):
    """Eight and sixteen layers: as many operations of the optimizer. The third step, which is counted, has norms."""
    few, many = (count_steps(settings_of(preset, layers, world), world) for layers in (8, 16))
    for each in (few, many):
        assert each["reads"] == each["optimizer_reads"] == 0
        assert each["late_reads"] == 1
        assert each["gathers_between_steps"] == (world > 1)
    assert many["parameters"] > 1.9 * few["parameters"] - 10
    assert many["optimizer_operations"] == few["optimizer_operations"]
    shapes = 3 if preset == "speedrun-162m" else 0
    assert few["optimizer_operations"] <= 12 + shapes * muon.BATCHES * 32


def test_matrices_of_a_batch_have_one_owner_on_any_number_of_ranks():
    shapes = {(f"h.{layer}.w", start): torch.Size((4, 4)) for layer in range(10) for start in (0, 4, 8)}
    shapes |= {(f"h.{layer}.v", 0): torch.Size((16, 4)) for layer in range(3)}
    batches = muon.batches(shapes)
    assert sorted(each for batch in batches for each in batch) == sorted(shapes)
    assert all(len({shapes[each] for each in batch}) == 1 for batch in batches)
    assert [len(batch) for batch in batches] == [1, 1, 1] + [4] * 7 + [2]
    parameters = {f"h.{layer}.w": (12, 4) for layer in range(10)} | {f"h.{layer}.v": (16, 4) for layer in range(3)}
    rows = {name: 4 if name.endswith("w") else 16 for name in parameters}
    for world in (1, 2, 5, 8):
        owners = {
            (each.name, each.start): each.owner
            for each in assign_blocks(parameters, world, rows_of=rows, together=batches)
        }
        assert owners.keys() == shapes.keys()
        assert all(len({owners[each] for each in batch}) == 1 for batch in batches)


# --- results --------------------------------------------------------------------------------------------------------


def with_gradients(config: OptimizerConfig) -> tuple[GPT, BlockOptimizer, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model = GPT(TINY)
    model.initialise(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return model, BlockOptimizer(model, config, rank=0, world=1), before


def test_adamw_is_torch_s_and_close_to_float64():
    config = OptimizerConfig(lr=1e-2)
    model, optimizer, before = with_gradients(config)
    sides = {}
    for dtype in (torch.float32, torch.float64):
        copies = {name: torch.nn.Parameter(each.to(dtype, copy=True)) for name, each in before.items()}
        groups = [
            {"params": [each for each in copies.values() if each.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [each for each in copies.values() if each.dim() < 2], "weight_decay": 0.0},
        ]
        theirs = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
        for _ in range(20):
            for name, parameter in model.named_parameters():
                copies[name].grad = parameter.grad.to(dtype)
            theirs.step()
        sides[dtype] = copies
    for _ in range(20):
        optimizer.step(1.0)
    for name, parameter in model.named_parameters():
        exact = sides[torch.float64][name]
        # Twenty steps of rounding a number near one, and each side no further from the exact result than that.
        bound = 20 * 2**-23 * exact.abs().clamp(min=1.0)
        assert ((parameter.detach() - exact).abs() <= bound).all(), name
        assert ((sides[torch.float32][name].detach() - exact).abs() <= bound).all(), name


def test_muon_in_batches_is_the_update_of_each_matrix_and_close_to_float64():
    config = OptimizerConfig(name="muon", muon_weight_decay=0.1)
    model, optimizer, before = with_gradients(config)
    optimizer.step(0.5)
    rate = 0.5 * config.muon_lr
    for name, rows in (("h.0.attn.c_attn.weight", 16), ("h.1.mlp.c_fc.weight", 64), ("h.1.mlp.c_proj.weight", 16)):
        gradient, weight = model.get_parameter(name).grad, before[name]
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            exact = gradient[part].double()
            momentum = (1 - config.muon_momentum) * exact
            direction = newton_schulz(exact.lerp(momentum, config.muon_momentum), config.muon_ns_steps)
            scale = max(1.0, rows / weight.shape[1]) ** 0.5
            expected = weight[part].double() * (1 - rate * config.muon_weight_decay) - rate * scale * direction
            found = model.get_parameter(name)[part].detach()
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def newton_schulz(matrix: torch.Tensor, rounds: int) -> torch.Tensor:
    """One matrix in float64, as Jordan et al. write it."""
    x = matrix / matrix.norm()
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.slow  # Inductor takes half a minute
def test_compiled_muon_is_the_plain_one():
    generator = torch.Generator().manual_seed(1)
    sides = []
    for fused in (False, True):
        weights = [torch.ones(8, 24) for _ in range(3)]
        momentum = torch.zeros(3, 8, 24)
        generator.manual_seed(1)
        gradients = [torch.randn(8, 24, generator=generator) for _ in range(3)]
        muon.update(weights, gradients, momentum, torch.tensor(0.0), 0.1, 0.01, 0.95, 5, fused=fused)
        sides.append([*weights, momentum])
    for plain, fused in zip(*sides, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_loss_made_with_its_share_has_the_gradients_of_a_scaled_one(softcap: float):
    """To the bit for a power of two; whatever gradient comes in."""
    torch.manual_seed(1)
    x, w = torch.randn(300, 16), torch.randn(64, 16)
    targets = torch.randint(-1, 64, (300,))

    def gradients(share: float, inside: bool) -> tuple[float, torch.Tensor, torch.Tensor]:
        inputs = [each.clone().requires_grad_() for each in (x, w)]
        found = loss.chunked_cross_entropy(*inputs, targets, softcap, share=share if inside else None)
        (found * 3.0 if inside else found * share).backward()
        return float(found.detach()), inputs[0].grad, inputs[1].grad

    for share, bound in ((0.125, 0.0), (1 / 3, 1e-6)):
        inside, outside = gradients(share, True), gradients(share, False)
        assert inside[0] == outside[0]
        for one, other in zip(inside[1:], outside[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=bound, atol=bound * float(other.abs().max()))


def test_the_residual_stream_is_bf16_where_the_products_are():
    tokens = torch.randint(0, 64, (2, 9))
    seen: list[torch.dtype] = []
    found = {}
    for residual in ("fp32", "bf16"):
        model = GPT(TINY, residual=residual)
        model.initialise(1)
        model.watch = lambda _, x_BTD: seen.append(x_BTD.dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(tokens[:, :-1], tokens[:, 1:])
        result.backward()
        found[residual] = (float(result.detach()), model.wte.weight.grad)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert found["bf16"][0] == pytest.approx(found["fp32"][0], rel=1e-2)
    assert torch.nn.functional.cosine_similarity(*(each[1].flatten() for each in found.values()), dim=0) > 0.99
    seen.clear()
    model(tokens[:, :8])  # without autocast, as samples on a CPU are made
    assert seen == [torch.float32] * 2


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"residual": "bf16", "precision": "fp32"}, "is bf16, but the products are fp32"),
        ({"residual": "bf16", "device": "cpu"}, "is bf16, but the products are fp32"),
        ({"attention": "flash", "device": "cpu"}, "a kernel of GPUs, but train.device is cpu"),
        ({"attention": "flash3", "precision": "fp32"}, "which takes no fp32"),
        ({"attention": "cudnn"}, "train.deterministic is true"),
        ({"profile": (3,)}, r"is \[3\]; give the first and the last step"),
        ({"profile": (5, 3)}, "give the first and the last step"),
        ({"profile": (0, 3)}, "give the first and the last step"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changed: dict, problem: str):
    with pytest.raises(SettingError, match=problem):
        TrainLoopConfig(**changed)


def test_a_kernel_of_attention_that_the_model_does_not_use_is_refused():
    with pytest.raises(Exception, match=r"model\.document_mask takes FlexAttention; set auto"):
        settings_of("gpt2-124m", 1, 1, "--model.document_mask=true", "--train.attention=flash")


def test_a_run_of_before_these_settings_goes_on_with_their_defaults():
    plain = settings_of("gpt2-124m", 1, 1)
    assert not {"train.residual", "train.attention", "train.profile"} & set(identity(plain))
    changed = settings_of("gpt2-124m", 1, 1, "--train.residual=bf16", "--train.profile=1,2")
    assert identity(changed).keys() - identity(plain).keys() == {"train.residual"}


def test_attention_takes_the_measured_order_and_nothing_inexact_when_bits_count(monkeypatch):
    assert kernels.order("auto", (9, 0), True) == ()
    assert kernels.order("flash", (9, 0), True) == ("flash",)
    monkeypatch.setattr(kernels, "MEASURED", {(9, 0): ("cudnn", "flash")})
    assert kernels.order("auto", (9, 0), False) == ("cudnn", "flash")
    assert kernels.order("auto", (9, 0), True) == ("flash",)
    assert kernels.order("auto", (8, 0), True) == ()


@pytest.mark.parametrize(
    ("precision", "capability", "expected"),
    [("auto", (7, 5), "fp32"), ("auto", (8, 0), "bf16"), ("bf16", (7, 0), None), ("fp8", (8, 0), None)],
)
def test_a_precision_that_the_gpu_lacks_is_refused(precision: str, capability: tuple, expected, monkeypatch):
    from core.errors import ConfigError
    from trainer.model.precision import resolve

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "V100")
    if expected:
        assert resolve(precision, torch.device("cuda", 0)) == expected
        return
    with pytest.raises(ConfigError, match=f"train.precision is {precision}, but V100 has compute capability"):
        resolve(precision, torch.device("cuda", 0))


def test_a_stopped_range_of_a_profile_belongs_to_rank_0_only():
    from trainer.loop.profile import StepProfiler

    other = StepProfiler((1, 2), "run", 1, SimpleNamespace(is_main=False, device=torch.device("cpu")))
    other.before(1)
    assert not other.ends_with(2)
