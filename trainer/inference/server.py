"""Serves one model over HTTP: routes, API key, OpenAI's error format, event streams."""

import asyncio
import hmac
import ipaddress
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from aiohttp import web

from core import untrusted
from core.errors import LauncherError
from core.settings.inference import Sampling
from trainer.inference import protocol
from trainer.inference.chat_model import ChatModel
from trainer.inference.connections import Connections
from trainer.inference.engine import Piece, Token
from trainer.inference.protocol import ApiError, ApiRequest, ApiResponse
from trainer.inference.worker import Busy, Failed, Worker

log = logging.getLogger("serve")
KEY = "SERVE_API_KEY"
PAGE = Path(__file__).with_name("page.html")
ANSWERS = ("/v1/completions", "/v1/chat/completions")
MOST_BODY_BYTES = 1 << 20
BODY_SECONDS = 30.0
# The page loads nothing but itself and connects to this server only.
PAGE_POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


class HttpServer:
    """HTTP handlers for one model. Clients must present `key` unless it is empty."""

    def __init__(self, model: ChatModel, name: str, defaults: Sampling, key: str, most_waiting: int):
        self._model = model
        self._name = name
        self._defaults = defaults
        self._key = key
        self._most_waiting = most_waiting
        self._worker: Worker | None = None
        self._connections: Connections | None = None
        self._open = 0  # requests in progress
        self._used_at = time.monotonic()  # the last time at which a request came or ended

    def idle_seconds(self) -> float:
        """Seconds since the last request for an answer arrived or ended, or 0 while one is in progress."""
        return 0.0 if self._open else time.monotonic() - self._used_at

    def watch(self, connections: Connections) -> None:
        """Tell `connections` of each request that has arrived."""
        self._connections = connections

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_errors_as_json, self._guard], client_max_size=MOST_BODY_BYTES)
        app.cleanup_ctx.append(self._with_worker)
        app.router.add_get("/", self._page)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._named_model)
        for path, handler in zip(ANSWERS, (self._completions, self._chat_completions), strict=True):
            app.router.add_post(path, handler)
        return app

    async def _with_worker(self, _: web.Application) -> AsyncIterator[None]:
        self._worker = Worker(self._model.engine, self._most_waiting)
        yield
        await self._worker.stop()

    @web.middleware
    async def _guard(self, request: web.Request, handler) -> web.StreamResponse:
        if self._connections:
            self._connections.heard(request.transport)
        if not self._key:
            # Without a key, only requests from this computer are allowed. A foreign web page can use a domain name that
            # resolves to this computer (DNS rebinding). The Host header then holds that name, and the request is
            # refused.
            if not is_loopback(name_in(request.host)):
                problem = f"the host {request.host!r} is not this computer; set {KEY} to serve others"
                raise ApiError(403, problem)
        elif request.path.startswith("/v1/") and not presents(self._key, request.headers.get("Authorization", "")):
            problem = "the API key is missing or wrong; send Authorization: Bearer KEY"
            raise ApiError(401, problem, code="invalid_api_key")
        return await handler(request)

    async def _page(self, _: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return web.Response(text=PAGE.read_text(encoding="utf-8"), content_type="text/html", headers=headers)

    async def _health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._about()]})

    async def _named_model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name != self._name:
            raise ApiError(404, f"the model {name!r} does not exist; this is {self._name}", "model", "model_not_found")
        return web.json_response(self._about())

    def _about(self) -> dict[str, Any]:
        about = {"id": self._name, "object": "model", "created": 0, "owned_by": "local"}
        # OpenAI's API does not have these fields. They say whether the model takes conversations, and give its context.
        return about | {"chat": self._model.tuned, "context": self._model.engine.context}

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._respond(request, chat=False)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._respond(request, chat=True)

    async def _respond(self, request: web.Request, chat: bool) -> web.StreamResponse:
        self._open += 1
        try:
            return await self._answer(request, chat)
        finally:
            self._open -= 1
            self._used_at = time.monotonic()

    async def _answer(self, request: web.Request, chat: bool) -> web.StreamResponse:
        # A browser sends JSON to another site only after a preflight request. This server does not answer preflight
        # requests, so web pages of other sites cannot use it.
        if request.content_type != "application/json":
            raise ApiError(415, f"the content type is {request.content_type}, must be application/json")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = untrusted.parse_json(await request.read())
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}") from None
        # Encode in a thread: a megabyte of text takes a second, and other clients need their tokens meanwhile.
        api_request = await asyncio.to_thread(protocol.read, body, self._model, self._name, self._defaults, chat)
        answers = ApiResponse(self._name, chat)
        async with aclosing(self._worker.stream(api_request.requests)) as pieces:
            if api_request.stream:
                return await self._stream(request, pieces, api_request, answers, chat)
            texts: list[list[str]] = [[] for _ in api_request.requests]
            tokens: list[list[Token]] = [[] for _ in api_request.requests]
            finishes = ["length"] * len(api_request.requests)
            async for piece in pieces:
                texts[piece.number].append(piece.text)
                tokens[piece.number] += [piece.token] if piece.token else []
                finishes[piece.number] = piece.finish or finishes[piece.number]
        choices = [("".join(text), found, finish) for text, found, finish in zip(texts, tokens, finishes, strict=True)]
        return web.json_response(answers.whole(choices, api_request))

    async def _stream(
        self,
        request: web.Request,
        pieces: AsyncIterator[Piece],
        api_request: ApiRequest,
        answers: ApiResponse,
        chat: bool,
    ) -> web.StreamResponse:
        piece = await anext(pieces)  # raises the request's errors before the status is sent
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)

        async def send(event: dict[str, Any] | str) -> None:
            text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
            await response.write(f"data: {text}\n\n".encode())

        if chat:
            for index in range(len(api_request.requests)):
                await send(answers.opening(index, api_request))
        count, offsets = 0, [0] * len(api_request.requests)
        held: list[list[Token]] = [[] for _ in api_request.requests]  # tokens whose text the engine holds back
        try:
            while piece is not None:
                count += piece.token is not None
                held[piece.number] += [piece.token] if piece.token else []
                if piece.text or piece.finish:
                    tokens, held[piece.number] = held[piece.number], []
                    await send(
                        answers.part(piece.number, piece.text, tokens, piece.finish, api_request, offsets[piece.number])
                    )
                    offsets[piece.number] += len(piece.text)
                piece = await anext(pieces, None)
            if api_request.with_usage:
                await send(answers.closing(api_request, count))
            await send("[DONE]")
        except Failed as error:
            await send(ApiError(500, str(error)).body)
        except ConnectionError:
            log.debug("a client disconnected before the end of its answer")
        return response


@web.middleware
async def _errors_as_json(request: web.Request, handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        failure = error
    except Busy as error:
        failure = ApiError(429, str(error), code="queue_full")
    except Failed as error:
        failure = ApiError(500, str(error))
    except LauncherError as error:
        failure = ApiError(400, str(error))
    except web.HTTPNotFound:
        failure = ApiError(404, f"{request.method} {request.path}: this server has {' and '.join(ANSWERS)}")
    except web.HTTPException as error:
        failure = ApiError(error.status, f"{request.method} {request.path}: {error.reason}")
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        failure = ApiError(500, "internal error; see the server's log")
    return web.json_response(failure.body, status=failure.status)


# --- access ----------------------------------------------------------------------------------------------------


def api_key() -> str:
    """The key from the environment. It is empty if none is set."""
    return os.environ.get(KEY, "").strip()


def presents(key: str, authorization: str) -> bool:
    """Whether an Authorization header contains the key."""
    scheme, _, given = authorization.partition(" ")
    # A comparison in constant time does not leak the key through its duration.
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(errors="replace"), key.encode())


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this computer's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def name_in(host: str) -> str:
    """The host in a Host header, without port and brackets."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
