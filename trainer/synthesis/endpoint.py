"""One call of an OpenAI-compatible chat endpoint, what it cost, and what to do when it fails.

The key comes from OPENAI_API_KEY and goes into the Authorization header, nowhere else; without one none is sent, as
servers of one's own want it.
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
# What a chat template adds to a prompt: an upper bound, like one token per byte of the text.
TOKENS_PER_MESSAGE = 32
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Reply:
    """`usd` by the prices that were set; `finish` as the endpoint says: stop, length, content_filter, ..."""

    text: str
    finish: str
    model: str
    input_tokens: int
    output_tokens: int
    usd: float


class Passing(Exception):
    """A fault that may be gone at the next call. `usd` is what the call may have cost all the same."""

    def __init__(self, why: str, usd: float, after_seconds: float | None = None):
        super().__init__(why)
        self.usd = usd
        self.after_seconds = after_seconds


class Declined(Exception):
    """The endpoint does not answer this prompt, and would not the next time."""


class Prices:
    def __init__(self, budget: BudgetConfig):
        self._input = budget.usd_per_million_input / 1e6
        self._output = budget.usd_per_million_output / 1e6

    def usd(self, input_tokens: int, output_tokens: int) -> float:
        return input_tokens * self._input + output_tokens * self._output

    def most(self, messages: Messages, max_tokens: int) -> float:
        """What a call can cost at most: a token is at least one byte."""
        size = sum(len(message["content"].encode()) + TOKENS_PER_MESSAGE for message in messages)
        return self.usd(size + TOKENS_PER_MESSAGE, max_tokens)


class Endpoint:
    """An async context: `async with Endpoint(...) as endpoint: reply = await endpoint.ask(messages)`."""

    def __init__(self, config: EndpointConfig, asked: MakeConfig, prices: Prices, key: str):
        self.host = urlsplit(config.url).netloc
        self._url = config.url.rstrip("/") + "/chat/completions"
        self._config = config
        self._asked = asked
        self._prices = prices
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Endpoint":
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_seconds)
        connector = aiohttp.TCPConnector(limit=self._config.concurrency)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, messages: Messages) -> Reply:
        """Raises Passing, Declined, or ConfigError for what every call would meet."""
        asked = self._asked
        most = self._prices.most(messages, asked.max_tokens)
        body = {
            "model": self._config.model,
            "messages": list(messages),
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "max_tokens": asked.max_tokens,
        }
        try:
            async with self._session.post(self._url, json=body, allow_redirects=False) as response:
                data = await _content(response)
                after = _retry_after(response.headers.get("Retry-After"))
                status = response.status
        except aiohttp.ClientConnectorError as error:
            raise Passing(f"cannot be reached ({type(error).__name__})", 0.0) from error
        except TimeoutError as error:
            # Whether it will be billed is not known: it counts as if it were, in full.
            raise Passing(f"gave no answer within {self._config.timeout_seconds:g} s", most) from error
        except (aiohttp.ClientError, ValueError) as error:
            raise Passing(f"broke off ({type(error).__name__})", most) from error
        if status != 200:
            self._raise(status, data, after)
        return self._reply(data, most)

    def _raise(self, status: int, data: bytes, after: float | None) -> None:
        said = " ".join(data.decode(errors="replace").split())[:200]
        if status in PASSING:
            raise Passing(f"answered {status}: {said}", 0.0, after)
        if status in (400, 413, 422):
            raise Declined(f"answered {status}: {said}")
        remedy = "check OPENAI_API_KEY" if status in (401, 403) else "check endpoint.url and endpoint.model"
        raise ConfigError(f"{self._url}: answered {status}: {said}; {remedy}")

    def _reply(self, data: bytes, most: float) -> Reply:
        try:
            document: Any = json.loads(data)
            choice, usage = document["choices"][0], document["usage"]
            text = choice["message"]["content"] or ""
            tokens = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
            if not isinstance(text, str) or min(tokens) < 0:
                raise ValueError("a content that is no text, or a negative usage")
            finish, model = str(choice.get("finish_reason")), str(document.get("model", self._config.model))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise Passing(f"answered with no chat completion ({type(error).__name__}: {error})", most) from error
        return Reply(text, finish, model, *tokens, self._prices.usd(*tokens))


async def _content(response: aiohttp.ClientResponse) -> bytes:
    """Raises ValueError for a reply without end."""
    parts, size = [], 0
    async for part in response.content.iter_chunked(1 << 16):
        size += len(part)
        if size > LARGEST_REPLY_BYTES:
            raise ValueError("the reply has no end")
        parts.append(part)
    return b"".join(parts)


def _retry_after(text: str | None) -> float | None:
    """Seconds, which the header gives as such or as a date (RFC 9110, section 10.2.3)."""
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


class Purse:
    """Money that may still be spent. What calls in flight can cost at most is set aside before they begin."""

    def __init__(self, max_usd: float, spent_usd: float):
        self.max_usd = max_usd
        self.spent_usd = spent_usd
        self._aside = 0.0
        self._changed = asyncio.Condition()

    async def set_aside(self, usd: float) -> bool:
        """False if this cannot be afforded, whatever the calls in flight turn out to cost."""
        async with self._changed:
            while self.max_usd and self.spent_usd + self._aside + usd > self.max_usd:
                if not self._aside:
                    return False
                await self._changed.wait()
            self._aside += usd
            return True

    async def settle(self, aside_usd: float, usd: float) -> None:
        async with self._changed:
            self._aside = max(0.0, self._aside - aside_usd)
            self.spent_usd += usd
            self._changed.notify_all()
