"""What an endpoint refuses is sorted by its status and its body: the moment, a prompt, all of them, credit, the key."""

import json

import pytest

from core import storage
from core.data import sets
from tests import launching, tuning
from tests.fake_endpoint import KEY, FakeEndpoint
from tests.test_distil_make import MODULE, flags_of, spent, write_prompts
from trainer.synthesis import answers, refusals
from trainer.synthesis.endpoint import host_of

SENT = {"model": "m", "temperature": 0.7, "top_p": 1.0, "max_tokens": 512}
FLAGGED = {
    "error": {
        "code": 403,
        "message": "Your chosen model requires moderation and your input was flagged",
        "metadata": {"reasons": ["violence"], "flagged_input": "temperature must be"},
    }
}
NO_QUOTA = {
    "error": {
        "message": "You exceeded your current quota, please check your plan and billing details.",
        "type": "insufficient_quota",
        "code": "insufficient_quota",
    }
}
NEWER = {
    "error": {
        "message": "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
        "instead.",
        "type": "invalid_request_error",
        "param": "max_tokens",
        "code": "unsupported_parameter",
    }
}
TEMPERATURE = {
    "error": {
        "message": "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value "
        "is supported.",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": "unsupported_value",
    }
}


def said(message: str, **more: str) -> dict:
    return {"error": {"message": message, **more}}


@pytest.mark.parametrize(
    ("status", "document", "kind", "parameter"),
    [
        *((status, said("origin"), "again", "") for status in (408, 409, 425, 429, 500, 501, 503, 507, 520, 524, 529)),
        (429, NO_QUOTA, "credit", ""),
        # A limit per minute in the same words: a pause helps.
        (429, said("You exceeded your current quota", status="RESOURCE_EXHAUSTED"), "again", ""),
        (402, said("Payment Required"), "credit", ""),
        (400, said("Your credit balance is too low to access the API", type="invalid_request_error"), "credit", ""),
        (403, said("Insufficient balance"), "credit", ""),
        (403, FLAGGED, "prompt", ""),
        (400, said("The response was filtered by our content management policy", code="content_filter"), "prompt", ""),
        (400, said("Invalid prompt: your prompt was flagged as violating our usage policy"), "prompt", ""),
        (403, said("Your account was flagged for abuse"), "key", ""),
        (403, said("Country, region, or territory not supported"), "key", ""),
        (401, said("Incorrect API key provided"), "key", ""),
        (404, said("Not Found"), "address", ""),
        (301, {}, "address", ""),
        (400, NEWER, "setting", "max_tokens"),
        (400, TEMPERATURE, "setting", "temperature"),
        (400, said("`temperature` and `top_p` cannot both be specified for this model"), "setting", "temperature"),
        (422, {"detail": [{"loc": ["body", "top_p"], "msg": "Input should be less than 1"}]}, "setting", "top_p"),
        (400, {"object": "error", "message": "top_p must be in (0, 1], got 0.", "code": 400}, "setting", "top_p"),
        (400, {"error": {"message": "Provider returned error", "metadata": {"raw": json.dumps(NEWER)}}}, "setting",
         "max_tokens"),
        (400, said("max_tokens is too large: 512. This model supports at most 256 completion tokens"), "setting",
         "max_tokens"),
        (400, said("This model's maximum context length is 256 tokens. You asked for 512"), "setting", "max_tokens"),
        (400, said("This model's maximum context length is 4096 tokens, your messages have 5000. Lower max_tokens"),
         "prompt", ""),
        (400, said("too long", code="context_length_exceeded"), "prompt", ""),
        (413, said("Request entity too large"), "prompt", ""),
        (400, said("invalid model ID", code="model_not_found"), "setting", "model"),
        (400, said("System role not supported"), "setting", "system"),
        (400, said("bad request"), "unclear", ""),
        # The prompt that is echoed does not decide.
        (422, {"detail": [{"loc": ["body", "messages", 0], "msg": "Value error", "input": "temperature must be"}]},
         "unclear", ""),
    ],
)  # fmt: skip
def test_what_a_refusal_means(status, document, kind, parameter):
    found = refusals.sort(status, json.dumps(document).encode(), SENT | {"system": "Be brief."})
    assert (found.kind, found.parameter) == (kind, parameter)


