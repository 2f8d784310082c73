"""A headless browser, in which tests look at pages of ours."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp

from tests.patience import PATIENCE_SECONDS

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """One page in a headless browser, by the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, state: str):
        self._socket = socket
        self._state = state
        self._number = 0

    async def run(self, script: str):
        self._number += 1
        await self._socket.send_json(
            {"id": self._number, "method": "Runtime.evaluate", "params": {"expression": script}}
        )
        async for message in self._socket:
            answer = message.json()
            if answer.get("id") == self._number:
                assert "exceptionDetails" not in answer["result"], answer
                return answer["result"]["result"].get("value")
        raise AssertionError("the browser is gone")

    async def until(self, holds) -> dict:
        """The first state that holds."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds(state := json.loads(await self.run(self._state))):
            assert time.monotonic() < deadline, state
            await asyncio.sleep(0.05)
        return state


@contextlib.asynccontextmanager
async def tab_at(url: str, profile: Path, state: str):
    """A tab with a page. `state` is an expression, the JSON text of what its tests look at."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --remote-debugging-port=0"
    process = await asyncio.create_subprocess_exec(
        BROWSER, *flags.split(), f"--user-data-dir={profile}", url, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + PATIENCE_SECONDS
        pages = []
        async with aiohttp.ClientSession() as session:
            while not pages:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
                with contextlib.suppress(FileNotFoundError, ValueError, aiohttp.ClientError):
                    port = int(port_file.read_text().split()[0])
                    async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                        pages = [page for page in await answer.json() if page["url"].startswith(url)]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as channel:
                yield Tab(channel, state)
    finally:
        process.kill()
        await process.wait()
