"""Instruction data for fine-tuning: conversations, checked row by row and stored in one form.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Roles are system (only first), then user and assistant in turn, the last one assistant. Rows of the older form
`instruction`, `input` (may be missing), `output` are rewritten: instruction and input, a blank line between them,
are the user's message.
"""

import logging
from typing import Any

from core import sets
from core.errors import DataError
from core.sets import SetInfo
from data_prep import rows

log = logging.getLogger(__name__)

SCHEMA = "conversations"
MAX_BAD_SHARE = 0.01


def store(data_url: str, source: str, name: str, licence: str) -> SetInfo:
    """Check and store. Raises DataError when more than MAX_BAD_SHARE of the rows are no conversations."""
    found = rows.read(source)
    good: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, row in enumerate(found, 1):
        try:
            good.append(conversation(row))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    for problem in problems[:5]:
        log.warning("%s: left out %s", source, problem)
    if not good or len(problems) > MAX_BAD_SHARE * len(found):
        first = f" ({problems[0]})" if problems else ""
        raise DataError(
            f"{source}: {len(problems)} of {len(found)} rows are no conversations{first}; "
            "see python -m data_prep.sets --help for their form"
        )
    return sets.write(data_url, name, SCHEMA, source, licence, rows.lines(good))


def conversation(row: Any) -> dict[str, Any]:
    """A row in the stored form. Raises ValueError that says what is wrong."""
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    if row.get("messages") is None and "instruction" in row:
        question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        row = {"messages": [_message("user", question), _message("assistant", row.get("output"))]}
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("has neither messages nor instruction and output")
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("has a message that is no object")
    turns = [_message(message.get("role"), message.get("content")) for message in messages]
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    expected = ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or [turn["role"] for turn in spoken] != expected:
        raise ValueError("does not go user, assistant in turn and end with assistant")
    return {"messages": turns}


def _message(role: Any, content: Any) -> dict[str, str]:
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"has an empty message of role {role!r}")
    return {"role": role, "content": content}
