"""Translates requests, responses and errors of OpenAI's API for completions and chat completions.

Additional parameters are top_k, min_p and repetition_penalty. An unsupported parameter is an error, unless its value
has no effect.
"""

import dataclasses
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.data import chat_template
from core.data.sets import text_of
from core.errors import DataError
from core.settings.inference import Sampling
from core.settings.loader import SettingError
from trainer.inference.chat_model import ChatModel
from trainer.inference.engine import GenerationRequest, Token

MOST_CHOICES = 16
MOST_PROMPTS = 64
MOST_STOPS = 4  # OpenAI's own limit
MOST_ALTERNATIVES = 20
# OpenAI's name → our name and the type.
_SAMPLING = {
    "max_tokens": ("max_tokens", int),
    "max_completion_tokens": ("max_tokens", int),
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "seed": ("seed", int),
}
_READ = {"model", "prompt", "messages", "stop", "n", "stream", "stream_options", "logprobs", "top_logprobs"}
_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prediction"}
# Unsupported parameters. A parameter is accepted if it has one of the listed values or null, because these values have
# no effect.
_NEUTRAL = {
    "best_of": [1],
    "echo": [False],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "function_call": ["none", "auto"],  # without functions
    "functions": [[]],
    "modalities": [["text"]],
    "parallel_tool_calls": [False, True],  # without tools
    "presence_penalty": [0],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "verbosity": ["medium"],
}


class ApiError(Exception):
    """An error that becomes a response with a status other than 200."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": _error_type(status), "param": param, "code": code}}


@dataclass(frozen=True)
class ApiRequest:
    """A checked request. `requests` holds all choices of the first prompt, then all of the second, and so on."""

    requests: tuple[GenerationRequest, ...]
    stream: bool
    with_usage: bool
    prompt_tokens: int


def read(body: Any, model: ChatModel, name: str, defaults: Sampling, chat: bool) -> ApiRequest:
    """Checks a request's body and translates it. Raises ApiError for an invalid body."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    _check_keys(body)
    if body.get("model") != name:
        raise ApiError(
            404, f"the model {body.get('model')!r} does not exist; this is {name}", "model", "model_not_found"
        )
    prompts = [_conversation(body, model)] if chat else _prompts(body, model)
    sampling = _sampling(body, defaults, chat and model.tuned)
    choices = _number(body, "n", 1, 1, MOST_CHOICES)
    logprobs = _logprobs(body, chat)
    for tokens in prompts:
        if len(tokens) >= model.engine.context:
            raise ApiError(
                400,
                f"the prompt has {len(tokens)} tokens, the model's context is {model.engine.context}; shorten it",
                "messages" if chat else "prompt",
                "context_length_exceeded",
            )
    seeds = [None if sampling.seed is None else sampling.seed + choice for choice in range(choices)]
    requests = tuple(
        GenerationRequest(tokens, dataclasses.replace(sampling, seed=seed), logprobs)
        for tokens in prompts
        for seed in seeds
    )
    stream = _typed(body, "stream", bool, False)
    options = _typed(body, "stream_options", dict, {})
    return ApiRequest(requests, stream, bool(stream and options.get("include_usage")), sum(map(len, prompts)))


class ApiResponse:
    """JSON responses to one request. All events of a stream share their id and time."""

    def __init__(self, name: str, chat: bool):
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
        }

    def whole(self, choices: Sequence[tuple[str, Sequence[Token], str]], request: ApiRequest) -> dict[str, Any]:
        """The complete response. Each choice is (text, tokens, finish reason)."""
        made = []
        for index, (text, tokens, finish) in enumerate(choices):
            said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            logprobs = self._logprobs(tokens, request, 0)
            made.append({"index": index, **said, "logprobs": logprobs, "finish_reason": finish})
        count = sum(len(tokens) for _, tokens, _ in choices)
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": made, "usage": _usage(request, count)}

    def part(
        self, index: int, text: str, tokens: Sequence[Token], finish: str | None, request: ApiRequest, offset: int
    ) -> dict[str, Any]:
        """One event of a stream. `offset` is the position of its text in the answer, in characters."""
        said = {"delta": {"content": text} if text else {}} if self._chat else {"text": text}
        choice = {"index": index, **said, "logprobs": self._logprobs(tokens, request, offset), "finish_reason": finish}
        return self._event([choice], request)

    def opening(self, index: int, request: ApiRequest) -> dict[str, Any]:
        """The first event of a choice in a chat. It names the role."""
        delta = {"role": "assistant", "content": ""}
        return self._event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}], request)

    def closing(self, request: ApiRequest, count: int) -> dict[str, Any]:
        """The last event of a stream. It holds `usage`, the numbers of tokens."""
        return self._event([], request) | {"usage": _usage(request, count)}

    def _event(self, choices: list[dict[str, Any]], request: ApiRequest) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        usage = {"usage": None} if request.with_usage else {}
        return {**self._head, "object": kind, "choices": choices, **usage}

    def _logprobs(self, tokens: Sequence[Token], request: ApiRequest, offset: int) -> dict[str, Any] | None:
        if request.requests[0].logprobs is None or not tokens:
            return None
        if self._chat:
            return {"content": [_chat_logprob(token) for token in tokens], "refusal": None}
        texts = [_text(token.data) for token in tokens]
        offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{_text(other.data): other.logprob for other in token.top} for token in tokens],
            "text_offset": offsets,
        }


