"""Sorts the refusals of an endpoint by the status and the body of its response.

Endpoints use the same status differently: 403 means a flagged prompt at one endpoint and a wrong key at another. The
body shows whether a refusal concerns one prompt (it is left out), all prompts (the program stops) or only the moment
(the call is repeated).
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from core import secrets

# The kinds of refusals:
# again: a retry may help. prompt: this prompt is refused. setting: a parameter that every call sends is refused.
# unclear: the answer does not say whether the prompt or a parameter is refused. credit: the account has no credit left.
# key: OPENAI_API_KEY is wrong. address: endpoint.url is wrong.
Kind = Literal["again", "prompt", "unclear", "setting", "credit", "key", "address"]

_RETRIED = (408, 409, 425, 429)
_BAD_REQUEST = (400, 413, 422)
_CREDIT_CODES = {
    "insufficient_quota",
    "insufficient_balance",
    "insufficient_credits",
    "insufficient_credit",
    "insufficient_funds",
    "billing_hard_limit_reached",
    "billing_not_active",
    "exceeded_current_quota_error",
    "payment_required",
    "arrearage",
}
_CREDIT = re.compile(r"insufficient (account )?(credit|balance|fund|quota)|credit balance is too low|out of credits?\b")
_MODERATION_CODES = {
    "content_filter",
    "content_policy_violation",
    "responsibleaipolicyviolation",
    "moderation_blocked",
    "invalid_prompt",
    "data_inspection_failed",
    "datainspectionfailed",
}
_MODERATION = re.compile(
    r"\bflagged\b|moderation|content (management )?polic|content.?filter|safety (system|filter|polic)|usage polic|"
    r"inappropriate content"
)
# A refusal of moderation must also have one of these words: "Your account was flagged" does not concern a prompt.
_ON_A_PROMPT = re.compile(r"\b(prompt|input|content|messages?)\b")
_LENGTH_CODES = {"context_length_exceeded", "string_above_max_length"}
_LENGTH = re.compile(r"context (length|window|size)|prompt is too long|input is too long|too many (input )?tokens")
_CONTEXT = re.compile(r"context (?:length|window|size) (?:is|of) (\d+)")
_ABOUT_A_VALUE = re.compile(
    r"support|must|should|range|invalid|between|less|greater|at most|at least|too (large|high|small)|unknown|"
    r"unrecogni[sz]ed|deprecated|permitted|allowed|both|extra|expected|exceed|maximum"
)
_SYSTEM = re.compile(r"\b(system|developer) (role|message|prompt|instruction)|does not support 'system'")


@dataclass(frozen=True)
class Refusal:
    """`said` quotes the endpoint. For the kind `setting`, `parameter` is the refused parameter."""

    kind: Kind
    said: str
    parameter: str = ""


@dataclass
class _Body:
    codes: set[str] = field(default_factory=set)
    parameters: list[str] = field(default_factory=list)
    text: str = ""


def sort(status: int, data: bytes, sent: Mapping[str, Any]) -> Refusal:
    """Sorts the response to a call with the parameters `sent`, which include `system` if there is a system message."""
    # The body of a 401 may repeat the key, or most of it, so it is not quoted.
    said = "" if status == 401 else secrets.scrub(" ".join(data.decode(errors="replace").split()))[:200]
    body = _read(data)
    if status == 402 or (400 <= status < 500 and (body.codes & _CREDIT_CODES or _CREDIT.search(body.text))):
        return Refusal("credit", said)
    if status in _RETRIED or status >= 500:
        return Refusal("again", said)
    if status in (400, 403, 422) and _is_moderation(body):
        return Refusal("prompt", said)
    if status in _BAD_REQUEST:
        if status == 413 or body.codes & _LENGTH_CODES or _LENGTH.search(body.text):
            limit = _CONTEXT.search(body.text)
            name = _limit_of(sent)
            if limit and name and sent[name] >= int(limit[1]):
                return Refusal("setting", said, name)
            return Refusal("prompt", said)
        parameter = _parameter(body, sent)
        return Refusal("setting", said, parameter) if parameter else Refusal("unclear", said)
    return Refusal("key" if status in (401, 403) else "address", said)


def status_within(document: Any) -> int | None:
    """The status of an error that a gateway sends as an answer with status 200, or None for other answers."""
    error = document.get("error") if isinstance(document, dict) else None
    if not error or document.get("choices"):
        return None
    code = error.get("code") if isinstance(error, dict) else None
    try:
        status = int(code)
    except (TypeError, ValueError):
        return 500
    return status if 400 <= status < 600 else 500


def _is_moderation(body: _Body) -> bool:
    return bool(body.codes & _MODERATION_CODES or (_MODERATION.search(body.text) and _ON_A_PROMPT.search(body.text)))


def _parameter(body: _Body, sent: Mapping[str, Any]) -> str:
    """The parameter of our call that the endpoint names in its error.

    It is empty if the endpoint names no parameter.
    """
    for named in body.parameters:
        if named in sent and named != "messages":
            return named
    if "system" in sent and _SYSTEM.search(body.text):
        return "system"
    if _ABOUT_A_VALUE.search(body.text):
        for name in sent:
            if name not in ("messages", "model", "system") and re.search(rf"\b{name}\b", body.text):
                return name
    return "model" if "model_not_found" in body.codes else ""


def _limit_of(sent: Mapping[str, Any]) -> str:
    return next((name for name in ("max_tokens", "max_completion_tokens") if name in sent), "")


def _read(data: bytes) -> _Body:
    """Codes, parameters and messages of an error in any known format. Text that repeats the prompt is ignored."""
    text = data.decode(errors="replace")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return _Body(text=text.casefold())
    body = _Body()
    said = []
    for key, value in _fields(document):
        if key in ("code", "type", "status", "reason"):
            body.codes.add(str(value).casefold())
        elif key in ("param", "parameter", "loc", "field"):
            body.parameters.append(str(value))
        elif key in ("message", "msg", "detail", "error", "title", "raw", "errors") and isinstance(value, str):
            said.append(value)
    body.text = " ".join(said).casefold()
    return body


def _fields(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields (field name, value) of all scalars. A field `raw` may hold the JSON of another endpoint as text."""
    if depth > 8:
        return
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _fields(each, str(name), depth + 1)
    elif isinstance(value, list):
        for each in value:
            yield from _fields(each, key, depth + 1)
    elif key == "raw" and isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            yield from _fields(json.loads(value), key, depth + 1)
        except (ValueError, RecursionError):
            yield key, value
    else:
        yield key, value
