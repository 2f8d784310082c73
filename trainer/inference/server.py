"""The HTTP side: routes, keys, errors as OpenAI words them, event streams."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from aiohttp import web

from core.errors import LauncherError
from trainer.inference import access, protocol
from trainer.inference.chat_model import Speaker
from trainer.inference.engine import Piece, Token
from trainer.inference.protocol import Answers, ApiError, Ask
from trainer.inference.sampling import Sampling
from trainer.inference.worker import Busy, Failed, Worker

log = logging.getLogger("serve")
PAGE = Path(__file__).with_name("page.html")
MOST_BODY_BYTES = 1 << 20
# The page needs nothing but itself and this server.
PAGE_POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


class Endpoint:
    """Handlers for one model; `key` is what clients must present, empty for none."""

    def __init__(self, speaker: Speaker, name: str, defaults: Sampling, key: str, most_waiting: int):
        self._speaker = speaker
        self._name = name
        self._defaults = defaults
        self._key = key
        self._most_waiting = most_waiting
        self._worker: Worker | None = None

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_errors_as_json, self._guard], client_max_size=MOST_BODY_BYTES)
        app.cleanup_ctx.append(self._with_worker)
        app.router.add_get("/", self._page)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._model)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat_completions)
        return app

    async def _with_worker(self, _: web.Application) -> AsyncIterator[None]:
        self._worker = Worker(self._speaker.engine, self._most_waiting)
        yield
        await self._worker.stop()

    @web.middleware
    async def _guard(self, request: web.Request, handler) -> web.StreamResponse:
        if not self._key:
            # Without a key only this computer may ask; a page elsewhere whose name points here is not from it.
            if not access.is_loopback(access.name_in(request.host)):
                problem = f"the host {request.host!r} is not this computer; set {access.KEY} to serve others"
                raise ApiError(403, problem)
        elif request.path.startswith("/v1/") and not access.presents(
            self._key, request.headers.get("Authorization", "")
        ):
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

    async def _model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name != self._name:
            raise ApiError(404, f"the model {name!r} does not exist; this is {self._name}", "model", "model_not_found")
        return web.json_response(self._about())

    def _about(self) -> dict[str, Any]:
        about = {"id": self._name, "object": "model", "created": 0, "owned_by": "local"}
        # Not OpenAI's: whether it takes conversations, and how long texts may be.
        return about | {"chat": self._speaker.tuned, "context": self._speaker.engine.context}

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._respond(request, chat=False)

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._respond(request, chat=True)

    async def _respond(self, request: web.Request, chat: bool) -> web.StreamResponse:
        # Browsers ask before they send JSON to another site, and are not answered: no page elsewhere gets through.
        if request.content_type != "application/json":
            raise ApiError(415, f"the content type is {request.content_type}, must be application/json")
        try:
            body = await request.json()
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON: {error}") from None
        ask = protocol.read(body, self._speaker, self._name, self._defaults, chat)
        answers = Answers(self._name, chat)
        async with aclosing(self._worker.stream(ask.requests)) as pieces:
            if ask.stream:
                return await self._stream(request, pieces, ask, answers, chat)
            texts: list[list[str]] = [[] for _ in ask.requests]
            tokens: list[list[Token]] = [[] for _ in ask.requests]
            finishes = ["length"] * len(ask.requests)
            async for piece in pieces:
                texts[piece.number].append(piece.text)
                tokens[piece.number] += [piece.token] if piece.token else []
                finishes[piece.number] = piece.finish or finishes[piece.number]
        choices = [("".join(text), found, finish) for text, found, finish in zip(texts, tokens, finishes, strict=True)]
        return web.json_response(answers.whole(choices, ask))

    async def _stream(
        self, request: web.Request, pieces: AsyncIterator[Piece], ask: Ask, answers: Answers, chat: bool
    ) -> web.StreamResponse:
        piece = await anext(pieces)  # what is wrong with the request shows here, while the status can still say so
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)

        async def send(event: dict[str, Any] | str) -> None:
            text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
            await response.write(f"data: {text}\n\n".encode())

        if chat:
            for index in range(len(ask.requests)):
                await send(answers.opening(index, ask))
        count, offsets = 0, [0] * len(ask.requests)
        held: list[list[Token]] = [[] for _ in ask.requests]  # tokens whose text is held back
        try:
            while piece is not None:
                count += piece.token is not None
                held[piece.number] += [piece.token] if piece.token else []
                if piece.text or piece.finish:
                    tokens, held[piece.number] = held[piece.number], []
                    await send(answers.part(piece.number, piece.text, tokens, piece.finish, ask, offsets[piece.number]))
                    offsets[piece.number] += len(piece.text)
                piece = await anext(pieces, None)
            if ask.with_usage:
                await send(answers.closing(ask, count))
            await send("[DONE]")
        except Failed as error:
            await send(ApiError(500, str(error)).body)
        except ConnectionError:
            log.debug("a client went away before its answer's end")
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
    except web.HTTPException as error:
        failure = ApiError(error.status, f"{request.method} {request.path}: {error.reason}")
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        failure = ApiError(500, "this server failed; its log says why")
    return web.json_response(failure.body, status=failure.status)