def _check_keys(body: Mapping[str, Any]) -> None:
    for key, value in body.items():
        if key in _NEUTRAL:
            if value is not None and value not in _NEUTRAL[key]:
                raise ApiError(400, f"{key} is not supported; leave it out", key, "unsupported_parameter")
        elif key not in _SAMPLING and key not in _READ and key not in _WITHOUT_EFFECT:
            raise ApiError(400, f"unknown parameter {key!r}", key, "unknown_parameter")


def _prompts(body: Mapping[str, Any], model: ChatModel) -> list[list[int]]:
    """Token ids of each prompt.

    A prompt given as text gets a leading end-of-text token, like documents in training; a prompt given as ids gets
    none.
    """
    prompt = body.get("prompt", "")
    if isinstance(prompt, str) or (prompt and _is_tokens(prompt)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not all(isinstance(each, str) or _is_tokens(each) for each in prompt):
        raise ApiError(400, "prompt must be a text, a list of token ids, or a list of either", "prompt")
    if not 1 <= len(prompt) <= MOST_PROMPTS:
        raise ApiError(400, f"prompt has {len(prompt)} entries, must have 1 to {MOST_PROMPTS}", "prompt")
    return [model.engine.encode(each) if isinstance(each, str) else each for each in prompt]


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _conversation(body: Mapping[str, Any], model: ChatModel) -> list[int]:
    if not model.tuned:
        raise ApiError(400, f"{model.name} is a base model without a chat template; use /v1/completions", "messages")
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise ApiError(400, "messages must be a list of objects", "messages")
    turns = [_message(each) for each in messages]
    # Clients send earlier turns back, including empty answers of the model. Training data has no empty turns, so empty
    # answers are left out.
    said = [turn for turn in turns[:-1] if not _is_empty(turn)]
    said += [turn for turn in turns[-1:] if turn["role"] == "user" or not _is_empty(turn)]
    try:
        return model.conversation(said)
    except DataError as error:
        raise ApiError(400, str(error), "messages") from None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if message.get("tool_calls") or message.get("function_call"):
        raise ApiError(400, "messages may contain text only, and no tool calls", "messages")
    try:
        content = text_of(message.get("content"))
    except ValueError:
        raise ApiError(400, "messages may contain text only", "messages") from None
    # OpenAI renamed the role "system" to "developer".
    return {"role": "system" if role == "developer" else role, "content": content}


def _is_empty(turn: Mapping[str, Any]) -> bool:
    content = "" if turn["content"] is None else turn["content"]
    return turn["role"] in chat_template.ROLES and isinstance(content, str) and not content.strip()


def _sampling(body: Mapping[str, Any], defaults: Sampling, is_chat: bool) -> Sampling:
    changes: dict[str, Any] = {}
    for key, (ours, kind) in _SAMPLING.items():
        if body.get(key) is not None:
            changes[ours] = kind(_typed(body, key, (int, float) if kind is float else int, 0))
    stop = body.get("stop")
    if stop is not None:
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list) or len(stop) > MOST_STOPS or not all(isinstance(e, str) and e for e in stop):
            raise ApiError(400, f"stop must be a text or a list of at most {MOST_STOPS}, none of them empty", "stop")
        changes["stop"] = tuple(stop)
    changes["stop"] = changes.get("stop", defaults.stop) + (chat_template.STOP if is_chat else ())
    try:
        return dataclasses.replace(defaults, **changes)
    except SettingError as error:
        theirs = next((key for key, (ours, _) in _SAMPLING.items() if ours == error.key and key in body), error.key)
        raise ApiError(400, f"{theirs} {error.problem}", theirs) from None


def _logprobs(body: Mapping[str, Any], chat: bool) -> int | None:
    if chat:
        wanted = _typed(body, "logprobs", bool, False)
        return _number(body, "top_logprobs", 0, 0, MOST_ALTERNATIVES) if wanted else None
    if body.get("logprobs") is None or body["logprobs"] is False:
        return None
    return _number(body, "logprobs", 0, 0, MOST_ALTERNATIVES)


def _number(body: Mapping[str, Any], key: str, default: int, least: int, most: int) -> int:
    value = _typed(body, key, int, default)
    if not least <= value <= most:
        raise ApiError(400, f"{key} is {value}, must be {least} to {most}", key)
    return value


def _typed(body: Mapping[str, Any], key: str, kind: Any, default: Any) -> Any:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", bool: "true or false", dict: "an object"}
        raise ApiError(400, f"{key} is {value!r}, must be {names.get(kind, 'a number')}", key)
    return value


def _usage(request: ApiRequest, count: int) -> dict[str, int]:
    return {
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": count,
        "total_tokens": request.prompt_tokens + count,
    }


def _chat_logprob(token: Token) -> dict[str, Any]:
    alternatives = [_logprob(other.data, other.logprob) for other in token.top]
    return _logprob(token.data, token.logprob) | {"top_logprobs": alternatives}


def _logprob(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _text(data), "logprob": logprob, "bytes": list(data)}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _error_type(status: int) -> str:
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
