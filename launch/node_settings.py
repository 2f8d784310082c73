"""The settings that a node parses, parsed by the same functions before a node is rented.

problems({"MAX_USD": "$20", ...})     ["environment variable MAX_USD: max_usd is '$20', must be a number ..."]
"""

from collections.abc import Callable, Mapping

from core import bucket
from core.errors import ConfigError
from core.run.machine import positive
from core.settings import loader
from core.settings.training import RunConfig
from core.stores import credentials
from launch.node import __main__ as node
from launch.node import network


def problems(settings: Mapping[str, str]) -> list[str]:
    """One sentence for each setting that the node would refuse. An empty setting has its default."""
    found = []
    for name, parse in PARSERS.items():
        if settings.get(name):
            try:
                parse(settings)
            except ConfigError as error:
                found.append(str(error))
    return found


def _cap(settings: Mapping[str, str]) -> float:
    return loader.load(RunConfig, [], {"RUN_URL": "any", "MAX_USD": settings["MAX_USD"]}).max_usd


def _one_of(name: str, *choices: str) -> Callable[[Mapping[str, str]], str]:
    def parse(settings: Mapping[str, str]) -> str:
        if settings[name] not in choices:
            raise ConfigError(f"{name} is {settings[name]!r}, must be {' or '.join(choices)}")
        return settings[name]

    return parse


def _endpoint(name: str) -> Callable[[Mapping[str, str]], str]:
    def parse(settings: Mapping[str, str]) -> str:
        url = settings[name]
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{name} is {url!r}, must begin with https:// or http://")
        return url

    return parse


PARSERS: dict[str, Callable[[Mapping[str, str]], object]] = {
    "BUCKET": bucket.root,
    "RUN": lambda settings: bucket.name(settings, "RUN"),
    "DATA": lambda settings: bucket.name(settings, "DATA"),
    "MAX_USD": _cap,
    "USD_PER_HOUR": lambda settings: positive(settings, "USD_PER_HOUR"),
    "RANKS_PER_NODE": network.ranks_per_node,
    "HANG_MINUTES": node.hang_minutes,
    "DEVICE": _one_of("DEVICE", "cuda", "cpu"),
    "CUDA_COMPAT": _one_of("CUDA_COMPAT", "yes", "no"),
    "BUCKET_ENDPOINT_URL": _endpoint("BUCKET_ENDPOINT_URL"),
    "BUCKET_GOOGLE_KEY": credentials.for_google,
    "AWS_ENDPOINT_URL": _endpoint("AWS_ENDPOINT_URL"),
}
