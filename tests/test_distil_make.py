"""Synthetic data from an endpoint that fails, over real HTTP: nothing lost, nothing paid twice, never over budget."""

import json
import signal
import time

import pytest

from core import storage
from core.data import sets
from core.run import journal
from core.run.reader import read_run
from costs.report import build
from tests import launching, tuning
from tests.fake_endpoint import KEY, FakeEndpoint
from tests.patience import PATIENCE_SECONDS
from trainer.synthesis import answers
from trainer.synthesis.endpoint import _retry_after

MODULE = "trainer.synthesize"


def flags_of(endpoint: FakeEndpoint, tmp_path, *more: str) -> list[str]:
    return [
        f"--make.prompts={tmp_path / 'prompts.txt'}",
        f"--make.url={tmp_path / 'data'}",
        "--make.licence=made up for a test",
        f"--run.url={tmp_path / 'run'}",
        f"--endpoint.url={endpoint.url}",
        "--endpoint.model=large",
        "--endpoint.timeout_seconds=2",
        "--endpoint.concurrency=4",
        "--make.max_tokens=100",
        *more,
    ]


def write_prompts(tmp_path, count: int, *more: str) -> None:
    lines = [f"What is number {number}?" for number in range(count)]
    (tmp_path / "prompts.txt").write_text("\n".join([*lines, *more]) + "\n")


def make(*arguments: str, key: str = KEY) -> str:
    constants = {"trainer.synthesis.make.FIRST_PAUSE_SECONDS": 0.05}
    return tuning.run_alone(MODULE, *arguments, environment={"OPENAI_API_KEY": key}, constants=constants)


def test_an_endpoint_that_fails_one_call_in_five(tmp_path):
    write_prompts(tmp_path, 40, "what is  NUMBER 1?", "Tell it at length.", "Say it in one word.")
    with FakeEndpoint() as endpoint:
        output = make(*flags_of(endpoint, tmp_path))
    assert "42 prompts, and 1 duplicates of them" in output
    assert "40 rows, 0 duplicates left out; other answers left out: 1 cut off at max_tokens, 1 empty" in output
    assert KEY not in output
    assert set(endpoint.calls) == {"answer", "hang", "500", "429", "garbage", "broken"}
    assert max(endpoint.prompts.values()) == 1, "no prompt was paid twice"
    assert 1 < endpoint.most_at_once <= 4
    rows = sets.read(str(tmp_path / "data"), "synthetic")
    assert {row["messages"][0]["content"] for row in rows} == {f"What is number {number}?" for number in range(40)}
    provenance = rows[0]["provenance"]
    assert provenance["model"] == "large-2026-11-20"
    assert provenance["endpoint"] == endpoint.url.split("/")[2]
    assert provenance["parameters"]["max_tokens"] == 100
    assert len(provenance["prompt_sha256"]) == 64
    assert sets.info_of(str(tmp_path / "data"), "synthetic").licence == "made up for a test"
    assert tuning.stage_in_report(str(tmp_path / "run")) == ("distil", 1)
    for info in storage.list_objects(str(tmp_path)):
        assert KEY.encode() not in storage.read_bytes(info.uri), info.uri


def test_killed_it_goes_on_without_asking_again(tmp_path):
    write_prompts(tmp_path, 30)
    with FakeEndpoint(faults=False, seconds_per_call=0.1) as endpoint:
        arguments = flags_of(endpoint, tmp_path)
        process = tuning.start_alone(MODULE, *arguments, environment={"OPENAI_API_KEY": KEY})
        launching.wait_until(lambda: len(endpoint.prompts) > 8, process)
        launching.kill(process)
        time.sleep(0.5)  # the endpoint finishes what it was asked
        stored = set(answers.read_answers(str(tmp_path / "run")).rows)
        answered = sum(endpoint.prompts.values())
        make(*arguments)
        assert answered - 4 <= len(stored) <= answered, "only calls in flight can be lost"
        assert sum(endpoint.prompts.values()) == 30 + answered - len(stored)
    assert len(sets.read(str(tmp_path / "data"), "synthetic")) == 30
    assert tuning.stage_in_report(str(tmp_path / "run")) == ("distil", 2)
    before = storage.list_names(str(tmp_path / "run" / "answers"))
    assert len(before) == 2


def test_asked_to_stop_it_waits_for_what_is_in_flight(tmp_path):
    write_prompts(tmp_path, 2000)  # so many that none is left to ask before a busy machine sends the signal
    with FakeEndpoint(faults=False, seconds_per_call=0.3) as endpoint:
        arguments = flags_of(endpoint, tmp_path)
        process = tuning.start_alone(MODULE, *arguments, environment={"OPENAI_API_KEY": KEY})
        launching.wait_until(lambda: len(endpoint.prompts) > 4, process)
        process.send_signal(signal.SIGTERM)
        code, output = launching.finish(process)
    assert code == 33, output
    assert len(answers.read_answers(str(tmp_path / "run")).rows) == sum(endpoint.prompts.values()) < 2000


def test_who_waits_for_a_slow_answer_shows_a_sign_of_life(tmp_path):
    """A supervisor that saw none would take the machine for a bad one."""
    write_prompts(tmp_path, 1)
    file = tmp_path / "pulse"
    signs = []

    def says(body):
        launching.wait_until(file.exists, process)
        first = file.stat().st_mtime_ns
        launching.wait_until(lambda: file.stat().st_mtime_ns > first, process)
        signs.append(first)

    with FakeEndpoint(faults=False, says=says) as endpoint:
        arguments = flags_of(endpoint, tmp_path, f"--endpoint.timeout_seconds={PATIENCE_SECONDS}")
        environment = {"OPENAI_API_KEY": KEY, "PULSE_FILE": str(file)}
        process = tuning.start_alone(MODULE, *arguments, environment=environment)
        code, output = launching.finish(process)
    assert code == 0, output
    assert len(signs) == 1


