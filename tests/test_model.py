"""trainer.model: parameter counts, equality with the published GPT-2, causality, documents, the loss."""

import dataclasses
import importlib.util
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from core.data.vocabulary import GPT2_END_OF_TEXT
from core.settings.loader import SettingError
from core.settings.model import ModelConfig, flops_per_token, matrix_parameters, parameters
from tests import presets
from tests.rare import fast_only
from trainer.model.attention import KVCache, document_mask
from trainer.model.gpt import GPT
from trainer.model.loss import chunked_cross_entropy, token_scores

TINY = ModelConfig(layers=2, heads=2, width=16, context=12, padded_vocab_size=64)
ARCHITECTURES = presets.architectures()

PUBLISHED = {
    "gpt2-124m": 124_475_904,
    "gpt2-163m-untied": 162_990_336,
    "gpt2-270m": 270_895_104,
    "gpt2-350m": 354_871_296,
    "llama-416m": 416_417_792,
    "gpt2-774m": 774_090_240,
    "gpt2-1.5b": 1_557_686_400,
    "speedrun-162m": 162_221_568,
}


def built(config: ModelConfig, seed: int = 0, recompute: bool = False) -> GPT:
    """A model in which nothing is zero: a projection that starts at zero would hide what is before it."""
    model = GPT(config, recompute)
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_exactly_its_parameters(name: str):
    config = presets.pretraining()[name].model
    with torch.device("meta"):
        model = GPT(config)
    assert model.parameter_count() == PUBLISHED[name] == parameters(config)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_and_flops_by_arithmetic_are_those_of_the_model(name: str):
    config = ARCHITECTURES[name]
    model = GPT(config)
    assert parameters(config) == model.parameter_count()
    # Norms and biases have one dimension, the embedding is looked up, and the tied one is the output layer too.
    products = [
        parameter.numel()
        for key, parameter in model.named_parameters()
        if parameter.dim() == 2 and not key.startswith("wpe") and (config.tie_embeddings or not key.startswith("wte"))
    ]
    assert matrix_parameters(config) == sum(products)


def test_speedrun_costs_the_matrix_products_of_124m():
    found = presets.pretraining()
    mine, faithful = (found[name].model for name in ("speedrun-162m", "gpt2-124m"))
    assert flops_per_token(mine) == flops_per_token(faithful)


