"""The page of trainer.serve in a headless browser."""

import asyncio
import json
from pathlib import Path

import pytest
import torch

from core.data import chat_template, vocabulary
from tests import checkpoints
from tests.browser import BROWSER, tab_at
from tests.serving import CONFIG, HELLO, KEY, locally, runs_in, serving
from trainer.inference.engine import Engine

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page in")
# Keeps every length that an answer had, and what the page loaded.
WATCH = """
globalThis.lengths = [];
new MutationObserver(() => {
  const answers = document.querySelectorAll(".answer");
  if (answers.length) lengths.push(answers[answers.length - 1].textContent.length);
}).observe(document.getElementById("log"), {subtree: true, childList: true, characterData: true});
"""
ASK = """
document.getElementById("text").value = %s;
document.getElementById("form").requestSubmit();
"""
STATE = """JSON.stringify({
  name: document.getElementById("name")?.textContent,
  about: document.getElementById("about")?.textContent,
  answers: [...document.querySelectorAll(".answer")].map(each => [each.textContent, each.dataset.done === "true"]),
  errors: [...document.querySelectorAll(".error")].map(each => each.textContent),
  asks_for_key: document.getElementById("key-row")?.checkVisibility(),
  lengths: globalThis.lengths ?? [],
  hosts: [...new Set(performance.getEntriesByType("resource").map(each => new URL(each.name).host))],
})"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs_in(tmp_path_factory.mktemp("runs"))


def test_the_page_streams_an_answer(folder, vocab_bpe, tmp_path):
    encoding = vocabulary.read(str(vocab_bpe)).encoding()
    engine = Engine(checkpoints.random_model(CONFIG, seed=1), encoding, torch.device("cpu"))

    async def look(url: str) -> dict:
        async with tab_at(f"{url}/", tmp_path / "profile", STATE) as tab:
            await tab.until(lambda state: state.get("name") == "tuned")
            await tab.run(WATCH)
            await tab.run('document.getElementById("tokens").value = "40"')
            await tab.run('document.getElementById("temperature").value = "0"')
            await tab.run(ASK % json.dumps("Hello"))
            first = await tab.until(lambda state: state["answers"] and state["answers"][-1][1])
            await tab.run(ASK % json.dumps("And then?"))
            second = await tab.until(lambda state: len(state["answers"]) == 2 and state["answers"][-1][1])
            await tab.run('document.getElementById("tokens").value = "900"')
            await tab.run(ASK % json.dumps("Everything"))
            await tab.until(lambda state: len(state["answers"]) == 3 and state["answers"][-1][0])
            await tab.run('document.getElementById("stop").click()')
            stopped = await tab.until(lambda state: state["answers"][-1][1])
            return {"first": first, "second": second, "stopped": stopped}

    with serving(folder / "tuned", vocab_bpe) as url:
        found = asyncio.run(look(url))
    tokens = chat_template.render(HELLO, encoding, add_generation_prompt=True).tokens
    first = locally(engine, tokens, max_tokens=40, temperature=0)
    assert found["first"]["answers"][0][0] == first
    lengths = found["first"]["lengths"]
    assert len(set(lengths)) > 5, "it came at once"
    assert lengths == sorted(lengths)
    messages = [*HELLO, {"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    tokens = chat_template.render(messages, encoding, add_generation_prompt=True).tokens
    assert found["second"]["answers"][1][0] == locally(engine, tokens, max_tokens=40, temperature=0)
    stopped = encoding.encode_ordinary(found["stopped"]["answers"][2][0])
    assert 0 < len(stopped) < 900
    assert found["stopped"]["errors"] == []
    assert not found["stopped"]["asks_for_key"]
    assert found["stopped"]["hosts"] == [url.removeprefix("http://")]


def test_the_page_asks_for_the_key(folder, vocab_bpe, tmp_path):
    async def look(url: str) -> dict:
        async with tab_at(f"{url}/", tmp_path / "profile", STATE) as tab:
            asked = await tab.until(lambda state: state["errors"])
            assert asked["asks_for_key"]
            await tab.run(f'document.getElementById("key").value = "{KEY}"')
            await tab.run('document.getElementById("connect").click()')
            await tab.until(lambda state: state.get("name") == "base")
            await tab.run('document.getElementById("tokens").value = "5"')
            await tab.run(ASK % json.dumps("Once"))
            return await tab.until(lambda state: state["answers"] and state["answers"][-1][1])

    with serving(folder / "base", vocab_bpe, key=KEY) as url:
        state = asyncio.run(look(url))
    assert not state["asks_for_key"]
    assert state["about"] == "continues your text · context 1024"
    assert state["answers"][0][0]
    assert state["errors"] == ["the API key is missing or wrong; send Authorization: Bearer KEY"]
