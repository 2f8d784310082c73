"""Reads and writes example sets: evaluation questions, conversations and preferences beside the token shards.

    DATA_URL/sets/<name>.jsonl   one row per line
    DATA_URL/sets/<name>.json    description with rows, bytes and SHA-256; written last

A row of conversations is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
The roles are system (first only), then user and assistant in turn. The last one is assistant. Rows of the older form
`instruction`, `input` (optional), `output` are converted: instruction and input, joined by a blank line, become the
user's message.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core import storage
from core.errors import DataError, ObjectNotFound

FORMAT = "rows"
VERSION = 1


@dataclass(frozen=True)
class SetInfo:
    """Description of an example set: content, source and checksum."""

    name: str
    schema: str
    source: str
    licence: str
    rows: int
    bytes: int
    sha256: str


def write(data_url: str, name: str, schema: str, source: str, licence: str, data: bytes) -> SetInfo:
    """Stores JSON lines, then their description."""
    info = SetInfo(name, schema, source, licence, data.count(b"\n"), len(data), hashlib.sha256(data).hexdigest())
    storage.write_bytes(_uri(data_url, f"{name}.jsonl"), data)
    document = {"format": FORMAT, "version": VERSION, **asdict(info)}
    storage.write_bytes(_uri(data_url, f"{name}.json"), (json.dumps(document, indent=1) + "\n").encode())
    return info


def info_of(data_url: str, name: str) -> SetInfo:
    """The description of a set. Raises DataError if there is none."""
    uri = _uri(data_url, f"{name}.json")
    try:
        document = json.loads(storage.read_bytes(uri))
        if (document.pop("format"), document.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"not {FORMAT} version {VERSION}")
        return SetInfo(**document)
    except ObjectNotFound as error:
        raise DataError(
            f"{uri}: there is no set {name!r}; store it first: python -m data_prep.sets {name} {data_url}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{uri}: not a description of a set ({error}); store it again") from error


def read(data_url: str, name: str) -> Sequence[dict[str, Any]]:
    """All rows of a set. Raises DataError if the set is missing or its checksum differs."""
    info = info_of(data_url, name)
    uri = _uri(data_url, f"{name}.jsonl")
    data = storage.read_bytes(uri)
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise DataError(f"{uri}: its checksum has changed; store it again: python -m data_prep.sets {name} {data_url}")
    return [json.loads(line) for line in data.splitlines()]


def read_if_there(data_url: str, name: str) -> Sequence[dict[str, Any]] | None:
    """All rows of a set, or None if there is none. Raises DataError if its checksum differs."""
    return read(data_url, name) if storage.exists(_uri(data_url, f"{name}.json")) else None


def _uri(data_url: str, name: str) -> str:
    return storage.join(data_url, "sets", name)


# --- conversations ---------------------------------------------------------------------------------------------


def conversation(row: Any) -> dict[str, Any]:
    """Converts a row to the stored form. Raises ValueError with the problem."""
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    if row.get("messages") is None and "instruction" in row:
        parts = [part for part in (row["instruction"], row.get("input")) if part]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("has an instruction or input that is not a text")
        question = "\n\n".join(parts)
        row = {"messages": [_message("user", question), _message("assistant", row.get("output"))]}
    return {"messages": _turns(row.get("messages"), "assistant")}


def preference(row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Converts a row to two conversations that differ in the last answer, the better one first. Raises ValueError.

    `chosen` and `rejected` are answers to `prompt`, a text or a list of messages. Without a `prompt` they are whole
    lists of messages.
    """
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
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
        raise ValueError("has the same answer twice")
    return chosen, rejected


def preference_row(row: Any) -> dict[str, Any]:
    """Converts a row of preferences to the stored form, lists of messages. Raises ValueError."""
    chosen, rejected = preference(row)
    return {"chosen": chosen["messages"], "rejected": rejected["messages"]}


def conversation_prompt(row: Any) -> list[dict[str, str]]:
    """Messages up to the user's last one: a row's `messages`, or its `prompt`, a text. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    return _turns(row["messages"], "user") if "messages" in row else [_message("user", row.get("prompt"))]


def question_of(messages: list[dict[str, str]]) -> str:
    """All messages before the last answer, as one text. Rows with the same question go to the same split."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages[:-1])


def _turns(messages: Any, last: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("has neither messages nor instruction and output")
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("has a message that is not an object")
    turns = [_message(message.get("role"), message.get("content")) for message in messages]
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    expected = ["user", "assistant"] * ((len(spoken) + 1) // 2)
    if not spoken or [turn["role"] for turn in spoken] != expected[: len(spoken)] or spoken[-1]["role"] != last:
        raise ValueError(f"does not alternate user, assistant and end with {last}")
    return turns


def _message(role: Any, content: Any) -> dict[str, str]:
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"has an empty message of role {role!r}")
    return {"role": role, "content": content}