def test_gpt2_is_the_published_one():
    """Same weights, same logits, loss and gradients as transformers' GPT-2, to fp32 noise."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = ModelConfig(layers=3, heads=4, width=32, context=24, padded_vocab_size=96)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=96, n_positions=24, n_embd=32, n_layer=3, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0
        )
    )
    model = built(config)
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.transformer.named_parameters():
            transposed = parameter.dim() == 2 and name.startswith("h.")  # Conv1D keeps (in, out)
            parameter.copy_(mine[name].T if transposed else mine[name])
    tokens = torch.randint(0, 96, (3, 24), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    their_loss = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=1e-6)
    loss.backward()
    their_loss.backward()
    for name, parameter in theirs.transformer.named_parameters():
        transposed = parameter.dim() == 2 and name.startswith("h.")
        gradient = parameter.grad.T if transposed else parameter.grad
        torch.testing.assert_close(mine[name].grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_position_sees_a_later_one(name: str):
    """Causality from gradients: logits at t depend on inputs up to t, and on each of them."""
    model = built(ARCHITECTURES[name]).eval()
    embedded = []
    model.wte.register_forward_hook(lambda _, __, out: embedded.append(out.retain_grad() or out))
    tokens = torch.randint(0, 64, (1, model.config.context))
    for t in range(model.config.context):
        embedded.clear()
        model.zero_grad()
        model(tokens)[0, t].square().sum().backward()
        reach = embedded[0].grad[0].abs().sum(-1)
        assert torch.all(reach[t + 1 :] == 0)
        assert torch.all(reach[: t + 1] > 0)


def test_document_mask_stops_at_the_end_of_text():
    model = built(ARCHITECTURES["documents"]).eval()
    embedded = []
    model.wte.register_forward_hook(lambda _, __, out: embedded.append(out.retain_grad() or out))
    tokens = torch.randint(0, 64, (1, 12))
    tokens[0, 5] = GPT2_END_OF_TEXT  # the second document begins
    for t, first in ((4, 0), (5, 5), (11, 5)):
        embedded.clear()
        model.zero_grad()
        model(tokens)[0, t].square().sum().backward()
        reach = embedded[0].grad[0].abs().sum(-1)
        assert torch.all(reach[first : t + 1] > 0)
        assert torch.all(reach[:first] == 0)
        assert torch.all(reach[t + 1 :] == 0)


@pytest.mark.slow
def test_block_mask_says_what_the_dense_one_says():
    from torch.nn.attention.flex_attention import flex_attention

    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))
    tokens[:, [3, 17, 18]] = GPT2_END_OF_TEXT
    q, k, v = torch.randn(3, 2, 2, 32, 16, generator=torch.Generator().manual_seed(2)).unbind(0)
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=document_mask(tokens, fused=False))
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed: a block mask is made by compiled code")
    found = flex_attention(q, k, v, block_mask=document_mask(tokens, fused=True))
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recomputed_activations_give_the_same_bits(name: str):
    tokens = torch.randint(0, 64, (2, 13), generator=torch.Generator().manual_seed(3))
    gradients = []
    for recompute in (False, True):
        model = built(ARCHITECTURES[name], recompute=recompute).train()
        torch.manual_seed(5)  # of dropout
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", [name for name, config in ARCHITECTURES.items() if not config.document_mask])
def test_cached_rows_of_different_length_equal_uncached_ones(name: str):
    model = built(ARCHITECTURES[name]).eval()
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(4))
    lengths = torch.tensor([7, 4])  # the second prompt is padded on the right
    cache = KVCache(model.config, 2, 12, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        model(tokens[:, :7], cache=cache)
        cache.set_lengths(lengths)
        for step in range(5):
            new = torch.stack([tokens[row, length + step] for row, length in enumerate(lengths)])[:, None]
            logits = model(new, cache=cache)
            for row, length in enumerate(lengths):
                expected = model(tokens[row : row + 1, : length + step + 1])[0, -1]
                torch.testing.assert_close(logits[row, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", fast_only(ARCHITECTURES, {"debug", "gpt2-124m", "skips", "speedrun-162m"}))
def test_blocks_compile_without_a_graph_break(name: str):
    config = ARCHITECTURES[name]
    plain, compiled = built(config).eval(), built(config).eval()
    for block in compiled.h:
        block.compile(fullgraph=True, backend="aot_eager")
    tokens = torch.randint(0, 64, (2, 13))
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for model in (plain, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1])
    explained = torch._dynamo.explain(plain.h[0])(
        torch.randn(2, 12, 16), torch.randn(2, 12, 16), None, context_of(config)
    )
    assert explained.graph_break_count == 0


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-416m"])
@torch._dynamo.config.patch(optimize_ddp=True)  # its default, and again after the test
def test_each_block_is_one_graph_within_ddp(name: str, ranks):
    """Blocks larger than DDP's first bucket of a megabyte, at whose end its optimizer would cut them."""
    torch._dynamo.reset()
    wide = {"width": 256, "heads": 4, "mlp_width": 512 if ARCHITECTURES[name].mlp_width else 0}
    model = GPT(dataclasses.replace(ARCHITECTURES[name], **wide))
    model.initialise(0)
    graphs = CompileCounterWithBackend("aot_eager")
    model.compile_blocks(backend=graphs)
    model.fused = False  # the loss needs no compiler here
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    tokens = torch.randint(0, 64, (2, 13))
    for _ in range(2):
        ddp(tokens[:, :-1], tokens[:, 1:]).backward()
    assert graphs.frame_count == 1  # of equal blocks, compiled once


def context_of(config: ModelConfig):
    from trainer.model.attention import Context, rotations

    rotary = rotations(torch.arange(12), config) if config.position == "rope" else None
    return Context(rotary, None, None)


