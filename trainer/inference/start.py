"""Open a checkpoint and serve it until SIGINT or SIGTERM: what `trainer.serve` and `trainer.chat --serve` run."""

import asyncio
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from core.console import set_up_logging
from core.errors import ConfigError
from core.exit_codes import OK
from core.settings import loader
from core.settings.loader import SettingError, setting
from trainer.inference import access
from trainer.inference import sampling as generation
from trainer.inference.sampling import Machine, Sampling

log = logging.getLogger("serve")
USAGE = "python -m trainer.serve RUN_OR_CHECKPOINT [--name=value ...]"
SHUTDOWN_SECONDS = 5.0  # for answers under way


@dataclass(frozen=True)
class ServeConfig(Machine, Sampling):
    """What `trainer.serve` takes. The sampling's settings are for requests that do not say."""

    host: str = setting("127.0.0.1", "address to listen on; any but loopback needs SERVE_API_KEY in the environment")
    port: int = setting(8000, "port; 0: a free one")
    name: str = setting("", "the model's name in the API; empty: the last part of the checkpoint's")
    queue: int = setting(256, "most texts in work and waiting; beyond that requests get 429")

    def __post_init__(self):
        Sampling.__post_init__(self)
        Machine.__post_init__(self)
        if not 0 <= self.port < 65536:
            raise SettingError("port", f"is {self.port}, must be 0 to 65535")
        if self.queue < 1:
            raise SettingError("queue", f"is {self.queue}, must be at least 1")


def serve(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(ServeConfig, USAGE))
        print("\nSERVE_API_KEY: the key that clients must send; without it only this computer is served.")
        return OK
    where, flags = generation.split_arguments(arguments, USAGE)
    settings = generation.load(ServeConfig, flags, os.environ)
    set_up_logging()
    if not access.key() and not access.is_loopback(settings.host):
        problem = f"host is {settings.host}, which others can reach, and {access.KEY} is empty"
        raise ConfigError(f"{problem}; set it to a secret")
    # torch takes seconds to import: a wrong setting should not have to wait for it.
    from trainer.inference.chat_model import open_speaker
    from trainer.inference.server import Endpoint

    speaker = open_speaker(where, settings)
    log.info("%s, opened in %.1f s", speaker.name, speaker.opened_seconds)
    name = settings.name or where.rstrip("/").rpartition("/")[2]
    endpoint = Endpoint(speaker, name, generation.sampling_of(settings), access.key(), settings.queue)
    asyncio.run(_until_stopped(endpoint, settings, name))
    return OK


async def _until_stopped(endpoint, settings: ServeConfig, name: str) -> None:
    # A client that goes away takes its handler with it, and thus its texts out of the model's work.
    runner = web.AppRunner(
        endpoint.application(), handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS
    )
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, settings.host, settings.port).start()
        except OSError as error:
            raise ConfigError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from error
        host, port = runner.addresses[0][:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("serving %s: page at %s/, OpenAI endpoint at %s/v1", name, url, url)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
        log.info("stopping")
    finally:
        await runner.cleanup()
