"""Calls an OpenAI-compatible chat endpoint within a budget, and turns its failures into exceptions by their cause.

The key from OPENAI_API_KEY goes into the Authorization header only. If there is no key, the client sends no such
header. Local servers need none.
"""

import asyncio
import email.utils
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from core import secrets
from core.data.sets import text_of
from core.errors import ConfigError, EndpointError
from core.settings.tuning import BudgetConfig, EndpointConfig, MakeConfig
from trainer.synthesis import refusals

LARGEST_REPLY_BYTES = 16 << 20
# Upper bound of the tokens that a chat template adds per message.
TOKENS_PER_MESSAGE = 32
OTHER_RUN = "another run.url (and another make.name, if this run has stored rows)"
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Reply:
    """An answer. `finish` is the endpoint's reason: stop, length, content_filter, ...

    If the endpoint does not report the numbers of tokens, they are None, and `usd` is the most that the call can cost.
    """

    text: str
    finish: str
    model: str
    input_tokens: int | None
    output_tokens: int | None
    usd: float


class TransientError(Exception):
    """A failure that a retry may resolve. `usd` is the maximum cost of the failed call."""

    def __init__(self, why: str, usd: float, after_seconds: float | None = None):
        super().__init__(why)
        self.usd = usd
        self.after_seconds = after_seconds


class RejectedPrompt(Exception):
    """The endpoint refuses this prompt. A retry would not help.

    If `unclear` is true, the refusal may also concern the parameters. All prompts would then be refused.
    """

    def __init__(self, why: str, unclear: bool):
        super().__init__(why)
        self.unclear = unclear


class Budget:
    """Prices of the endpoint, and the money that may still be spent. Calls in flight reserve their maximum cost."""

    def __init__(self, config: BudgetConfig, spent_usd: float):
        self.max_usd = config.max_usd
        self.spent_usd = spent_usd
        self._input = config.usd_per_million_input / 1e6
        self._output = config.usd_per_million_output / 1e6
        self._reserved = 0.0
        self._changed = asyncio.Condition()

    def usd(self, input_tokens: int, output_tokens: int) -> float:
        return input_tokens * self._input + output_tokens * self._output

    def usd_at_most(self, messages: Messages, max_tokens: int) -> float:
        """The maximum cost of a call. A text has at most one token per byte."""
        size = sum(len(message["content"].encode()) + TOKENS_PER_MESSAGE for message in messages)
        return self.usd(size + TOKENS_PER_MESSAGE, max_tokens)

    async def reserve(self, usd: float) -> bool:
        """Waits until the budget has room for `usd`. Returns False if there is no room and no call is in flight."""
        async with self._changed:
            while self.max_usd and self.spent_usd + self._reserved + usd > self.max_usd:
                if not self._reserved:
                    return False
                await self._changed.wait()
            self._reserved += usd
            return True

    async def settle(self, reserved_usd: float, usd: float) -> None:
        """Replaces a reservation by the actual cost."""
        async with self._changed:
            self._reserved = max(0.0, self._reserved - reserved_usd)
            self.spent_usd += usd
            self._changed.notify_all()


def host_of(url: str) -> str:
    """Host and port of a URL, without a user and password before them."""
    return urlsplit(url).netloc.rpartition("@")[2]


