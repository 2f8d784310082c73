"""Converts conversations to text: `ROLE: CONTENT` per message, separated by blank lines.

A conversation is a list of {"role", "content"}, or of {"from", "value"} as in ShareGPT.
"""

from typing import Any

import pyarrow as pa

FIELDS = (("role", "content"), ("from", "value"))


def is_chat(kind: pa.DataType) -> bool:
    """Whether a column of this type contains conversations."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)) or not pa.types.is_struct(kind.value_type):
        return False
    names = {kind.value_type.field(number).name for number in range(kind.value_type.num_fields)}
    return any(set(pair) <= names for pair in FIELDS)


def text_of(messages: Any) -> str | None:
    """The text of a conversation, or None if it is empty or malformed."""
    if not isinstance(messages, list) or not messages:
        return None
    turns = [_turn(message) for message in messages]
    return None if None in turns else "\n\n".join(turns)


def texts_of(values: pa.Array) -> pa.LargeStringArray:
    """The texts of a column of conversations. An empty or malformed conversation gives null."""
    return pa.array([text_of(value) for value in values.to_pylist()], pa.large_string())


def _turn(message: Any) -> str | None:
    if not isinstance(message, dict):
        return None
    for role, content in FIELDS:
        if isinstance(message.get(role), str) and isinstance(message.get(content), str):
            return f"{message[role]}: {message[content]}"
    return None
