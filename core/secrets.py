"""Hides keys in printed text: replaces every known secret by `***`.

    secrets.scrub(str(error))

Known secrets are the values of environment variables with names such as *_KEY, *_TOKEN and *_PASSWORD, and the
arguments of `register`, such as a key that was read from a file. This module imports no other module of the project,
because all code that prints imports it.
"""

import os
import re

HIDDEN = "***"
# Shorter values are not hidden, because they may occur in messages as ordinary words.
MIN_CHARACTERS = 8
_NAME = re.compile(r"(^|_)(KEY|KEY_ID|TOKEN|PASSWORD|SECRET)$")
_registered: set[str] = set()


def register(secret: str) -> str:
    """Add a secret to the known ones. Returns it."""
    if secret.strip():
        _registered.add(secret)
    return secret


def scrub(text: str) -> str:
    """`text` with every known secret hidden, also in the form of a Python literal."""
    known = _registered | {value for name, value in os.environ.items() if _NAME.search(name)}
    # A message may quote a single line of a secret that has several.
    lines = {line.strip() for secret in known for line in (secret, *secret.splitlines())}
    forms = {form for line in lines for form in (line, repr(line)[1:-1]) if len(line) >= MIN_CHARACTERS}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return text
