"""The pages of `cost_report.py --serve`: over HTTP, and in a browser beside a run that is training."""

import argparse
import asyncio
import contextlib
import http.client
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from core.errors import ConfigError
from costs import command, serve, show
from tests import launching, patched
from tests.browser import BROWSER, tab_at
from tests.corpus import documents, prepare_set, write_parquet
from tests.golden import preempted_and_resumed


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("BUCKET", str(tmp_path))


@contextlib.contextmanager
def served(run_url: str | None = None, every: float = 60.0) -> Iterator[int]:
    """The port of a server in this process."""
    options = argparse.Namespace(offline=True, no_cache=False, since=None, tag=None)
    server = serve.bound(0, serve.handler(show.live_reports(options, every), run_url, every))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def get(port: int, path: str, **headers: str) -> tuple[int, str, str]:
    """Status, ETag, and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.getheader("ETag") or "", answer.read().decode()


def test_overview_runs_and_comparison_are_linked_and_only_runs_of_the_bucket_are_read(tmp_path: Path):
    first = preempted_and_resumed(tmp_path / "runs" / "first")
    second = preempted_and_resumed(tmp_path / "runs" / "second")
    other = preempted_and_resumed(tmp_path / "elsewhere")
    with served() as port:
        status, _, overview = get(port, "/")
        assert status == 200
        assert f'href="/run?run={quote(first.url, safe="")}"' in overview
        assert "9.84" in overview  # the sum of both
        status, tag, page = get(port, f"/run?run={quote(first.url)}")
        assert status == 200
        assert "$4.92" in page
        assert 'href="/"' in page
        assert get(port, f"/run?run={quote(first.url)}", If_None_Match=tag)[0] == 304
        status, _, both = get(port, f"/compare?run={quote(first.url)}&run={quote(second.url)}")
        assert status == 200
        assert "− first" in both
        assert get(port, f"/run?run={quote(other.url)}")[0] == 404
        assert get(port, "/run?run=/etc")[0] == 404
        assert get(port, "/costs/live.js")[0] == 404
        assert "choose two runs" in get(port, f"/compare?run={quote(first.url)}")[2]
        assert get(port, "/", Host="attacker.example")[0] == 403
        assert get(port, "/", Host=f"localhost:{port}")[0] == 200


def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path):
    later = tmp_path / "runs" / "later"
    with served(str(later), every=0.0) as port:
        assert "holds no run to report on" in get(port, "/")[2]
        preempted_and_resumed(later)
        assert "$4.92" in get(port, "/")[2]
        assert get(port, f"/run?run={quote(str(later))}")[0] == 404


def test_what_cannot_be_served_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for flags, sentence in (
        (["--html", "x.html"], "--html does not go with --serve"),
        (["--json"], "--json does not go with --serve"),
        (["--port", "70000"], "--port is 70000, must be from 0"),
        (["--every", "0"], "--every is 0, must be seconds"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            command.main(["--serve", *flags])
    with served() as port, pytest.raises(ConfigError, match=f"--port {port}: cannot be listened on"):
        serve.bound(port, serve.handler(None, None, 1.0))
    monkeypatch.delenv("BUCKET")
    with pytest.raises(ConfigError, match="set BUCKET"):
        command.main(["--serve", "--port=0"])


STATE = """JSON.stringify({
  first: globalThis.first ?? null,
  state: document.querySelector(".state")?.textContent ?? "",
  steps: Number([...document.querySelectorAll(".facts dd")].map(each => each.textContent)
    .map(each => /([0-9,]+) steps/.exec(each)?.[1].replace(",", "")).find(Boolean) ?? 0),
  points: document.querySelectorAll("svg.narrow path.s-train").length,
  seen: document.getElementById("seen")?.textContent ?? "",
  hosts: [...new Set(performance.getEntriesByType("resource").map(each => new URL(each.name).host))],
})"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page in")
def test_a_page_follows_a_run_that_is_training_without_a_reload(tmp_path: Path, vocab_bpe: Path):
    data, run_url = str(tmp_path / "tokens"), str(tmp_path / "runs" / "live")
    prepare_set(write_parquet(tmp_path / "parquet", [documents(600)]), data, vocab_bpe)
    flags = [f"--data.url={data}", f"--run.url={run_url}", "--train.steps=100000", "--checkpoint.every_steps=100000"]
    environment = {"USD_PER_HOUR": "36", "MAX_USD": "500"}

    async def look(port: int) -> tuple[dict, dict, dict]:
        async with tab_at(f"http://127.0.0.1:{port}/", tmp_path / "profile", STATE) as tab:
            await tab.until(lambda state: state["state"] == "running" and state["steps"])
            await tab.run("globalThis.first = 'loaded once'")
            early = await tab.until(lambda state: state["first"])
            later = await tab.until(lambda state: state["steps"] > early["steps"] and state["points"])
            process.terminate()
            return early, later, await tab.until(lambda state: state["state"] not in ("running", ""))

    process = launching.start(1, *flags, environment=environment, constants=patched.PROMPT)
    try:
        with served(run_url, every=0.3) as port:
            early, later, ended = asyncio.run(look(port))
    finally:
        launching.kill(process)
    assert early["first"] == later["first"] == ended["first"] == "loaded once"
    assert ended["steps"] >= later["steps"] > early["steps"]
    assert ended["state"] == "preempted"
    assert "read at" in ended["seen"]
    assert len(ended["hosts"]) == 1
