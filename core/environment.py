"""Combines the environment of the shell with the variables of a .env file.

A value in the shell has precedence over the file. An empty variable counts as not set. environment.adopt()      adds
the variables of .env to os.environ, and removes empty ones that would mislead a library
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
# Libraries read an empty variable as a value: botocore contacts `s3..amazonaws.com` for AWS_DEFAULT_REGION="", Google's
# library opens the file "", Hugging Face caches below the current folder for XDG_CACHE_HOME="".
_READ_BY_LIBRARIES = re.compile(
    r"(AWS|GOOGLE|AZURE|HF|WANDB|MLFLOW|OPENAI|XDG|CUBLAS|OPENBLAS)_\w+|REQUESTS_CA_BUNDLE|TENSORBOARD_DIR"
    r"|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE"
)

# Programs build the names of folders and objects from these variables.
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

    Also remove blanks and the line ends of a Windows file from the ends of URLs and names, because they are easily
    copied along.
    """
    for name in _PLACES:
        if name in environment:
            environment[name] = environment[name].strip()
    for name in [name for name, value in environment.items() if not value and _READ_BY_LIBRARIES.fullmatch(name)]:
        del environment[name]


def name_user(environment: MutableMapping[str, str]) -> None:
    """Give the user a name and a home if the system knows none, as in a container that runs under another user id.

    Python and torch need both to find the user's folders, and fail without them.
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
    """Raises ConfigError if AWS_ACCESS_KEY_ID is a key of another S3 server: SkyPilot would log in to AWS with it."""
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
        # utf-8-sig: some editors begin a file with a byte order mark.
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