def test_a_refusal_need_not_be_json():
    assert refusals.sort(520, b"<html>", SENT).kind == "again"
    assert refusals.sort(400, b"temperature must be 1", SENT).parameter == "temperature"
    assert refusals.sort(400, b"[" * 100_000, SENT).kind == "unclear"
    assert refusals.sort(403, b"\xff", SENT).kind == "key"


def test_a_401_is_not_quoted_and_no_other_answer_with_its_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "0123456789abcdef")
    echo = json.dumps(said("Incorrect API key provided: 0123****cdef")).encode()
    assert refusals.sort(401, echo, SENT) == refusals.Refusal("key", "")
    for status in (400, 403, 404, 500):
        found = refusals.sort(status, json.dumps(said("no: 0123456789abcdef, sk-abcd****wxyz")).encode(), SENT)
        assert "no: ***, ***" in found.said


def test_keys_in_the_endpoints_url_reach_no_log_and_no_object(tmp_path):
    write_prompts(tmp_path, 2)
    with FakeEndpoint(faults=False) as endpoint:
        code, output = run(endpoint, tmp_path, f"--endpoint.url={endpoint.url}?api-key=very-secret-1")
        assert (code, rows(tmp_path)) == (0, 2), output
        assert host_of("https://me:very-secret-2@host:8/v1") == "host:8"
        url = endpoint.url.replace("://", "://me:very-secret-2@")
        code, more = run(endpoint, tmp_path, f"--endpoint.url={url}")
        assert code == 1
        assert "leave the other out" in more
    objects = [storage.read_bytes(info.uri) for info in storage.list_objects(str(tmp_path))]
    assert len(objects) > 4
    for text in (output.encode(), more.encode(), *objects):
        assert b"very-secret" not in text


def test_an_error_within_an_answer():
    assert refusals.status_within({"error": {"code": 402, "message": "no"}}) == 402
    assert refusals.status_within({"error": "overloaded"}) == 500
    assert refusals.status_within({"choices": [], "error": None}) is None
    assert refusals.status_within([]) is None


def run(endpoint: FakeEndpoint, tmp_path, *more: str) -> tuple[int, str]:
    arguments = flags_of(endpoint, tmp_path, *more)
    return launching.finish(tuning.start_alone(MODULE, *arguments, environment={"OPENAI_API_KEY": KEY}))


def rows(tmp_path) -> int:
    data = str(tmp_path / "data")
    there = storage.exists(storage.join(data, "sets", "synthetic.json"))
    return len(sets.read(data, "synthetic")) if there else 0


def test_a_refused_parameter_stops_and_the_remedy_goes_on_in_the_same_run(tmp_path):
    write_prompts(tmp_path, 6)

    def says(body):
        if "max_tokens" in body:
            return 400, NEWER
        return (400, TEMPERATURE) if "temperature" in body else None

    with FakeEndpoint(faults=False, says=says) as endpoint:
        code, output = run(endpoint, tmp_path)
        assert code == 1
        assert "make.max_tokens is 100, sent as max_tokens; send it as max_completion_tokens with" in output
        assert endpoint.calls["told"] <= 4, "calls in flight only"
        stored = answers.read_answers(str(tmp_path / "run"))
        assert (stored.rows, stored.left_out) == ({}, {})
        code, output = run(endpoint, tmp_path, "--endpoint.limit_parameter=max_completion_tokens")
        assert code == 1
        assert "make.temperature is 0.7; leave it to the endpoint with --endpoint.omit=temperature" in output
        remedies = ("--endpoint.limit_parameter=max_completion_tokens", "--endpoint.omit=temperature")
        code, output = run(endpoint, tmp_path, *remedies)
        assert (code, rows(tmp_path)) == (0, 6), output
        assert endpoint.bodies[-1]["max_completion_tokens"] == 100
    [row, *_] = sets.read(str(tmp_path / "data"), "synthetic")
    assert row["provenance"]["parameters"]["temperature"] is None


def test_a_flagged_prompt_is_left_out_and_can_be_asked_again(tmp_path):
    write_prompts(tmp_path, 5, "How did a weapon of 1800 look?")
    strict = True

    def says(body):
        return (403, FLAGGED) if strict and "weapon" in body["messages"][-1]["content"] else None

    with FakeEndpoint(faults=False, says=says) as endpoint:
        code, output = run(endpoint, tmp_path)
        assert (code, rows(tmp_path)) == (0, 5), output
        assert "other answers left out: 1 declined" in output
        strict = False
        assert run(endpoint, tmp_path)[0] == 0
        assert endpoint.calls["answer"] == 5, "declined is remembered"
        code, output = run(endpoint, tmp_path, "--make.retry_declined=true")
        assert (code, rows(tmp_path)) == (0, 6), output
        assert "other answers left out: none" in output


