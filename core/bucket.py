"""Reads the variables BUCKET, RUN and DATA, and builds the URLs that they name.

    bucket.url({"BUCKET": "my-bucket/team/", "RUN": "gpt2-124m"}, "RUN")    s3://my-bucket/team/runs/gpt2-124m

launch/node/place.py runs this module outside of the container with the node's system Python. The module therefore uses
only the standard library and the syntax of Python 3.8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from core import urls
from core.errors import ConfigError

FOLDERS = {"RUN": "runs", "DATA": "data"}
# Longest name in bytes. S3 allows 1,024 bytes per key; the rest is for the names of objects in the folder.
NAME_BYTES = 512


def root(environment: Mapping[str, str]) -> str:
    """The URL of BUCKET without a trailing slash. Raises ConfigError.

    A bare name is a bucket on S3, optionally followed by a folder. A path that begins with `/`, `./` or `~` is local.
    """
    text = environment.get("BUCKET", "").strip()
    if not text:
        raise ConfigError("BUCKET is empty; give BUCKET=NAME to make or to sky launch --env, or set it in .env")
    _check_characters("BUCKET", text)
    if re.match(r"\.{0,2}/|~", text):
        return text.rstrip("/") or "/"
    scheme, separator, rest = text.partition("://")
    place = f"{scheme.lower()}://{rest}" if separator else text
    if problem := urls.mistake(place):
        raise ConfigError(f"BUCKET is {text!r}, which {problem}")
    scheme, rest = (scheme.lower(), rest) if separator else ("s3", text)
    parts = [part for part in rest.split("/") if part]
    if not parts:
        raise ConfigError(f"BUCKET is {text!r}, which names no bucket; give BUCKET=NAME")
    if {".", ".."} & set(parts):
        raise ConfigError(f"BUCKET is {text!r}, must not hold the parts . or ..; give BUCKET=NAME/FOLDER")
    return scheme + "://" + ("/" if scheme == "file" else "") + "/".join(parts)


def name(environment: Mapping[str, str], variable: str) -> str:
    """The folder name that `variable` (RUN or DATA) holds. Slashes may separate several parts. Raises ConfigError."""
    text = environment.get(variable, "").strip()
    _check_characters(variable, text)
    parts = [part for part in text.split("/") if part]
    folder = FOLDERS[variable]
    if "://" in text:
        raise ConfigError(f"{variable} is {text!r}, must be the name of a folder in BUCKET/{folder}, not a URL")
    if not parts or {".", ".."} & set(parts):
        raise ConfigError(f"{variable} is {text!r}, must be the name of a folder in BUCKET/{folder}, without . or ..")
    if len(text.encode()) > NAME_BYTES:
        raise ConfigError(f"{variable} has {len(text.encode()):,} bytes, must not have more than {NAME_BYTES}")
    return "/".join(parts)


def url(environment: Mapping[str, str], variable: str) -> str:
    """The URL of the run if `variable` is RUN, or of the token set if it is DATA.

    If RUN_URL or DATA_URL is set, its value is returned. Raises ConfigError.
    """
    given = environment.get(f"{variable}_URL", "").strip()
    _check_characters(f"{variable}_URL", given)
    return given or f"{root(environment)}/{FOLDERS[variable]}/{name(environment, variable)}"


def _check_characters(variable: str, text: str) -> None:
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ConfigError(f"{variable} is {text!r}, must not hold control characters or line ends")
