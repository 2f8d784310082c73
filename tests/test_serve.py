"""trainer.serve: the official client's calls, errors, keys, many clients at once, and the page in a browser."""

import asyncio
import json
import math
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from core.data import chat_template, vocabulary
from core.data.vocabulary import GPT2_END_OF_TEXT
from core.run.folder import RunFolder
from core.run.reader import read_run, spent_usd_at_most
from core.settings.inference import Sampling
from costs.discover import find_runs
from tests import checkpoints, warm
from tests.conftest import REPOSITORY
from tests.later import Later
from tests.patience import PATIENCE_SECONDS
from tests.serving import CONFIG, HELLO, KEY, locally, runs_in, serving
from trainer.inference.engine import Engine, GenerationRequest
from trainer.inference.worker import Failed, Worker

openai = Later("openai")


@pytest.fixture(scope="module")
def encoding(vocab_bpe):
    return vocabulary.read(str(vocab_bpe)).encoding()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs_in(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def engine(encoding) -> Engine:
    """The tuned model, here."""
    return Engine(checkpoints.random_model(CONFIG, seed=1), encoding, torch.device("cpu"))


@pytest.fixture(scope="module")
def url(folder, vocab_bpe) -> Iterator[str]:
    """The tuned model's server."""
    with serving(folder / "tuned", vocab_bpe, "--max_batch_size=4") as url:
        yield url


@pytest.fixture(scope="module")
def guarded(folder, vocab_bpe) -> Iterator[str]:
    """The base model's server, on an address that others reach; one text at a time."""
    flags = ("--host=0.0.0.0", "--max_batch_size=1", "--queue=2")
    with serving(folder / "base", vocab_bpe, *flags, key=KEY) as url:
        yield url.replace("0.0.0.0", "127.0.0.1")


@pytest.fixture
def client(url):
    """OpenAI's."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_models(client, url):
    assert [model.id for model in client.models.list()] == ["tuned"]
    assert client.models.retrieve("tuned").id == "tuned"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist; this is tuned"):
        client.models.retrieve("other")
    assert json.load(urllib.request.urlopen(f"{url}/health")) == {"status": "ok"}


def test_completion(client, engine):
    expected = locally(engine, engine.encode("Once upon"), max_tokens=9, temperature=0)
    found = client.completions.create(model="tuned", prompt="Once upon", max_tokens=9, temperature=0)
    assert found.choices[0].text == expected
    assert found.choices[0].finish_reason == "length"
    prompt_tokens = len(engine.encode("Once upon"))
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt_tokens, 9)
    assert found.usage.total_tokens == prompt_tokens + 9


def test_completion_of_several_prompts_and_choices(client, engine):
    prompts = ["Once upon", [GPT2_END_OF_TEXT, 11, 12]]
    found = client.completions.create(model="tuned", prompt=prompts[:1], n=2, max_tokens=5, seed=3)
    expected = [locally(engine, engine.encode("Once upon"), max_tokens=5, seed=seed) for seed in (3, 4)]
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1]
    found = client.completions.create(model="tuned", prompt=[prompts[1]], max_tokens=5, temperature=0)
    assert found.choices[0].text == locally(engine, prompts[1], max_tokens=5, temperature=0)
    found = client.completions.create(model="tuned", prompt=["a", "b", "c"], max_tokens=2)
    assert len(found.choices) == 3


def test_completion_as_a_stream(client, engine):
    stream = client.completions.create(
        model="tuned", prompt="Once", max_tokens=8, seed=1, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    text = "".join(event.choices[0].text for event in events if event.choices)
    assert text == locally(engine, engine.encode("Once"), max_tokens=8, seed=1)
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "length"
    assert len(events) > 4
    assert events[-1].usage.completion_tokens == 8


def test_chat(client, engine, encoding):
    tokens = chat_template.render(HELLO, encoding, add_generation_prompt=True).tokens
    found = client.chat.completions.create(model="tuned", messages=HELLO, max_completion_tokens=7, temperature=0)
    message = found.choices[0].message
    assert (message.role, message.content) == ("assistant", locally(engine, tokens, max_tokens=7, temperature=0))
    assert found.usage.prompt_tokens == len(tokens)
    parts = [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, *HELLO]
    found = client.chat.completions.create(model="tuned", messages=parts, max_tokens=3)
    assert found.usage.completion_tokens == 3


def test_chat_as_a_stream_of_two_choices(client, engine, encoding):
    tokens = chat_template.render(HELLO, encoding, add_generation_prompt=True).tokens
    texts, roles, finishes = {0: "", 1: ""}, {}, {}
    for event in client.chat.completions.create(model="tuned", messages=HELLO, max_tokens=6, seed=5, n=2, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] = choice.delta.role or roles[choice.index]
            finishes[choice.index] = choice.finish_reason
    assert texts == {index: locally(engine, tokens, max_tokens=6, seed=5 + index) for index in (0, 1)}
    assert roles == {0: "assistant", 1: "assistant"}
    assert finishes == {0: "length", 1: "length"}


def test_stop_texts(client, engine):
    text = locally(engine, engine.encode("Once"), max_tokens=30, temperature=0)
    stop = text[len(text) // 2 :][:6]
    for stream in (False, True):
        found = client.completions.create(
            model="tuned", prompt="Once", max_tokens=30, temperature=0, stop=["never there", stop], stream=stream
        )
        events = list(found) if stream else [found]
        assert "".join(event.choices[0].text for event in events) == text[: text.index(stop)]
        assert events[-1].choices[0].finish_reason == "stop"


def test_logprobs(client):
    found = client.completions.create(model="tuned", prompt="Once", max_tokens=4, temperature=0, logprobs=3)
    logprobs = found.choices[0].logprobs
    assert "".join(logprobs.tokens) == found.choices[0].text
    assert [len(alternatives) for alternatives in logprobs.top_logprobs] == [3] * 4
    for token, value, best in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert max(best, key=best.get) == token  # greedy
        assert best[token] == pytest.approx(value)
        assert sum(map(math.exp, best.values())) < 1
    assert logprobs.text_offset[2] == len("".join(logprobs.tokens[:2]))
    chat = client.chat.completions.create(
        model="tuned", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    for entry in chat.choices[0].logprobs.content:
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
    stream = client.completions.create(
        model="tuned", prompt="Once", max_tokens=4, temperature=0, logprobs=0, stream=True
    )
    offsets = [place for event in stream for place in event.choices[0].logprobs.text_offset]
    assert offsets == logprobs.text_offset


def test_own_settings_by_way_of_extra_body(client, engine):
    more = {"top_k": 3, "min_p": 0.05, "repetition_penalty": 1.3}
    found = client.completions.create(model="tuned", prompt="Once", max_tokens=9, seed=2, extra_body=more)
    assert found.choices[0].text == locally(engine, engine.encode("Once"), max_tokens=9, seed=2, **more)


def test_many_clients_are_answered_together_as_if_alone(url, engine):
    """More than there are rows; each gets its own text."""
    prompts = [f"Number {index} of" for index in range(12)]
    expected = [
        locally(engine, engine.encode(prompt), max_tokens=10 + index, seed=index)
        for index, prompt in enumerate(prompts)
    ]

    async def ask(index: int, prompt: str) -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            found = await client.completions.create(model="tuned", prompt=prompt, max_tokens=10 + index, seed=index)
            return found.choices[0].text

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(ask(index, prompt) for index, prompt in enumerate(prompts)))

    assert asyncio.run(ask_all()) == expected


BAD = {
    "max_tokens is 0, must be at least 1": {"max_tokens": 0},
    "max_tokens is 'many', must be a whole number": {"max_tokens": "many"},
    "temperature is -1.0, must be at least 0": {"temperature": -1},
    "n is 99, must be 1 to 16": {"n": 99},
    "frequency_penalty is not supported; leave it out": {"frequency_penalty": 0.5},
    "unknown parameter 'temprature'": {"temprature": 1},
    "stop must be a text or a list of at most 4, none of them empty": {"stop": ["a", ""]},
    "prompt must be a text, a list of token ids, or a list of either": {"prompt": {"a": 1}},
    "the prompt contains token 99999, ids go from 0 to 50256": {"prompt": [1, 99999]},
    "the prompt has 1024 tokens, the model's context is 1024; shorten it": {"prompt": [11] * 1024},
    "stream is 'yes', must be true or false": {"stream": "yes"},
}


def post(url: str, data: bytes, path: str = "/v1/completions", **headers: str) -> tuple[int, dict]:
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_is_told(url, message: str):
    body = {"model": "tuned", "prompt": "Once", "max_tokens": 2} | BAD[message]
    for stream in [False, True] if "stream" not in BAD[message] else [None]:
        status, answer = post(url, json.dumps(body if stream is None else body | {"stream": stream}).encode())
        assert status == 400
        assert answer["error"]["message"] == message
        assert answer["error"]["type"] == "invalid_request_error"


def test_what_is_no_request_is_refused(url, client):
    assert post(url, b"{")[0] == 400
    assert post(url, b"[]")[1]["error"]["message"] == "the body must be a JSON object"
    assert post(url, b"x" * (2 << 20))[0] == 413
    assert post(url, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    status, answer = post(url, b"{}", path="/v1/responses")
    assert status == 404
    said = "POST /v1/responses: this server has /v1/completions and /v1/chat/completions"
    assert answer["error"]["message"] == said
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-4' does not exist; this is tuned"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match=r"message 0: its role is 'tool'") as caught:
        client.chat.completions.create(model="tuned", messages=[{"role": "tool", "content": "a", "tool_call_id": "1"}])
    assert caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="context is 1024") as caught:
        client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": "a " * 2000}])
    assert caught.value.code == "context_length_exceeded"


EMPTY = {
    "an answer of nothing": [*HELLO, {"role": "assistant", "content": ""}, *HELLO],
    "an answer of null": [*HELLO, {"role": "assistant", "content": None}, *HELLO],
    "no system": [{"role": "system", "content": " "}, *HELLO, *HELLO],
    "an empty part": [*HELLO, {"role": "assistant", "content": [{"type": "text", "text": ""}]}, *HELLO],
    "nothing to go on from": [*HELLO, *HELLO, {"role": "assistant", "content": ""}],
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_turn_is_as_if_it_were_not_there(client, name: str):
    def say(messages: list[dict]) -> str:
        found = client.chat.completions.create(model="tuned", messages=messages, max_tokens=5, temperature=0)
        return found.choices[0].message.content

    assert say(EMPTY[name]) == say([*HELLO, *HELLO])


def test_parameters_that_change_nothing(client, url):
    ask = {"model": "tuned", "messages": HELLO, "max_tokens": 5, "temperature": 0}
    plain = client.chat.completions.create(**ask).choices[0].message.content
    more = {
        "parallel_tool_calls": False,
        "modalities": ["text"],
        "tool_choice": "auto",
        "reasoning_effort": "none",
        "verbosity": "medium",
    }
    assert client.chat.completions.create(**ask, **more).choices[0].message.content == plain
    for key, value in (("modalities", ["audio"]), ("tool_choice", "required"), ("reasoning_effort", "high")):
        status, answer = post(url, json.dumps(ask | {key: value}).encode(), "/v1/chat/completions")
        assert (status, answer["error"]["param"]) == (400, key)
    for last in ({"role": "user", "content": ""}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}):
        status, answer = post(url, json.dumps(ask | {"messages": [*HELLO, last]}).encode(), "/v1/chat/completions")
        assert (status, answer["error"]["param"]) == (400, "messages")


def test_without_a_key_only_names_of_this_computer_are_served(url):
    assert post(url, b"{}", Host="localhost:8000")[0] == 404  # of the model
    status, answer = post(url, b"{}", Host="rebound.example.org")
    assert status == 403
    assert "the host 'rebound.example.org' is not this computer; set SERVE_API_KEY" in answer["error"]["message"]


def test_a_client_that_goes_away_frees_its_place(guarded):
    """With one row, the next client waits for the one before to end, or to go."""
    client = openai.OpenAI(base_url=f"{guarded}/v1", api_key=KEY, max_retries=0)
    stream = client.completions.create(model="base", prompt="Once", max_tokens=1000, seed=0, stream=True)
    next(iter(stream))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.completions.create, model="base", prompt="Once", max_tokens=2)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:  # until the one above is in the queue
            try:
                client.completions.create(model="base", prompt=["a", "b"], max_tokens=1)
            except openai.RateLimitError as error:
                if "2 texts are in progress or waiting, the limit is 2; try again later" in str(error):
                    break
            assert time.monotonic() < deadline
        assert not waiting.done()
        stream.close()
        assert waiting.result(PATIENCE_SECONDS).usage.completion_tokens == 2
    client.close()


def test_a_key_is_asked_for(guarded):
    for wrong in ("none", KEY[:-1], KEY + "y"):
        client = openai.OpenAI(base_url=f"{guarded}/v1", api_key=wrong, max_retries=0)
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            client.models.list()
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(model="base", prompt="a")
    assert post(guarded, b"{}")[0] == 401
    client = openai.OpenAI(base_url=f"{guarded}/v1", api_key=KEY, max_retries=0)
    assert client.completions.create(model="base", prompt="a", max_tokens=1).usage.completion_tokens == 1
    assert urllib.request.urlopen(f"{guarded}/").status == 200  # the page asks for the key itself


def test_a_base_model_takes_no_conversation(guarded):
    client = openai.OpenAI(base_url=f"{guarded}/v1", api_key=KEY, max_retries=0)
    with pytest.raises(openai.BadRequestError, match="is a base model without a chat template; use /v1/completions"):
        client.chat.completions.create(model="base", messages=HELLO)


def test_a_taken_port_is_told(folder, vocab_bpe):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = warm.run(
            [sys.executable, "-m", "trainer.serve", str(folder / "base"), f"--port={port}"],
            cwd=REPOSITORY,
            env={**os.environ, "VOCAB_URL": str(vocab_bpe)},
        )
    assert result.returncode == 1
    assert f"error: cannot listen on 127.0.0.1:{port}: " in result.stderr
    assert "Traceback" not in result.stderr


def test_a_failing_model_ends_open_requests_and_serves_the_next(encoding):
    model = checkpoints.random_model(CONFIG)
    kept = model.ln_f.weight.data.clone()
    requests = [GenerationRequest([1, 2], Sampling(max_tokens=3)), GenerationRequest([3], Sampling(max_tokens=3))]

    async def use() -> tuple[list[str], int]:
        worker = Worker(Engine(model, encoding, torch.device("cpu")), 8)
        messages = []
        for broken in (True, False):
            model.ln_f.weight.data = kept * math.nan if broken else kept
            try:
                pieces = [piece async for piece in worker.stream(requests)]
            except Failed as error:
                messages.append(str(error))
        await worker.stop()
        return messages, len(pieces)

    assert asyncio.run(use()) == (["TrainingError in the model"], 6)


def test_a_run_is_served_by_its_url_and_its_dollars_are_counted(tmp_path, vocab_bpe):
    """As on a rented machine: the launcher sets RUN_URL, and the price."""
    run_url = str(runs_in(tmp_path) / "base")
    with serving(None, vocab_bpe, key=KEY, RUN_URL=run_url, USD_PER_HOUR="3600") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        assert client.completions.create(model="base", prompt="a", max_tokens=1).usage.completion_tokens == 1
    run = read_run(RunFolder(run_url).serving)
    assert (run.stage, run.segments[-1].end["reason"], run.problems) == ("serve", "finished", [])
    assert sum(span.phases.get("serve", 0) for span in run.segments[-1].spans) > 0
    assert spent_usd_at_most(run_url) >= run.usd > 0
    assert list(find_runs(str(tmp_path))).count(RunFolder(run_url).serving) == 1
