"""Conversations: rows of instruction data, checked and brought into one form.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Roles are system (only first), then user and assistant in turn, the last one assistant. Rows of the older form
`instruction`, `input` (may be missing), `output` are rewritten: instruction and input, a blank line between them,
are the user's message.
"""

from typing import Any


def conversation(row: Any) -> dict[str, Any]:
    """A row in the stored form. Raises ValueError that says what is wrong."""
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    if row.get("messages") is None and "instruction" in row:
        parts = [part for part in (row["instruction"], row.get("input")) if part]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("has an instruction or input that is no text")
        question = "\n\n".join(parts)
        row = {"messages": [_message("user", question), _message("assistant", row.get("output"))]}
    return {"messages": _turns(row.get("messages"), "assistant")}


def preference(row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two conversations that differ in the last answer, the better one first. Raises ValueError.

    A row has `chosen` and `rejected`: answers to `prompt`, which is a text or a list of messages, or, without one,
    whole lists of messages.
    """
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    prompt = row.get("prompt", row.get("messages"))
    answers = []
    for key in ("chosen", "rejected"):
        answer = row.get(key)
        if isinstance(answer, list):
            whole = _turns(answer, "assistant")
        elif isinstance(prompt, list):
            whole = [*_turns(prompt, "user"), _message("assistant", answer)]
        else:
            whole = [_message("user", prompt), _message("assistant", answer)]
        answers.append({"messages": whole})
    chosen, rejected = answers
    if chosen["messages"][:-1] != rejected["messages"][:-1]:
        raise ValueError("has a chosen and a rejected answer to different prompts")
    if chosen == rejected:
        raise ValueError("has twice the same answer")
    return chosen, rejected


def preference_row(row: Any) -> dict[str, Any]:
    """A row of pairs in the stored form: `chosen` and `rejected` are lists of messages. Raises ValueError."""
    chosen, rejected = preference(row)
    return {"chosen": chosen["messages"], "rejected": rejected["messages"]}


def conversation_prompt(row: Any) -> list[dict[str, str]]:
    """Messages that end with the user's: a row's `prompt`, a text, or its `messages`. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    return _turns(row["messages"], "user") if "messages" in row else [_message("user", row.get("prompt"))]


def question_of(messages: list[dict[str, str]]) -> str:
    """All that stands before the last answer, as one text: what a split by hash keeps together."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages[:-1])


def _turns(messages: Any, last: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("has neither messages nor instruction and output")
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("has a message that is no object")
    turns = [_message(message.get("role"), message.get("content")) for message in messages]
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    expected = ["user", "assistant"] * ((len(spoken) + 1) // 2)
    if not spoken or [turn["role"] for turn in spoken] != expected[: len(spoken)] or spoken[-1]["role"] != last:
        raise ValueError(f"does not go user, assistant in turn and end with {last}")
    return turns


def _message(role: Any, content: Any) -> dict[str, str]:
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"has an empty message of role {role!r}")
    return {"role": role, "content": content}
