"""trainer.inference: cached equals uncached, greedy equals `transformers`, what sampling keeps, streams of text."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.data import vocabulary
from core.data.vocabulary import GPT2_END_OF_TEXT
from core.errors import ConfigError, TrainingError
from core.settings.inference import Sampling
from core.settings.model import ModelConfig
from tests import presets
from tests.checkpoints import random_model
from tests.later import Later
from trainer.inference.choose import choose
from trainer.inference.engine import ROOM_STEP, Engine, GenerationRequest, TextStream
from trainer.inference.sampling import load
from trainer.loop.evaluation import sample
from trainer.model.gpt import GPT

CPU = torch.device("cpu")
transformers, processors = Later("transformers"), Later("transformers.generation.logits_process")
FAMILIES = {name: settings.model for name, settings in presets.pretraining().items()} | presets.OTHERS
TINY = ModelConfig(layers=2, heads=2, width=16, context=48, padded_vocab_size=64)


def prompts(*lengths: int, rows: int = 64) -> list[list[int]]:
    source = random.Random(1)
    return [[source.randrange(rows) for _ in range(length)] for length in lengths]


def ids(completion) -> list[int]:
    return [token.id for token in completion.tokens]


@torch.no_grad()
def uncached(model: GPT, prompt: list[int], sampling: Sampling) -> tuple[list[int], list[float]]:
    """New tokens and their log-probabilities, every position computed again for each."""
    source, tokens, logprobs = random.Random(sampling.seed), list(prompt), []
    while len(tokens) < min(model.config.context, len(prompt) + sampling.max_tokens):
        logits_BV = model(torch.tensor([tokens]))[:, -1]
        logprobs_V = logits_BV[0].log_softmax(0)
        tokens += choose(logits_BV, [sampling], [source.random()], [set(tokens)])
        logprobs.append(logprobs_V[tokens[-1]].item())
    return tokens[len(prompt) :], logprobs


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_equals_uncached(name: str):
    """Greedy and sampled, prompts of different length together, for every architecture of a preset."""
    config = dataclasses.replace(presets.small(FAMILIES[name]), context=48)
    model = random_model(config)
    settings = [
        Sampling(max_tokens=30, temperature=0),
        Sampling(max_tokens=40, temperature=1.5, seed=7),
        Sampling(seed=8),
    ]
    given = prompts(3, 17, 1)
    requests = [GenerationRequest(prompt, each, logprobs=0) for prompt, each in zip(given, settings, strict=True)]
    found = Engine(model, None, CPU).complete(requests)
    for completion, prompt, each in zip(found, given, settings, strict=True):
        expected, logprobs = uncached(model, prompt, each)
        assert ids(completion) == expected
        assert [token.logprob for token in completion.tokens] == pytest.approx(logprobs, abs=1e-4)
        assert completion.finish == "length"
    assert len({tuple(ids(each)) for each in found}) == 3


def test_a_model_that_sees_one_document_forgets_what_is_before_it():
    config = dataclasses.replace(TINY, padded_vocab_size=presets.EOT_ROWS, document_mask=True, position="rope")
    model = random_model(config)
    prompt = [5, 6, GPT2_END_OF_TEXT, 7, 8]
    sampling = Sampling(max_tokens=8, temperature=0)
    found = Engine(model, None, CPU).complete([GenerationRequest(prompt, sampling, endless=True)])[0]
    assert ids(found) == uncached(model, prompt, sampling)[0]


def test_a_cache_grows_with_its_texts():
    model = random_model(dataclasses.replace(TINY, context=ROOM_STEP + 40))
    given = prompts(ROOM_STEP - 2, 5)
    sampling = Sampling(max_tokens=12, seed=3)
    found = Engine(model, None, CPU).complete([GenerationRequest(prompt, sampling) for prompt in given])
    assert [ids(each) for each in found] == [uncached(model, prompt, sampling)[0] for prompt in given]


def test_requests_that_come_and_go_do_not_disturb_others():
    model = random_model(TINY)
    given = prompts(4, 9, 2, 12, 6)
    requests = [
        GenerationRequest(prompt, Sampling(max_tokens=6 + 5 * place, seed=place, temperature=1.2, top_p=0.9, top_k=0))
        for place, prompt in enumerate(given)
    ]
    alone = [ids(Engine(model, None, CPU).complete([request])[0]) for request in requests]
    engine = Engine(model, None, CPU, max_batch_size=2)  # the others wait
    assert [ids(each) for each in engine.complete(requests)] == alone
    numbers = [engine.add(request) for request in requests[:2]]
    found: dict[int, list[int]] = {}
    for step in range(100):
        if step == 4:
            numbers += [engine.add(request) for request in requests[2:]]
        if step == 9:  # the first is done by then
            engine.cancel(numbers[1])
        for piece in engine.step():
            found.setdefault(piece.number, []).append(piece.token.id)
    assert not engine.busy
    cut = found.pop(numbers[1])
    assert 0 < len(cut) < len(alone[1])
    assert cut == alone[1][: len(cut)]
    assert [found[number] for number in numbers if number != numbers[1]] == [alone[0], *alone[2:]]


def test_a_stream_that_is_given_up_frees_its_place():
    engine = Engine(random_model(TINY), None, CPU, max_batch_size=1)
    stream = engine.stream([GenerationRequest(prompt, Sampling(max_tokens=20)) for prompt in prompts(3, 3)])
    next(stream)
    stream.close()
    engine.step()
    assert not engine.busy


def test_greedy_equals_transformers():
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=64, n_positions=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).eval()
    mine = GPT(TINY).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        weights = theirs.transformer.state_dict()
        for name, parameter in mine.named_parameters():
            # GPT-2's linear layers are stored (in, out).
            is_linear = name.endswith("weight") and ".c_" in name
            parameter.copy_(weights[name].T if is_linear else weights[name])
    engine = Engine(mine, None, CPU)
    for prompt in prompts(1, 5, 20):
        tokens = torch.tensor([prompt])
        expected = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=25,
            eos_token_id=None,
            pad_token_id=0,
        )
        found = engine.complete([GenerationRequest(prompt, Sampling(max_tokens=25, temperature=0))])[0]
        assert ids(found) == expected[0, len(prompt) :].tolist()


SETTINGS = {
    "temperature": (Sampling(temperature=1.7, top_k=0), lambda: [processors.TemperatureLogitsWarper(1.7)]),
    "top_k": (Sampling(temperature=1, top_k=5), lambda: [processors.TopKLogitsWarper(5)]),
    "top_p": (Sampling(temperature=1, top_k=0, top_p=0.6), lambda: [processors.TopPLogitsWarper(0.6)]),
    "min_p": (Sampling(temperature=1, top_k=0, min_p=0.2), lambda: [processors.MinPLogitsWarper(0.2)]),
    "repetition": (
        Sampling(temperature=1, top_k=0, repetition_penalty=1.8),
        lambda: [processors.RepetitionPenaltyLogitsProcessor(1.8)],
    ),
    "all": (
        Sampling(temperature=1.3, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
        lambda: [
            processors.RepetitionPenaltyLogitsProcessor(1.2),
            processors.TemperatureLogitsWarper(1.3),
            processors.TopKLogitsWarper(12),
            processors.TopPLogitsWarper(0.8),
            processors.MinPLogitsWarper(0.05),
        ],
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_probabilities_are_those_of_transformers(name: str):
    """Evenly spread draws choose each token as often as its probability says."""
    sampling, theirs = SETTINGS[name]
    logits_V = torch.randn(40, generator=torch.Generator().manual_seed(5)) * 2
    seen = [3, 9, 20, 31]
    expected = logits_V[None].clone()
    for processor in theirs():
        expected = processor(torch.tensor([seen]), expected)
    draws = [(place + 0.5) / 4000 for place in range(4000)]
    chosen = choose(logits_V.repeat(len(draws), 1), [sampling] * len(draws), draws, [seen] * len(draws))
    share = torch.bincount(torch.tensor(chosen), minlength=40) / len(draws)
    assert (share - expected[0].softmax(0)).abs().max() <= 1.01 / len(draws)


def test_extreme_settings_choose_something_possible():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1e30]])
    likeliest = [Sampling(temperature=1e-6), Sampling(top_p=1e-9), Sampling(min_p=1.0), Sampling(top_k=1)]
    for sampling in likeliest:
        assert choose(logits.clone(), [sampling], [0.999999], [[]]) == [1]
    assert choose(logits.clone(), [Sampling(top_k=0)], [1 - 2**-53], [[]]) == [2]
    with pytest.raises(TrainingError, match="not finite"):
        choose(torch.tensor([[1.0, float("nan")]]), [Sampling()], [0.5], [[]])


@given(
    text=st.text(alphabet="abé🙂\n#", max_size=40),
    stop=st.lists(st.text(alphabet="abé\n#", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=60),
)
def test_a_text_in_pieces_ends_before_the_first_stop(text: str, stop: list[str], sizes: list[int]):
    stream = TextStream(stop)
    data, shown, stopped, position = text.encode(), "", False, 0
    for number in range(len(data) + 1):
        size = sizes[number % len(sizes)]
        piece, stopped = stream.feed(data[position : position + size], final=position + size >= len(data))
        assert "\ufffd" not in piece
        shown += piece
        position += size
        if stopped or position >= len(data):
            break
    places = [text.index(each) for each in stop if each in text]
    assert stopped == bool(places)
    # Of stop texts that reach into each other the one complete first counts.
    assert text.startswith(shown)
    assert not any(each in shown for each in stop)
    if not places:
        assert shown == text


def test_half_a_character_at_the_end_is_shown_as_such():
    stream = TextStream(())
    assert stream.feed("🙂".encode()[:3]) == ("", False)
    assert stream.feed(b"", final=True) == ("\ufffd", False)


# --- with the real vocabulary ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoding(vocab_bpe):
    return vocabulary.read(str(vocab_bpe)).encoding()


class Parrot(torch.nn.Module):
    """A model with our model's interface that says fixed tokens: its logits point to the token after the position."""

    def __init__(self, script: list[int]):
        super().__init__()
        self.config = dataclasses.replace(TINY, context=len(script), padded_vocab_size=50304)
        self.wte = torch.nn.Embedding(1, 1)
        self.register_buffer("script", torch.tensor([*script[1:], GPT2_END_OF_TEXT]))
        self.register_buffer("head", torch.eye(50304, 8)[:, :0])

    def hidden(self, tokens_BT, cache):
        positions_BT = cache.positions(tokens_BT.shape[1])
        cache.advance(tokens_BT.shape[1])
        return self.script[positions_BT.clamp(max=len(self.script) - 1)][..., None].float()


