"""Notifications of a run's changes, and their way to a server."""

import builtins
import itertools
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.run.reader import read_run
from costs.notify import Watched, changes, keep_looking, sender
from costs.report import CostReport, build
from tests.golden import NOON, GoldenRun, mark, preempted_and_resumed, span
from tests.patience import PATIENCE_SECONDS

CAPPED = {"train": {"steps": 12}, "run": {"max_usd": 5.0}}


def on(run: GoldenRun, now: float) -> CostReport:
    return build(read_run(run.url), now)


def life(tmp_path: Path) -> list[CostReport]:
    """Reports on a run with a cap of $5: at $2.40 and at $2.60, after a kill, on the next machine, at its end."""
    run = GoldenRun(tmp_path / "run", CAPPED)
    first = [mark("restored", step=0), span(NOON, NOON + 240, [[1, 240.0, 0.0]], train=240.0)]
    run.segment(1, NOON, first, usd_per_hour=36.0)
    found = [on(run, NOON + 240)]
    first.append(span(NOON + 240, NOON + 260, [[2, 20.0, 0.0]], train=20.0))
    run.segment(1, NOON, first, usd_per_hour=36.0)
    found += [on(run, NOON + 260), on(run, NOON + 600)]
    second = [mark("restored", step=2), span(NOON + 700, NOON + 840, [[3, 140.0, 0.0]], train=140.0)]
    run.segment(2, NOON + 700, second, usd_per_hour=36.0)
    found.append(on(run, NOON + 840))
    ended = span(NOON + 840, NOON + 950, [[4, 110.0, 0.0]], train=110.0)
    second += [ended, {"event": "end", "time": NOON + 950, "reason": "finished", "step": 4}]
    run.segment(2, NOON + 700, second, usd_per_hour=36.0)
    return [*found, on(run, NOON + 951)]


def test_what_happened_between_two_looks_is_told_once(tmp_path: Path):
    reports = life(tmp_path)
    told = [changes(before, after) for before, after in itertools.pairwise(reports)]
    assert told == [
        ["$2.60 spent, 50 % of $5.00"],
        ["killed: segment 1, at $2.60"],
        ["resumed from step 2: segment 2 on p4d.24xlarge us-east-1a", "$4.00 spent, 80 % of $5.00"],
        ["$5.10 spent, 100 % of $5.00", "finished at step 4, $5.10"],
    ]
    assert [changes(report, report) for report in reports] == [[]] * 5


def test_a_failure_and_an_unknown_price_are_told_without_a_share(tmp_path: Path):
    run = preempted_and_resumed(tmp_path)
    before = on(run, NOON + 370)
    after = replace(before, state="failed", total=replace(before.total, complete=False))
    assert changes(replace(before, state="running"), after) == ["failed at step 12, validation loss 3.5000, $4.92 + ?"]


def test_silence_is_told_once_until_a_heartbeat_comes(tmp_path: Path):
    sent = []
    watched = Watched(lambda title, text: sent.append((title, text)), silent_minutes=15)
    start, going, killed, resumed, finished = life(tmp_path)
    watched.look(start, NOON + 240)
    watched.look(going, NOON + 260)
    sent.clear()
    watched.look(killed, NOON + 600)
    assert [text.partition(":")[0] for _, text in sent] == ["killed"]
    watched.look(killed, NOON + 260 + 901)
    watched.look(killed, NOON + 260 + 960)
    assert sent[1:] == [("run", f"silent for 15 min 01 s ({killed.run})")]
    watched.look(resumed, NOON + 840)
    watched.look(resumed, NOON + 840 + 901)
    assert sum(text.startswith("silent") for _, text in sent) == 2
    watched.look(finished, NOON + 9000)
    assert sum(text.startswith("silent") for _, text in sent) == 2, "a run that has ended is no longer waited for"


def test_without_the_package_or_with_a_wrong_address_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    assert sender({}) is None
    assert sender({"NOTIFY_URLS": " "}) is None
    real = builtins.__import__

    def lacks_apprise(name, *rest, **named):
        if name == "apprise":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", lacks_apprise)
    with pytest.raises(ConfigError, match="NOTIFY_URLS needs the package apprise; run `pip install apprise`"):
        sender({"NOTIFY_URLS": "json://127.0.0.1:1"})


@contextmanager
def sink():
    """The port of a web server, and the messages that it was sent."""
    received, came = [], threading.Event()

    class Sink(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()
            came.set()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Sink)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.server_address[1], received, came
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_messages_reach_a_web_server_and_one_that_is_away_ends_nothing(tmp_path: Path, caplog):
    pytest.importorskip("apprise", reason="the package apprise is not installed: pip install apprise")
    reports = iter(life(tmp_path))
    ended = threading.Event()
    with sink() as (port, received, came):
        watched = Watched.by_environment({"NOTIFY_URLS": f"json://127.0.0.1:{port}/"})
        keep_looking(watched, lambda: [next(reports)], 0.0, ended)
        assert came.wait(PATIENCE_SECONDS)
        ended.set()
    assert received[0]["title"] == "run"
    assert received[0]["message"].startswith("$2.60 spent, 50 % of $5.00")
    sender({"NOTIFY_URLS": f"json://127.0.0.1:{port}/"})("run", "nobody is there")
    assert "notification not delivered: run" in caplog.text
    with pytest.raises(ConfigError, match="does not know the form of address 2 of 2"):
        sender({"NOTIFY_URLS": f"json://127.0.0.1:{port}/, nonsense"})
