"""Combines the environment of the shell with the variables of a .env file.

    environment.adopt()      adds the variables of .env to os.environ

A value in the shell has precedence over the file. An empty variable counts as not set.
"""

import getpass
import io
import math
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from core.errors import ConfigError
from core.stores import aws

DOTENV = Path(".env")
# Libraries read these variables even if they are empty. With AWS_DEFAULT_REGION="", botocore contacts
# `s3..amazonaws.com`. With XDG_CACHE_HOME="", Hugging Face caches below the current folder.
_READ_BY_LIBRARIES = re.compile(
    r"(AWS|GOOGLE|AZURE|HF|WANDB|MLFLOW|OPENAI|XDG|CUBLAS|OPENBLAS)_\w+|REQUESTS_CA_BUNDLE|TENSORBOARD_DIR"
    r"|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE"
)

# `tidy` removes white space around these URLs and folder names.
_PLACES = ("BUCKET", "RUN_URL", "DATA_URL", "SOURCE_URL", "VOCAB_URL")


def adopt(dotenv: Path = DOTENV) -> None:
    """Set os.environ to the result of `with_dotenv`. Raises ConfigError."""
    found = with_dotenv(os.environ, dotenv)
    tidy(os.environ)
    os.environ.update(found)


def with_dotenv(environment: Mapping[str, str], dotenv: Path) -> dict[str, str]:
    """The variables of `environment` and, if there is a .env file, of that file.

    A variable of `environment` has precedence, unless its value is empty. Raises ConfigError.
    """
    given = dict(environment)
    tidy(given)
    from_file = {name: value for name, value in read_dotenv(dotenv).items() if value}
    _check_whose_keys(dotenv, from_file)
    return {**from_file, **{name: value for name, value in given.items() if value or name not in from_file}}


def tidy(environment: MutableMapping[str, str]) -> None:
    """Remove empty variables that a library would read as a value.

    Also remove white space and line ends of Windows files around URLs and folder names. They are easily copied along.
    """
    for name in _PLACES:
        if name in environment:
            environment[name] = environment[name].strip()
    for name in [name for name, value in environment.items() if not value and _READ_BY_LIBRARIES.fullmatch(name)]:
        del environment[name]


def name_user(environment: MutableMapping[str, str]) -> None:
    """Set USER and HOME if the system does not know this user, as in a container that runs under another user id.

    Python and torch look for the user's folders. Without a name and a home they fail.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        environment["USER"] = f"user-{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        environment["HOME"] = "/"  # as Docker sets it


def _check_whose_keys(dotenv: Path, found: Mapping[str, str]) -> None:
    """Raises ConfigError if AWS_ACCESS_KEY_ID is a key of another server: SkyPilot would log in to AWS with it."""
    endpoint = aws.endpoint_of(found)
    if not found.get("AWS_ACCESS_KEY_ID") or found.get("BUCKET_ACCESS_KEY_ID") or aws.service_of(endpoint) == "aws":
        return
    old = next(name for name in aws.ENDPOINTS if found.get(name))
    rename = "AWS_ACCESS_KEY_ID to BUCKET_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY to BUCKET_SECRET_ACCESS_KEY"
    rename += f", {old} to BUCKET_ENDPOINT_URL" if old != "BUCKET_ENDPOINT_URL" else ""
    raise ConfigError(
        f"{dotenv}: AWS_ACCESS_KEY_ID is a key of the bucket at {endpoint}, and SkyPilot would log in to AWS with it; "
        f"rename {rename}"
    )


def read_dotenv(path: Path) -> dict[str, str]:
    """The variables of a .env file, as python-dotenv reads them. If there is no file, the result is empty.

    Raises ConfigError.
    """
    try:
        # utf-8-sig skips the byte order mark that some editors write at the beginning of a file.
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; save it again as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream

    for binding in parse_stream(io.StringIO(text)):
        # The message does not contain the value, which may be a key.
        if binding.error or (binding.key is not None and binding.value is None):
            line = binding.original.line + len(binding.original.string) - len(binding.original.string.lstrip("\n"))
            raise ConfigError(f"{path}:{line}: is not a NAME=value line; a comment begins with #")
        if binding.value and "\0" in binding.value:
            raise ConfigError(f"{path}:{binding.original.line}: {binding.key} holds a NUL character; remove it")
    return {name: value or "" for name, value in dotenv_values(stream=io.StringIO(text)).items()}


def positive(environment: Mapping[str, str], name: str) -> float | None:
    """The number in a variable, or None if the variable is empty.

    Raises ConfigError unless the number is above zero.
    """
    text = environment.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ConfigError(f"environment variable {name} is {text!r}, must be a number above zero, or empty")
    return value
