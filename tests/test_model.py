"""trainer.model: parameter counts, causality, the loss, the schedule."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from core.schema import ModelConfig, OptimizerConfig
from trainer.model.gpt import GPT
from trainer.model.loss import chunked_cross_entropy
from trainer.optim.schedule import rate_factor

TINY = ModelConfig(layers=2, heads=2, width=16, context=12, vocab_rows=64)


def tiny(seed: int = 0) -> GPT:
    model = GPT(TINY)
    model.initialise(seed)
    return model


def test_124m_has_exactly_the_published_parameters():
    with torch.device("meta"):
        assert GPT(ModelConfig()).parameter_count() == 124_475_904


def test_no_position_sees_a_later_one():
    """Causality from gradients: logits at t depend on inputs up to t, and on each of them."""
    model = tiny()
    embedded = []
    model.wte.register_forward_hook(lambda _, __, out: embedded.append(out.retain_grad() or out))
    tokens = torch.randint(0, 64, (1, TINY.context))
    for t in range(TINY.context):
        embedded.clear()
        model.zero_grad()
        model(tokens)[0, t].sum().backward()
        reach = embedded[0].grad[0].abs().sum(-1)
        assert torch.all(reach[t + 1 :] == 0)
        assert torch.all(reach[: t + 1] > 0)


def test_initialisation_is_a_function_of_the_seed():
    a, b, c = tiny(1), tiny(1), tiny(2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.wte.weight, c.wte.weight)
    assert a(torch.zeros(1, 4).int(), torch.ones(1, 4).int()).item() == pytest.approx(math.log(64), abs=0.2)


@pytest.mark.parametrize("rows", [1, 100, 128, 300])
def test_chunked_loss_equals_the_plain_one(rows: int):
    torch.manual_seed(rows)
    x = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(500, 16, requires_grad=True)
    targets = torch.randint(0, 500, (rows,))
    plain = F.cross_entropy(x @ weight.T, targets)
    expected = torch.autograd.grad(plain * 3, (x, weight))
    chunked = chunked_cross_entropy(x, weight, targets)
    found = torch.autograd.grad(chunked * 3, (x, weight))
    torch.testing.assert_close(chunked, plain)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        assert torch.equal(chunked_cross_entropy(x, weight, targets), chunked.detach())


def test_schedule_warms_up_and_ends_at_its_floor():
    config = OptimizerConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1)
    rates = [config.lr * rate_factor(step, 110, config) for step in range(1, 111)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[59] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    flat = dataclasses.replace(config, warmup_steps=0)
    assert rate_factor(1, 1, flat) == pytest.approx(0.1)
