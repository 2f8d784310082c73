"""Calls an OpenAI-compatible chat endpoint within a budget and classifies its failures.

The key from OPENAI_API_KEY goes into the Authorization header only. Without a key, the client sends none, as a local
server expects.
"""

import asyncio
import email.utils
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from core.errors import ConfigError
from core.settings.tuning import BudgetConfig, EndpointConfig, MakeConfig

LARGEST_REPLY_BYTES = 16 << 20
# Upper bound of the tokens that a chat template adds per message.
TOKENS_PER_MESSAGE = 32
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504)
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Reply:
    """An answer. `finish` is the endpoint's reason: stop, length, content_filter, ..."""

    text: str
    finish: str
    model: str
    input_tokens: int
    output_tokens: int
    usd: float


class TransientError(Exception):
    """A failure that a retry may resolve. `usd` is the maximum cost of the failed call."""

    def __init__(self, why: str, usd: float, after_seconds: float | None = None):
        super().__init__(why)
        self.usd = usd
        self.after_seconds = after_seconds


class RejectedPrompt(Exception):
    """The endpoint refuses this prompt. A retry would not help."""


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
        """Maximum cost of a call. A token has at least one byte."""
        size = sum(len(message["content"].encode()) + TOKENS_PER_MESSAGE for message in messages)
        return self.usd(size + TOKENS_PER_MESSAGE, max_tokens)

    async def reserve(self, usd: float) -> bool:
        """Waits until `usd` fit the budget. Returns False if they cannot, whatever the calls in flight cost."""
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


class EndpointClient:
    """Async context manager: `async with EndpointClient(...) as client: reply = await client.ask(messages)`."""

    def __init__(self, config: EndpointConfig, synthesis: MakeConfig, budget: Budget, key: str):
        self.host = urlsplit(config.url).netloc
        self._url = config.url.rstrip("/") + "/chat/completions"
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
        """Asks once. Raises TransientError, RejectedPrompt, or ConfigError for a failure that all calls would have."""
        synthesis = self._synthesis
        most = self._budget.usd_at_most(messages, synthesis.max_tokens)
        body = {
            "model": self._config.model,
            "messages": list(messages),
            "temperature": synthesis.temperature,
            "top_p": synthesis.top_p,
            "max_tokens": synthesis.max_tokens,
        }
        try:
            async with self._session.post(self._url, json=body, allow_redirects=False) as response:
                data = await _content(response)
                after = _retry_after(response.headers.get("Retry-After"))
                status = response.status
        except aiohttp.ClientConnectorError as error:
            raise TransientError(f"cannot be reached ({type(error).__name__})", 0.0) from error
        except TimeoutError as error:
            # The endpoint may bill the call, so it counts at its maximum cost.
            raise TransientError(f"gave no answer within {self._config.timeout_seconds:g} s", most) from error
        except (aiohttp.ClientError, ValueError) as error:
            raise TransientError(f"broke off ({type(error).__name__})", most) from error
        if status != 200:
            self._raise(status, data, after)
        return self._reply(data, most)

    def _raise(self, status: int, data: bytes, after: float | None) -> None:
        said = " ".join(data.decode(errors="replace").split())[:200]
        if status in TRANSIENT:
            raise TransientError(f"answered {status}: {said}", 0.0, after)
        if status in (400, 413, 422):
            raise RejectedPrompt(f"answered {status}: {said}")
        remedy = "check OPENAI_API_KEY" if status in (401, 403) else "check endpoint.url and endpoint.model"
        raise ConfigError(f"{self._url}: answered {status}: {said}; {remedy}")

    def _reply(self, data: bytes, most: float) -> Reply:
        try:
            document: Any = json.loads(data)
            choice, usage = document["choices"][0], document["usage"]
            text = choice["message"]["content"] or ""
            tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            if not isinstance(text, str) or min(tokens) < 0:
                raise ValueError("the content is not a text, or the usage is negative")
            finish, model = str(choice.get("finish_reason")), str(document.get("model", self._config.model))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise TransientError(f"answered with no chat completion ({type(error).__name__}: {error})", most) from error
        return Reply(text, finish, model, *tokens, self._budget.usd(*tokens))


async def _content(response: aiohttp.ClientResponse) -> bytes:
    """The body of a reply. Raises ValueError for one above LARGEST_REPLY_BYTES."""
    parts, size = [], 0
    async for part in response.content.iter_chunked(1 << 16):
        size += len(part)
        if size > LARGEST_REPLY_BYTES:
            raise ValueError("the reply is too long")
        parts.append(part)
    return b"".join(parts)


def _retry_after(text: str | None) -> float | None:
    """Seconds to wait. The header has seconds or a date (RFC 9110, section 10.2.3)."""
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