def spent(tmp_path) -> float:
    return answers.read_answers(str(tmp_path / "run")).usd


def test_the_machines_have_a_cap_of_their_own(tmp_path):
    write_prompts(tmp_path, 40)
    environment = {"OPENAI_API_KEY": KEY, "USD_PER_HOUR": "3600"}
    with FakeEndpoint() as endpoint:
        arguments = flags_of(endpoint, tmp_path, "--run.max_usd=1")
        code, output = launching.finish(tuning.start_alone(MODULE, *arguments, environment=environment))
    assert code == 34, output
    assert "stopped by the cap on the machines" in output
    assert not endpoint.prompts


def test_the_budget_is_never_exceeded_and_a_larger_one_goes_on(tmp_path):
    """A call costs 0.03 dollars and at most 0.1 + what its prompt can be."""
    write_prompts(tmp_path, 40)
    prices = ["--budget.usd_per_million_input=1000", "--budget.usd_per_million_output=1000"]
    with FakeEndpoint(faults=False) as endpoint:
        for limit, least in (("0.5", 0.2), ("0.9", 0.6)):
            arguments = flags_of(endpoint, tmp_path, *prices, f"--budget.max_usd={limit}")
            code, output = launching.finish(tuning.start_alone(MODULE, *arguments, environment={"OPENAI_API_KEY": KEY}))
            assert code == 34, output
            assert "stopped by the budget" in output
            assert spent(tmp_path) == pytest.approx(0.03 * endpoint.calls["answer"])
            assert least < spent(tmp_path) <= float(limit)
            rows = sets.read(str(tmp_path / "data"), "synthetic")
            assert len(rows) == endpoint.calls["answer"]
        make(*flags_of(endpoint, tmp_path, *prices, "--budget.max_usd=10"))
    assert len(sets.read(str(tmp_path / "data"), "synthetic")) == 40
    run = read_run(str(tmp_path / "run"))
    [api] = [line for line in build(run, run.segments[-1].ended_at).phases if line.name == "api"]
    assert api.usd == pytest.approx(spent(tmp_path))


def test_calls_whose_end_is_not_known_count_in_full(tmp_path):
    folder = str(tmp_path / "answers" / "segment-000001")
    book = journal.Journal(folder)
    for event in (
        {"event": "begun", "key": "a/0", "usd": 2.0},
        {"event": "failed", "key": "a/0", "why": "answered 500", "usd": 0.0},
        {"event": "begun", "key": "a/0", "usd": 2.0},
        {"event": "answer", "key": "a/0", "row": {"messages": []}, "usd": 0.5},
        {"event": "begun", "key": "b/0", "usd": 2.0},
    ):
        book.add(event)
    assert book.close()
    known = answers.read_answers(str(tmp_path))
    assert known.usd == 2.5
    assert list(known.rows) == ["a/0"]


def test_bad_input_is_one_sentence(tmp_path):
    write_prompts(tmp_path, 3)

    def refused(*flags: str, key: str = KEY) -> str:
        return tuning.refused(MODULE, *flags, environment={"OPENAI_API_KEY": key})

    with FakeEndpoint(faults=False) as endpoint:
        assert "answered 401" in refused(*flags_of(endpoint, tmp_path), key="wrong")
        prices = "--budget.usd_per_million_output=10"
        assert "max_usd: is 0, but answers have a price" in refused(*flags_of(endpoint, tmp_path, prices))
        assert "make.licence: is empty" in refused(*flags_of(endpoint, tmp_path, "--make.licence="))
        (tmp_path / "rows.jsonl").write_text('{"prompt": "good"}\n{"prompt": ""}\n')
        line = refused(*flags_of(endpoint, tmp_path, f"--make.prompts={tmp_path / 'rows.jsonl'}"))
        assert "rows.jsonl: line 2 has an empty message" in line
        sets.write(str(tmp_path / "data"), "synthetic", "conversations", "elsewhere", "CC0", b"{}\n")
        assert "holds a set 'synthetic' already (elsewhere)" in refused(*flags_of(endpoint, tmp_path))
        assert sets.info_of(str(tmp_path / "data"), "synthetic").source == "elsewhere"
    gone = refused(*flags_of(endpoint, tmp_path, "--make.name=b", "--endpoint.attempts=1", "--endpoint.concurrency=1"))
    assert "3 answers failed in 1 calls each, the last because it cannot be reached" in gone


def test_retry_after_is_seconds_or_a_date():
    assert _retry_after("7") == 7.0
    assert _retry_after("Fri, 31 Dec 2999 23:59:59 GMT") > 1e9
    assert _retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == 0.0
    assert _retry_after("soon") is None


def test_rows_are_what_finetune_reads(tmp_path):
    write_prompts(tmp_path, 3)
    with FakeEndpoint(faults=False) as endpoint:
        make(*flags_of(endpoint, tmp_path))
    from core.data.sets import conversation

    for line in (tmp_path / "data/sets/synthetic.jsonl").read_text().splitlines():
        assert conversation(json.loads(line))["messages"][1]["content"].startswith("An answer to: ")
