"""Hides keys in printed and stored texts: replaces every secret by `***`.

    secrets.scrub(str(error))          for text that is printed
    secrets.without_keys(settings)     for values that are stored; the result does not depend on the environment

There are three kinds of secrets:

- values of environment variables with names such as *_KEY, *_TOKEN and *_PASSWORD
- arguments of `register`, such as a key from a file
- texts with the form of a secret, such as a user and password in a URL, or a key in a URL's query or in a header

This module imports no other module of the project, because all code that prints imports it.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

HIDDEN = "***"
# Shorter values are not hidden, because they may occur in messages as ordinary words.
MIN_CHARACTERS = 8
_NAME = re.compile(r"(^|_)(KEY|KEY_ID|TOKEN|PASSWORD|SECRET)$")
# Of two adjacent parts of a pattern, at most one repeats without a limit. So the time of a search grows linearly with
# the length of the text.
_FORMS = (
    (re.compile(r"://[^/\s@'\"<>?#]+@"), f"://{HIDDEN}@"),
    (
        re.compile(
            r"([?&;][\w-]{0,40}(?:key|token|password|passwd|secret|sig|signature|credential)[\w-]{0,40}=)[^&;\s'\"<>#]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (
        re.compile(
            r"\b((?:authorization|x-api-key|api-key|x-goog-api-key|x-auth-token)['\"]?\s{0,8}[:=]\s{0,8}['\"]?"
            r"(?:(?:bearer|basic|token)\s{1,8})?)[^\s'\",;}]{8,}",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\b(bearer\s{1,8})[\w.~+/=-]{8,}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"\bsk-[\w*-]{8,}|\bhf_\w{16,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), HIDDEN),
)
_registered: set[str] = set()


def register(secret: str) -> str:
    """Add `secret` to the secrets that `scrub` hides. Returns `secret`."""
    if secret.strip():
        _registered.add(secret)
    return secret


def scrub(text: str) -> str:
    """`text` with every secret hidden, including secrets written as Python literals."""
    return scrubber()(text)


def scrubber() -> Callable[[str], str]:
    """A function that hides the secrets that are known now. For many texts it is faster than `scrub`."""
    known = _registered | {value for name, value in os.environ.items() if _NAME.search(name)}
    # A secret may have several lines, and a message may quote only one of them.
    lines = {line.strip() for secret in known for line in (secret, *secret.splitlines())}
    forms = {form for line in lines for form in (line, repr(line)[1:-1]) if len(line) >= MIN_CHARACTERS}
    longest_first = sorted(forms, key=len, reverse=True)

    def hide(text: str) -> str:
        for form in longest_first:
            text = text.replace(form, HIDDEN)
        return _without_forms(text)

    return hide


def without_keys(value: Any) -> Any:
    """A copy of a value of JSON types, with every text that has the form of a secret hidden.

    The environment is not read, so equal values give equal results.
    """
    if isinstance(value, str):
        return _without_forms(value)
    if isinstance(value, Mapping):
        return {key: without_keys(each) for key, each in value.items()}
    return [without_keys(each) for each in value] if isinstance(value, list | tuple) else value


def _without_forms(text: str) -> str:
    for form, hidden in _FORMS:
        text = form.sub(hidden, text)
    return text
