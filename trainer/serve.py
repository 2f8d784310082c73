"""Serves a trained model: an OpenAI-compatible HTTP endpoint, and a page to try it.

    python -m trainer.serve s3://bucket/runs/first

The argument is a run (its newest checkpoint is used), a checkpoint, or a public model. The server listens on loopback
by default. Any other address needs SERVE_API_KEY in the environment. The server exits with 0 on SIGINT and SIGTERM, and
after idle_minutes without a request.

If RUN_URL is set, as on a rented machine, it is the default model. The server's time and dollars are then booked in a
ledger below RUN_URL/serving, and the server exits with 34 before they exceed max_usd.
"""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Sequence

from aiohttp import web

from core import pulse
from core.console import run_entry, set_up_logging
from core.errors import ConfigError
from core.exit_codes import CAPPED, OK, tell_launcher
from core.run.folder import RunFolder
from core.run.segment import Opening, SegmentLog, open_segment
from core.settings import loader
from core.settings.inference import ServeConfig
from trainer.inference import sampling as generation

log = logging.getLogger("serve")
USAGE = "python -m trainer.serve RUN_OR_CHECKPOINT [--name=value ...]"
LOOK_SECONDS = 10.0  # seconds between two checks of the cap and of the time of the last request
SHUTDOWN_SECONDS = 5.0  # seconds that answers in progress get at the end
KEEPALIVE_SECONDS = 30.0  # seconds that a connection may wait for its next request


def main(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(loader.help_text(ServeConfig, USAGE))
        print("\nSERVE_API_KEY: the key that clients must send. Without one the server answers this computer only.")
        return OK
    run_url = os.environ.get("RUN_URL", "")
    if run_url and all(argument.startswith("--") for argument in arguments):
        arguments = [run_url, *arguments]
    where, flags = generation.split_arguments(arguments, USAGE)
    settings = generation.load(ServeConfig, flags, os.environ)
    set_up_logging()
    # Importing torch takes seconds. Errors in the settings are reported before the import.
    from trainer.inference import server
    from trainer.inference.chat_model import open_chat_model

    if not server.api_key() and not server.is_loopback(settings.host):
        raise ConfigError(
            f"host is {settings.host}, which other computers can reach, and {server.KEY} is empty; set it to a secret"
        )
    with _segment(run_url, settings) as segment:
        with segment.phase("restore"):
            model = open_chat_model(where, settings)
        log.info("%s, opened in %.1f s", model.name, model.opened_seconds)
        name = settings.name or where.rstrip("/").rpartition("/")[2]
        http = server.HttpServer(model, name, generation.sampling_of(settings), server.api_key(), settings.queue)
        with segment.phase("serve"):
            code = asyncio.run(_until_stopped(http, settings, name, segment))
        segment.close("cap" if code == CAPPED else "finished")
    tell_launcher(code)
    return code


def _segment(run_url: str, settings: ServeConfig) -> SegmentLog:
    """The ledger of the servers of this run. If there is no run, a ledger that books nothing."""
    if not run_url:
        return SegmentLog()
    import torch

    gpu = torch.cuda.get_device_name() if settings.device != "cpu" and torch.cuda.is_available() else None
    opening = Opening(
        stage="serve",
        config={"serve": loader.to_dict(settings)},
        identity={},
        packages=("torch", "aiohttp", "obstore"),
        gpu=gpu,
        gpus_per_node=1 if gpu else 0,
        max_usd=settings.max_usd,
        shutdown_seconds=settings.shutdown_reserve_seconds,
    )
    return open_segment(RunFolder(RunFolder(run_url).serving), opening)


async def _until_stopped(http, settings: ServeConfig, name: str, segment: SegmentLog) -> int:
    """Serve until a signal, the cap or the idle limit. Returns the exit code."""
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
        code, why = await _end(stop, http, settings, segment)
        log.info("stopping: %s", why)
        return code
    finally:
        if listener:
            listener.close()
        await runner.cleanup()


async def _end(stop: asyncio.Event, http, settings: ServeConfig, segment: SegmentLog) -> tuple[int, str]:
    """Wait for the reason to end. Returns the exit code and the reason."""
    idle_seconds = 60 * settings.idle_minutes
    while True:
        pulse.beat()
        try:
            await asyncio.wait_for(stop.wait(), LOOK_SECONDS)
            return OK, "asked to"
        except TimeoutError:
            pass
        if segment.cap and time.time() >= segment.cap.latest(LOOK_SECONDS):
            return CAPPED, f"{segment.cap.describe()}; to continue, set a larger max_usd"
        if idle_seconds and http.idle_seconds() >= idle_seconds:
            return OK, f"{settings.idle_minutes:g} minutes without a request"


if __name__ == "__main__":
    run_entry(main)
