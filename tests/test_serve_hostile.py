"""The server against clients that mean no good: bodies, heads that never end, more connections than it has room for."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from core.settings.inference import Sampling
from tests.patience import PATIENCE_SECONDS
from tests.test_hostile_fuzz import Words
from trainer.inference import server as http
from trainer.inference.chat_model import ChatModel
from trainer.inference.connections import Connections, most_connections

DEEP = b"[" * 100_000 + b"]" * 100_000
HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: "


class Idle(Words):
    """An engine without work."""

    busy = False

    def step(self) -> list:
        return []


@contextlib.asynccontextmanager
async def serving(**bounds) -> AsyncIterator[int]:
    """The port of a server in this process, around its real handlers."""
    made = http.HttpServer(ChatModel("m", Idle(), True, 0.0), "m", Sampling(), "", 8)
    runner = web.AppRunner(made.application(), access_log=None, lingering_time=0.0)
    await runner.setup()
    connections = Connections(runner.server, **bounds)
    made.watch(connections)
    listener = await asyncio.get_running_loop().create_server(connections, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await runner.cleanup()


async def health(port: int) -> int:
    limit = aiohttp.ClientTimeout(total=PATIENCE_SECONDS)
    async with aiohttp.ClientSession(timeout=limit) as client, client.get(f"http://127.0.0.1:{port}/health") as got:
        return got.status


def body(**values: object) -> bytes:
    return json.dumps({"model": "m", "prompt": "a", **values}).encode()


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        (DEEP, "application/json", "nested more than 64 deep"),
        (b'{"a": ' + DEEP + b"}", "application/json", "nested more than 64 deep"),
        (body(temperature=10**400), "application/json", "a whole number of 401 digits"),
        (b'{"model": "m", "temperature": 1e400}', "application/json", "out of range"),
        (body(temperature=float("nan")), "application/json", "NaN"),
        (body(repetition_penalty=1e-320), "application/json", "repetition_penalty is 1e-320, must be"),
        (body(max_tokens=2**64 - 1, n=17), "application/json", "n is 17"),
        (body(n=17), "application/json; charset=no-such-charset", "n is 17"),
        (b"\xff\xfe{}", "application/json; charset=utf-16", "is not JSON"),
    ],
)
def test_no_body_is_more_than_a_bad_request(data: bytes, kind: str, said: str, caplog):
    async def post() -> tuple[int, dict]:
        async with serving() as port, aiohttp.ClientSession(headers={"Content-Type": kind}) as client:
            async with client.post(f"http://127.0.0.1:{port}/v1/completions", data=data) as answer:
                found = answer.status, await answer.json()
            assert await health(port) == 200
            return found

    status, document = asyncio.run(post())
    assert status == 400
    assert said in document["error"]["message"]
    assert not caplog.records


def test_clients_that_never_end_their_head_keep_nobody_out():
    async def run() -> None:
        async with serving(head_seconds=3600.0, most=50) as port:
            slow = []
            for _ in range(220):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(HALF_A_HEAD)
                slow.append((reader, writer))
            assert await health(port) == 200
            open_ones = 0
            for reader, writer in slow:
                with contextlib.suppress(ConnectionError):
                    open_ones += not reader.at_eof() and not reader.exception()
                writer.close()
            assert open_ones <= 50

    asyncio.run(run())


def test_a_connection_that_says_nothing_is_closed_and_one_that_asked_is_not():
    async def run() -> None:
        async with serving(head_seconds=0.2) as port:
            asked_reader, asked = await asyncio.open_connection("127.0.0.1", port)
            asked.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b"200" in await asked_reader.readline()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(HALF_A_HEAD)
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), PATIENCE_SECONDS) == b""
            writer.close()
            asked.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            said = b""
            while said.count(b"200 OK") < 1:
                said += await asyncio.wait_for(asked_reader.read(1000), PATIENCE_SECONDS)
            asked.close()

    asyncio.run(run())


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch):
    monkeypatch.setattr(http, "BODY_SECONDS", 0.1)

    async def run() -> bytes:
        async with serving() as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            said = await asyncio.wait_for(reader.readline(), PATIENCE_SECONDS)
            writer.close()
            return said

    assert b" 408 " in asyncio.run(run())


def test_connections_leave_descriptors_for_the_rest():
    assert 8 <= most_connections() <= 1000