def test_a_graph_break_would_be_an_error():
    model = built(TINY)
    forward = model.h[0].mlp.forward

    def breaking(x):
        print("a side effect that no graph can hold")
        return forward(x)

    model.h[0].mlp.forward = breaking
    model.h[0].compile(fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(torch.zeros(1, 4).int(), torch.ones(1, 4).int())


def test_initialisation_is_a_function_of_the_seed():
    models = [GPT(TINY) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.initialise(seed)
    a, b, c = models
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.wte.weight, c.wte.weight)
    assert a(torch.zeros(1, 4).int(), torch.ones(1, 4).int()).item() == pytest.approx(math.log(64), abs=0.2)


def test_zero_out_starts_as_a_guess_among_all_tokens():
    model = GPT(ARCHITECTURES["speedrun-162m"])
    model.initialise(1)
    assert model(torch.zeros(1, 4).int(), torch.ones(1, 4).int()).item() == pytest.approx(math.log(64), abs=1e-6)


def test_rotary_scores_depend_on_distance_only():
    from trainer.model.attention import rotate, rotations

    config = ModelConfig(heads=2, width=32, position="rope", rope_fraction=0.5)
    q, k = torch.randn(2, 1, 1, 1, 16).unbind(0)
    scores = []
    for first, second in ((3, 1), (9, 7)):
        turned = [rotate(x, rotations(torch.tensor([at]), config)) for x, at in ((q, first), (k, second))]
        scores.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(scores[0], scores[1])
    assert torch.equal(rotate(q, rotations(torch.tensor([5]), config))[..., 4:8], q[..., 4:8])


@pytest.mark.parametrize("rows", [1, 100, 128, 300])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_chunked_loss_equals_the_plain_one(rows: int, softcap: float):
    torch.manual_seed(rows)
    x = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(500, 16, requires_grad=True)
    targets = torch.randint(0, 500, (rows,))
    targets[1::3] = -1  # left out
    logits = x @ weight.T
    plain = F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets, ignore_index=-1)
    expected = torch.autograd.grad(plain * 3, (x, weight))
    for fused in (False, True):
        if fused and (rows != 128 or not shutil.which("g++")):
            continue  # compiling takes seconds
        chunked = chunked_cross_entropy(x, weight, targets, softcap, fused)
        found = torch.autograd.grad(chunked * 3, (x, weight))
        torch.testing.assert_close(chunked, plain)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(chunked_cross_entropy(x, weight, targets, softcap), plain)
        each, _ = token_scores(x, weight, targets, softcap)
        assert torch.all(each[1::3] == 0)
        torch.testing.assert_close(each.sum() / (targets >= 0).sum(), plain)


def test_a_loss_without_targets_is_zero():
    x = torch.randn(4, 8, requires_grad=True)
    loss = chunked_cross_entropy(x, torch.randn(9, 8), torch.full((4,), -1))
    loss.backward()
    assert loss == 0
    assert torch.all(x.grad == 0)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"heads": 5}, "heads: is 5, must divide the width 768; the nearest that does is 4"),
        ({"heads": 256, "position": "rope"}, "heads are 3 wide; rotary positions need an even width"),
        ({"rope_fraction": 0.0}, "rope_fraction: is 0.0"),
        ({"dropout": 1.0}, "dropout: is 1.0"),
    ],
)
def test_impossible_choices_are_refused(choice: dict, said: str):
    with pytest.raises(SettingError, match=said.replace("(", r"\(")):
        ModelConfig(**choice)


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")
def test_fp8_converts_the_blocks_and_keeps_names_and_weights():
    from trainer.model.precision import use_fp8

    config = ModelConfig(layers=1, heads=2, width=32, context=16, padded_vocab_size=64)
    model, plain = built(config), built(config)
    names = [name for name, _ in model.named_parameters()]
    use_fp8(model.h, emulate=True)
    assert [name for name, _ in model.named_parameters()] == names
    tokens = torch.randint(0, 64, (2, 17))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    expected = plain(tokens[:, :-1], tokens[:, 1:])
    assert loss.item() != expected.item()  # it really computes in eight bits
    assert loss.item() == pytest.approx(expected.item(), abs=0.1)
