"""Serves a trained model: an OpenAI-compatible HTTP endpoint, and a page to try it.

    python -m trainer.serve s3://bucket/runs/first

Reads a run's newest checkpoint, one checkpoint, or a public model. Listens on loopback by default; any other address
needs SERVE_API_KEY in the environment. Exits with 0 on SIGINT and SIGTERM.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from core.console import run_entry, set_up_logging
from core.errors import ConfigError
from core.exit_codes import OK
from core.settings import loader
from core.settings.loader import setting
from trainer.inference import sampling as generation
from trainer.inference.sampling import InferenceOptions, Sampling

log = logging.getLogger("serve")
USAGE = "python -m trainer.serve RUN_OR_CHECKPOINT [--name=value ...]"
SHUTDOWN_SECONDS = 5.0  # time that answers in progress get at the end
KEEPALIVE_SECONDS = 30.0  # that a connection may wait for its next request


@dataclass(frozen=True)
class ServeConfig(InferenceOptions, Sampling):
    """Settings of `trainer.serve`. The settings of Sampling are defaults that a request can override."""

    host: str = setting("127.0.0.1", "address to listen on; all but loopback need SERVE_API_KEY in the environment")
    port: int = setting(8000, "port; 0: a free one", ge=0, le=65535)
    name: str = setting("", "the model's name in the API; empty: the last part of the checkpoint's URL")
    queue: int = setting(256, "limit of texts in progress and waiting; further requests get the status 429", ge=1)


def main(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(ServeConfig, USAGE))
        print("\nSERVE_API_KEY: the key that clients must send. Without one the server answers this computer only.")
        return OK
    where, flags = generation.split_arguments(arguments, USAGE)
    settings = generation.load(ServeConfig, flags, os.environ)
    set_up_logging()
    # Importing torch takes seconds. Errors in the settings are reported before that.
    from trainer.inference import server
    from trainer.inference.chat_model import open_chat_model

    if not server.api_key() and not server.is_loopback(settings.host):
        raise ConfigError(
            f"host is {settings.host}, which other computers can reach, and {server.KEY} is empty; set it to a secret"
        )
    model = open_chat_model(where, settings)
    log.info("%s, opened in %.1f s", model.name, model.opened_seconds)
    name = settings.name or where.rstrip("/").rpartition("/")[2]
    http = server.HttpServer(model, name, generation.sampling_of(settings), server.api_key(), settings.queue)
    asyncio.run(_until_stopped(http, settings, name))
    return OK


async def _until_stopped(http, settings: ServeConfig, name: str) -> None:
    from trainer.inference.connections import Connections

    # A disconnected client cancels its handler, which cancels its texts in the engine.
    runner = web.AppRunner(
        http.application(),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=SHUTDOWN_SECONDS,
        keepalive_timeout=KEEPALIVE_SECONDS,
    )
    await runner.setup()
    connections = Connections(runner.server)
    http.watch(connections)
    listener = None
    try:
        try:
            listener = await asyncio.get_running_loop().create_server(connections, settings.host, settings.port)
        except OSError as error:
            raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error
        host, port = listener.sockets[0].getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("serving %s: page at %s/, OpenAI endpoint at %s/v1", name, url, url)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
        log.info("stopping")
    finally:
        if listener:
            listener.close()
        await runner.cleanup()


if __name__ == "__main__":
    run_entry(main)
