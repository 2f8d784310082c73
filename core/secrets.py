"""Keeps keys out of what is printed: every known secret in a text becomes `***`.

    secrets.scrub(str(error))

Known are the variables whose names end like a secret's, and what `register` was given, such as a key from a file.
"""

import os
import re

HIDDEN = "***"
# Shorter values are words that a message may well hold.
MIN_CHARACTERS = 8
_NAME = re.compile(r"(^|_)(KEY|KEY_ID|TOKEN|PASSWORD|SECRET)$")
_registered: set[str] = set()


def register(secret: str) -> str:
    """Make a secret known; returns it."""
    if secret.strip():
        _registered.add(secret)
    return secret


def scrub(text: str) -> str:
    """`text` without any known secret, also where a library shows one as a Python literal."""
    known = _registered | {value for name, value in os.environ.items() if _NAME.search(name)}
    # A message may hold one line of a secret alone.
    lines = {line.strip() for secret in known for line in (secret, *secret.splitlines())}
    forms = {form for line in lines for form in (line, repr(line)[1:-1]) if len(line) >= MIN_CHARACTERS}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, HIDDEN)
    return text