class EndpointClient:
    """Async context manager: `async with EndpointClient(...) as client: reply = await client.ask(messages)`."""

    def __init__(self, config: EndpointConfig, synthesis: MakeConfig, budget: Budget, key: str):
        self.host = host_of(config.url)
        base = urlsplit(config.url)
        if key and "@" in base.netloc:
            raise ConfigError(
                f"endpoint.url holds a user and password for {self.host}, and OPENAI_API_KEY is set; a call can send "
                "one of them: leave the other out"
            )
        self._url = urlunsplit(base._replace(path=base.path.rstrip("/") + "/chat/completions"))
        self._config = config
        self._synthesis = synthesis
        self._budget = budget
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "EndpointClient":
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_seconds)
        connector = aiohttp.TCPConnector(limit=self._config.concurrency)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, messages: Messages) -> Reply:
        """Sends one call.

        Raises TransientError, RejectedPrompt, or a LauncherError if all calls would fail in this way.
        """
        most = self._budget.usd_at_most(messages, self._synthesis.max_tokens)
        body = {"model": self._config.model, "messages": list(messages), **self.parameters}
        try:
            async with self._session.post(self._url, json=body, allow_redirects=False) as response:
                data = await _content(response)
                after = _retry_after(response.headers.get("Retry-After"))
                status = response.status
        except aiohttp.ClientConnectorError as error:
            raise TransientError(f"cannot be reached ({type(error).__name__})", 0.0) from error
        except TimeoutError as error:
            # The endpoint may bill the call, so the call counts at its maximum cost.
            raise TransientError(f"gave no answer within {self._config.timeout_seconds:g} s", most) from error
        except (aiohttp.ClientError, ValueError) as error:
            raise TransientError(f"broke off ({type(error).__name__})", most) from error
        if status != 200:
            self._raise(status, data, after, 0.0)
        return self._reply(data, after, most)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of every call, under the endpoint's names."""
        made = self._synthesis
        sampling = {"temperature": made.temperature, "top_p": made.top_p}
        sent = {name: value for name, value in sampling.items() if name not in self._config.omit}
        return {**sent, self._config.limit_parameter: made.max_tokens}

    def _raise(self, status: int, data: bytes, after: float | None, usd: float) -> None:
        system = {"system": self._synthesis.system} if self._synthesis.system else {}
        refusal = refusals.sort(status, data, {"model": self._config.model, **self.parameters, **system})
        said = f"answered {status}" + (f": {refusal.said}" if refusal.said else "")
        url = secrets.scrub(self._url)
        if refusal.kind == "again":
            raise TransientError(said, usd, after)
        if refusal.kind in ("prompt", "unclear"):
            raise RejectedPrompt(said, refusal.kind == "unclear")
        if refusal.kind == "credit":
            raise EndpointError(f"{url}: {said}; the account has no credit left: add some, then run the same command")
        if refusal.kind == "setting":
            raise ConfigError(f"{url}: {said}; it refuses a setting that all calls have: {self._remedy(refusal)}")
        remedy = "check OPENAI_API_KEY, and whether the key may use endpoint.model"
        if refusal.kind == "address":
            remedy = f"check endpoint.url; another endpoint.model needs {OTHER_RUN}"
        raise ConfigError(f"{url}: {said}; {remedy}")

    def _remedy(self, refusal: refusals.Refusal) -> str:
        """Advice on a refused setting, for a message.

        If the setting defines the run, another value of it needs another run.
        """
        name, made = refusal.parameter, self._synthesis
        if name in ("temperature", "top_p"):
            value = getattr(made, name)
            omit = ",".join((*self._config.omit, name))
            return f"make.{name} is {value:g}; leave it to the endpoint with --endpoint.omit={omit}"
        if name == self._config.limit_parameter:
            other = "max_tokens" if name == "max_completion_tokens" else "max_completion_tokens"
            return (
                f"make.max_tokens is {made.max_tokens}, sent as {name}; send it as {other} with "
                f"--endpoint.limit_parameter={other}, or set a value that it takes with {OTHER_RUN}"
            )
        if name == "system":
            return f"make.system is not empty; set --make.system= with {OTHER_RUN}"
        return f"endpoint.model is {self._config.model!r}; name another one with {OTHER_RUN}"

    def _reply(self, data: bytes, after: float | None, most: float) -> Reply:
        try:
            document: Any = json.loads(data)
            status = refusals.status_within(document)
            if status is None:
                choice = document["choices"][0]
                message, finish = choice["message"], str(choice.get("finish_reason"))
                text = text_of(message.get("content")) or ""
                if choice.get("error") or finish == "error":
                    raise ValueError(f"the answer broke off: {choice.get('error')}")
                if not isinstance(text, str):
                    raise ValueError("the content is not a text")
                if message.get("refusal") and not text:
                    finish = "content_filter"
                model = str(document.get("model", self._config.model))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise TransientError(f"answered with no chat completion ({type(error).__name__}: {error})", most) from error
        if status is not None:
            self._raise(status, data, after, most)
        tokens = _usage(document.get("usage"))
        if tokens is None:
            return Reply(text, finish, model, None, None, most)
        return Reply(text, finish, model, *tokens, self._budget.usd(*tokens))


def _usage(usage: Any) -> tuple[int, int] | None:
    """The numbers of tokens of prompt and answer, or None if the endpoint does not report both."""
    if not isinstance(usage, dict):
        return None
    found = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return found if all(type(count) is int and count >= 0 for count in found) else None


async def _content(response: aiohttp.ClientResponse) -> bytes:
    """The body of a reply. Raises ValueError if it is longer than LARGEST_REPLY_BYTES."""
    parts, size = [], 0
    async for part in response.content.iter_chunked(1 << 16):
        size += len(part)
        if size > LARGEST_REPLY_BYTES:
            raise ValueError("the reply is too long")
        parts.append(part)
    return b"".join(parts)


def _retry_after(text: str | None) -> float | None:
    """Seconds to wait, from the header Retry-After. It holds seconds or a date (RFC 9110, section 10.2.3)."""
    if not text:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