class Says(Engine):
    def _logits(self, x_BD):
        return torch.nn.functional.one_hot(x_BD[:, 0].long(), 50257).float() * 30


def says(encoding, text: str, sampling: Sampling, room: int = 8) -> list:
    tokens = encoding.encode_ordinary(text)
    script = [GPT2_END_OF_TEXT, *tokens, GPT2_END_OF_TEXT, *[0] * room]
    return list(Says(Parrot(script), encoding, CPU).stream([GenerationRequest([GPT2_END_OF_TEXT], sampling)]))


def test_stop_text_split_over_tokens_is_never_shown(encoding):
    text = "Hello there.\n\n### User:\nmore"
    pieces = says(encoding, text, Sampling(temperature=0, stop=("\n\n### User:",)))
    assert "".join(piece.text for piece in pieces) == "Hello there."
    assert pieces[-1].finish == "stop"
    assert all(piece.finish is None for piece in pieces[:-1])
    # Until the tokens disagree, what may be a stop text is held back; then it is shown.
    pieces = says(encoding, "Hello there.\n\n### Usage", Sampling(temperature=0, stop=("\n\n### User:",)))
    assert "".join(piece.text for piece in pieces) == "Hello there.\n\n### Usage"


def test_characters_of_several_tokens_come_whole(encoding):
    text = "naïve 🙂🧑‍🚀 日本語"
    pieces = says(encoding, text, Sampling(temperature=0))
    assert "".join(piece.text for piece in pieces) == text
    assert "\ufffd" not in "".join(piece.text for piece in pieces)
    assert (pieces[-1].finish, pieces[-1].token) == ("stop", None)


