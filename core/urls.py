"""Checks the places that settings name: URLs of stores, local folders, names of models.

    mistake("s3:/bucket/run")      # "looks like a URL but is not one; did you mean s3://bucket/run? ..."
    mistake("./s3:/bucket/run")    # None: a local path

Each check returns None, or a description of the mistake that completes a sentence such as "KEY is PLACE, which ...".
pathlib, shells and `.env` files can change s3:// to another form, such as s3:/. Without a check, s3:/bucket would name
a local folder, and everything written there would be lost with the machine.
"""

from __future__ import annotations  # core/bucket.py imports this module, and a node's Python may be old

import re
from pathlib import Path

from core.errors import ConfigError

SCHEMES = ("file", "memory", "s3", "gs", "az", "hf")
_BUCKETS = ("s3", "gs", "az", "hf")
_NO_BUCKET = tuple(f"{scheme}://" for scheme in _BUCKETS)
_NO_CONTAINER = re.compile(r"^az://[^/]*/*$")
_SCHEME = re.compile(r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):+(?P<slashes>/*)(?P<rest>.*)$", re.DOTALL)
_NO_COLON = re.compile(rf"^({'|'.join(SCHEMES)})//+(.*)$", re.IGNORECASE | re.DOTALL)
_WRAPPED = re.compile(rf"^[\s'\"]+((?:{'|'.join(SCHEMES)}):.*?)[\s'\"]*$", re.IGNORECASE | re.DOTALL)
# A model on the Hugging Face Hub: hf:OWNER/NAME or hf:NAME, without slashes after the colon.
HUB_MODEL = re.compile(r"^hf:(?!//)(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?$")


def mistake(place: str) -> str | None:
    """The mistake in a place: it is a wrong URL, or a path that was probably meant as a URL.

    The result is None if there is no mistake.
    """
    if wrapped := _WRAPPED.match(place):
        return f"has spaces or quotes around it; did you mean {_corrected(wrapped[1])}?"
    if bare := _NO_COLON.match(place):
        return _meant(place, f"{bare[1].lower()}://{bare[2]}")
    match = _SCHEME.match(place)
    if not match:
        return None
    scheme, slashes = match["scheme"], match["slashes"]
    if scheme.lower() not in SCHEMES:
        if not slashes:  # a name with a colon in it
            return None
        known = ", ".join(f"{each}://" for each in SCHEMES)
        return f"has the unknown storage scheme {scheme!r}; use a local path or one of {known}"
    right = _corrected(place)
    if _NO_CONTAINER.match(right):
        return "names no container; write az://ACCOUNT/CONTAINER/FOLDER"
    if right in _NO_BUCKET:
        return f"names no bucket; write {right}BUCKET/FOLDER"
    if place == right:
        return None
    if place == right.replace(scheme.lower(), scheme, 1):
        return f"has its scheme in capitals; did you mean {right}?"
    return _meant(place, right)


def is_web(place: str) -> bool:
    """Whether a place is an address on a web server. Only source files may have one."""
    return place.startswith(("https://", "http://"))


def mistake_in_source(place: str) -> str | None:
    """The mistake in a place of source files, which may also be an https:// address."""
    return None if is_web(place) else mistake(place)


def mistake_in_model(name: str) -> str | None:
    """The mistake in a model's name, which is a place, a public name, hf:OWNER/NAME or transformers:NAME."""
    if name.startswith("transformers:"):
        return None
    if not name.lower().startswith("hf:"):
        return mistake(name)
    if HUB_MODEL.match(name):
        return None
    right = "hf:" + re.sub(r"^hf:/*", "", name, flags=re.IGNORECASE)
    hint = f"; did you mean {right}?" if HUB_MODEL.match(right) else ""
    return f"is not of the form hf:OWNER/NAME[@REVISION]{hint}"


def mistake_in_folder(path: str) -> str | None:
    """The mistake in a local path that looks like a URL, or None for any other path."""
    if not mistake(path) and not re.match(r"^[A-Za-z][A-Za-z0-9+.-]*://", path):
        return None
    return f"is not a path of this machine; give a local path, or ./{path} if that is its name"


def check(place: str) -> None:
    """Raises ConfigError if a place has a mistake."""
    if problem := mistake(place):
        raise ConfigError(f"{place}: {problem}")


def check_model(name: str) -> None:
    """Raises ConfigError if a model's name has a mistake."""
    if problem := mistake_in_model(name):
        raise ConfigError(f"{name}: {problem}")


def local_path(path: str, where: str) -> Path:
    """`path` as a Path, with `~` replaced by the home folder.

    Shells expand `~` only at the start of a word, not in `--flag=~/x`. If the path looks like a URL, raises
    ConfigError, which names the flag or variable.
    """
    if problem := mistake_in_folder(path):
        raise ConfigError(f"{where} is {path!r}, which {problem}")
    return Path(path).expanduser()


def _corrected(url: str) -> str:
    """The correct form of a URL of a known scheme."""
    match = _SCHEME.match(url)
    scheme, slashes, rest = match["scheme"].lower(), match["slashes"], match["rest"].lstrip(":")
    if scheme in _BUCKETS:
        return f"{scheme}://{rest.lstrip('/')}"
    # A path follows file://, and file:/folder means file:///folder.
    return f"{scheme}://{slashes if len(slashes) < 2 else slashes[2:]}{rest}"


def _meant(place: str, right: str) -> str:
    return f"looks like a URL but is not one; did you mean {right}? (a local path of that name is ./{place})"