@pytest.mark.parametrize(
    ("status", "document"), [(429, NO_QUOTA), pytest.param(402, said("Insufficient credits"), marks=pytest.mark.slow)]
)
def test_no_credit_stops_at_once_and_the_same_command_goes_on(tmp_path, status: int, document):
    write_prompts(tmp_path, 6)
    empty = True
    with FakeEndpoint(faults=False, says=lambda body: (status, document) if empty else None) as endpoint:
        code, output = run(endpoint, tmp_path)
        assert code == 1
        assert "the account has no credit left: add some, then run the same command" in output
        assert endpoint.calls["told"] <= 4
        empty = False
        assert run(endpoint, tmp_path)[0] == 0
    assert rows(tmp_path) == 6


def test_an_answer_without_usage_is_kept_at_the_most_it_can_cost(tmp_path):
    write_prompts(tmp_path, 2)
    answer = {"choices": [{"message": {"content": [{"type": "text", "text": "Yes."}]}, "finish_reason": "stop"}]}
    prices = ("--budget.usd_per_million_output=1000", "--budget.max_usd=1")
    with FakeEndpoint(faults=False, says=lambda body: (200, answer)) as endpoint:
        code, output = run(endpoint, tmp_path, *prices)
    assert (code, rows(tmp_path)) == (0, 2), output
    assert output.count("answers without `usage`; each answer is counted at its maximum cost") == 1
    assert spent(tmp_path) == pytest.approx(2 * 100 * 1000 / 1e6)


def test_an_error_in_an_answer_of_status_200_is_no_answer(tmp_path):
    write_prompts(tmp_path, 3)
    refusal = {"choices": [{"message": {"content": None, "refusal": "I cannot."}, "finish_reason": "stop"}]}

    def says(body):
        if "number 0" in body["messages"][-1]["content"]:
            return 200, {"error": FLAGGED["error"]}
        return (200, refusal) if "number 1" in body["messages"][-1]["content"] else None

    with FakeEndpoint(faults=False, says=says) as endpoint:
        code, output = run(endpoint, tmp_path)
    assert (code, rows(tmp_path)) == (0, 1), output
    assert "other answers left out: 2 declined" in output


def test_no_row_of_any_prompt_is_no_success(tmp_path):
    write_prompts(tmp_path, 30)
    fails = True
    with FakeEndpoint(faults=False, says=lambda body: (400, said("bad request")) if fails else None) as endpoint:
        code, output = run(endpoint, tmp_path, "--endpoint.concurrency=1")  # calls under way would be counted too
        assert code == 1
        assert "refused 20 of 30 prompts and answered none, the last because it answered 400" in output
        assert answers.read_answers(str(tmp_path / "run")).left_out == {}
        fails = False
        assert run(endpoint, tmp_path)[0] == 0
    assert rows(tmp_path) == 30


def test_only_declined_prompts_are_no_success(tmp_path):
    write_prompts(tmp_path, 2)
    flags = True
    with FakeEndpoint(faults=False, says=lambda body: (403, FLAGGED) if flags else None) as endpoint:
        code, output = run(endpoint, tmp_path)
        assert code == 1
        assert "none of 2 prompts has a usable answer (2 declined); ask declined prompts again" in output
        flags = False
        assert run(endpoint, tmp_path, "--make.retry_declined=true")[0] == 0
    assert rows(tmp_path) == 2


def test_an_unclear_refusal_of_one_prompt_leaves_it_out(tmp_path):
    write_prompts(tmp_path, 3, "A prompt of odd form.")
    odd = (400, said("bad request"))
    says = lambda body: odd if "odd" in body["messages"][-1]["content"] else None  # noqa: E731
    with FakeEndpoint(faults=False, says=says) as endpoint:
        code, output = run(endpoint, tmp_path)
        assert (code, rows(tmp_path)) == (0, 3), output
        assert run(endpoint, tmp_path)[0] == 0
    assert endpoint.calls["told"] == 1, "the refusal is remembered"