def test_text_ends_at_most_tokens_or_the_context(encoding):
    pieces = says(encoding, "one two three four", Sampling(temperature=0, max_tokens=2))
    assert [piece.text for piece in pieces] == ["one", " two"]
    assert pieces[-1].finish == "length"
    model = random_model(dataclasses.replace(TINY, padded_vocab_size=50304))
    full = Engine(model, encoding, CPU).complete(
        [GenerationRequest(prompts(40)[0], Sampling(max_tokens=99), endless=True)]
    )[0]
    assert (len(full.tokens), full.finish) == (TINY.context - 40, "length")


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        ([], "the prompt has no tokens; give at least the end-of-text token"),
        ([1, 64], "the prompt contains token 64, ids go from 0 to 63"),
        ([1] * 48, "the prompt has 48 tokens, the model's context is 48; give at most 47"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(tokens: list[int], error: str):
    engine = Engine(random_model(TINY), None, CPU)
    with pytest.raises(ConfigError, match=f"^{error}$"):
        engine.add(GenerationRequest(tokens))
    assert not engine.busy


def test_alternatives_are_the_likeliest_tokens():
    model = random_model(TINY)
    prompt = prompts(5)[0]
    request = GenerationRequest(prompt, Sampling(max_tokens=3, seed=1, repetition_penalty=1.5), logprobs=4)
    found = Engine(model, None, CPU).complete([request])[0]
    tokens = list(prompt)
    for token in found.tokens:
        logprobs_V = model(torch.tensor([tokens]))[0, -1].log_softmax(0)
        values, best = logprobs_V.topk(4)
        assert [other.id for other in token.top] == best.tolist()
        assert [other.logprob for other in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert token.logprob == pytest.approx(logprobs_V[token.id].item(), abs=1e-4)
        tokens.append(token.id)


def test_samples_of_a_training_run_follow_from_the_seed(encoding):
    model = random_model(dataclasses.replace(TINY, padded_vocab_size=50304))
    first = sample(model, encoding, "The state of", 10, 1, CPU)
    assert model.training
    assert first.startswith("The state of")
    assert sample(model, encoding, "The state of", 10, 1, CPU) == first
    assert sample(model, encoding, "The state of", 10, 2, CPU) != first
    long = "The state of the Union " * 20  # longer than the context
    assert sample(model, encoding, long, 10, 1, CPU).startswith(long)


def test_settings_say_what_is_wrong():
    for flag, error in {
        "--max_tokens=0": "flag --max_tokens: max_tokens: is 0, must be at least 1",
        "--temperature=-1": "flag --temperature: temperature: is -1.0, must be at least 0",
        "--top_p=0": "flag --top_p: top_p: is 0.0, must be above 0 and at most 1",
        "--min_p=2": "flag --min_p: min_p: is 2.0, must be between 0 and 1",
        "--temprature=1": "flag --temprature=1: unknown setting temprature; did you mean temperature?",
    }.items():
        with pytest.raises(ConfigError, match=f"^{error}".replace("?", r"\?")):
            load(Sampling, [flag], {})
    assert load(Sampling, [r"--stop=\n\n,END"], {}).stop == ("\n\n", "END")


def test_without_a_cache_the_texts_are_the_same():
    """Its speed is what /compare shows beside the cache's."""
    model = random_model(ModelConfig(layers=2, heads=2, width=32, context=64, padded_vocab_size=50304))
    requests = [
        GenerationRequest([5, 6, 7], Sampling(max_tokens=8, seed=1), endless=True),
        GenerationRequest([9], Sampling(max_tokens=5, temperature=0), endless=True),
    ]
    kept, again = (
        Engine(model, None, CPU, max_batch_size=2, caches=caches).complete(requests) for caches in (True, False)
    )
    assert [[token.id for token in each.tokens] for each in kept] == [[t.id for t in each.tokens] for each in again]
    assert [len(each.tokens) for each in again] == [8, 5]
