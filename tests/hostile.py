"""What someone may put into a bucket in place of what we stored: values, names, and mutations of a document."""

import json
import random
from typing import Any

NAMES = (
    "../../escaped",
    "/tmp/escaped",
    "a/../../escaped",
    "",
    ".",
    "a//b",
    "C:/escaped",
    "..\\escaped",
    "a\0b",
    "a\x1b[2Jb",
    "a\nb",
    "\u202egnp.exe",
    "x" * 2000,
)
TEXTS = (
    *NAMES,
    "<script>alert(1)</script>",
    '"><script>alert(1)</script>',
    "' onload='alert(1)",
    "=HYPERLINK(1)",
    "\x1b]0;owned\x07",
    "\r\x9b31m",
    "{{ 7 * 7 }}",
    "%s %d",
)
VALUES: tuple[Any, ...] = (
    *TEXTS,
    None,
    True,
    False,
    0,
    -1,
    3,
    2**31,
    2**63,
    2**64,
    -(2**70),
    10**400,
    0.1,
    -0.5,
    1e-320,
    1e18,
    1e300,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    {"a": {"b": [1, None]}},
    ["x", 1, None],
)


def mutated(document: Any, chance: random.Random) -> bytes:
    """The JSON of `document` after one to four changes anywhere in it, now and then cut or with a byte changed."""
    holder = {"root": json.loads(json.dumps(document))}
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        _change(holder, chance)
    if chance.random() < 0.03:
        text = json.dumps(holder["root"])
        depth = chance.choice([70, 2000, 100_000])
        return text.replace(":", ":" + "[" * depth + "]" * depth + ",", 1).encode()
    data = json.dumps(holder["root"]).encode()
    if chance.random() < 0.1 and data:
        at = chance.randrange(len(data))
        data = chance.choice([data[:at], data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]])
    return data


def _change(holder: dict[str, Any], chance: random.Random) -> None:
    places = list(_places(holder))
    container, key = chance.choice(places)
    kind = chance.random()
    if kind < 0.15 and (container is not holder):
        del container[key]
    elif kind < 0.25 and isinstance(container, dict) and container is not holder:
        container[chance.choice(TEXTS)] = container.pop(key)
    elif kind < 0.32 and isinstance(container, list):
        container.append(container[key])
    else:
        container[key] = json.loads(json.dumps(chance.choice(VALUES)))


def _places(value: Any):
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])
