"""Reads and writes example sets: evaluation questions, conversations and preferences beside the token shards.

    DATA_URL/sets/<name>.jsonl   one row per line
    DATA_URL/sets/<name>.json    description with rows, bytes and SHA-256; written last

A row of conversations is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.
The first message may have the role system. Then user and assistant alternate, and the last message is the assistant's.
`conversation` converts rows of other forms, such as ShareGPT's (`conversations`) and Alpaca's (`instruction`, `input`,
`output`). The content of a message may be a list of text parts, as in OpenAI's API.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from shlex import quote
from typing import Any

from core import storage, untrusted
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
        document = untrusted.read_json(uri)
        if (document.pop("format"), document.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"not {FORMAT} version {VERSION}")
        info = SetInfo(**document)
        if type(info.rows) is not int or not all(isinstance(each, str) for each in (info.source, info.sha256)):
            raise ValueError("rows, source or sha256 is of another type")
        return info
    except ObjectNotFound as error:
        raise DataError(_absent(uri, data_url, name)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        again = _storing(data_url, name)
        raise DataError(f"{uri}: not a description of a set ({error}); store it again: {again}") from error


def read(data_url: str, name: str) -> Sequence[dict[str, Any]]:
    """All rows of a set. Raises DataError if the set is missing or its content does not match its checksum."""
    info = info_of(data_url, name)
    uri = _uri(data_url, f"{name}.jsonl")
    data = storage.read_bytes(uri, untrusted.memory_bytes())
    if hashlib.sha256(data).hexdigest() != info.sha256:
        again = _storing(data_url, name, info.schema)
        raise DataError(f"{uri}: its checksum has changed; store it again, from {info.source}: {again}")
    try:
        return [untrusted.parse_json(line) for line in data.splitlines()]
    except ValueError as error:
        again = _storing(data_url, name, info.schema)
        raise DataError(f"{uri}: a row is not JSON ({error}); store it again, from {info.source}: {again}") from error


def read_if_there(data_url: str, name: str) -> Sequence[dict[str, Any]] | None:
    """All rows of a set, or None if there is none. Raises DataError if the content does not match its checksum."""
    return read(data_url, name) if storage.exists(_uri(data_url, f"{name}.json")) else None


def missing(data_url: str, name: str) -> str:
    """If a set is missing, a sentence that names the set and the command that stores it. Otherwise ""."""
    uri = _uri(data_url, f"{name}.json")
    return "" if storage.exists(uri) else _absent(uri, data_url, name)


def _absent(uri: str, data_url: str, name: str) -> str:
    return f"{uri}: there is no set {name!r}; store it first: {_storing(data_url, name)}"


def _uri(data_url: str, name: str) -> str:
    return storage.join(data_url, "sets", name)


def _storing(data_url: str, name: str, schema: str = "") -> str:
    """The command that stores a set. If `schema` is empty, the name determines the kind of the set."""
    kind = {"conversations": "instructions"}.get(schema, schema) or ("hellaswag" if name == "hellaswag" else "")
    if kind == "hellaswag":
        return f"python -m data_prep.sets hellaswag {quote(data_url)}"
    kind = kind or ("preferences" if name == "preferences" else "instructions")
    return f"python -m data_prep.sets {kind} {quote(data_url)} --from=FILE --name={name}"


# --- conversations ---------------------------------------------------------------------------------------------


# Columns of a row of preferences that cannot hold its prompt.
_TEXTS = ("chosen", "rejected", "system")
# Columns and fields that change the meaning of an answer. A conversation of texts cannot express them.
_MEANINGFUL = ("tools", "images", "functions")
_MEANINGFUL_IN_MESSAGES = ("tool_calls", "function_call")
_HUMAN = re.compile(r"\n\n(Human|Assistant):")
# Columns that hold a whole conversation, and columns that hold a system message.
_WHOLE = ("messages", "conversations")
_SYSTEM = ("system", "system_prompt")
# Column of the question → columns of the answer: for Alpaca and Dolly, question sets, and OpenAI's older format.
_ANSWERS = {
    "instruction": ("output", "response"),
    "question": ("answer", "response", "output"),
    "prompt": ("completion", "response"),
}
_MORE = ("input", "context")  # if the question is in `instruction` or `question`, these columns are part of it
# ShareGPT's names of roles.
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SPEAKERS |= {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant"}


def conversation(row: Any) -> dict[str, Any]:
    """Converts a row to the stored form. Raises ValueError with the problem.

    A row holds a whole conversation in `messages` or `conversations`, or a question and an answer in two columns
    (_ANSWERS). A message has OpenAI's fields `role` and `content`, or ShareGPT's `from` and `value`. The columns
    `prompt` and `completion` may also hold lists of messages. A `system` column becomes the first message.
    """
    _check_row(row)
    row = _in_roles(row)
    used = _conversation_columns(row)
    if used[0] in _WHOLE:
        if row.get("completion") is not None:
            raise ValueError(f"has both {used[0]} and a completion; leave one of them out")
        messages = row[used[0]]
    elif used[0] == "prompt":
        messages = _joined(row.get("prompt"), row.get(used[1]), used[1])
    else:
        messages = [_message("user", _question(row, used[:-1])), _message("assistant", row.get(used[-1]))]
    return {"messages": _turns(_with_system(row, messages), "assistant")}


def preference(row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Converts a row to two conversations that differ in the last answer. The better one comes first.

    Raises ValueError. `chosen` and `rejected` are texts or lists of messages, as in TRL. If the row has a `prompt` (a
    text or a list of messages), `chosen` and `rejected` are answers to this prompt, or whole conversations. If it has
    no `prompt`, they are whole conversations. If these are texts, both are dialogues of "Human:" and "Assistant:", or
    both begin with the same prompt and then differ. Columns `question`, or `instruction` and `input`, may replace
    `prompt`. A `system` column becomes the first message.
    """
    _check_row(row)
    row = _in_roles(row)
    chosen, rejected = row.get("chosen"), row.get("rejected")
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer is None:
            also = "; `completion` with `label` is not a pair" if "label" in row and "completion" in row else ""
            raise ValueError(f"has no `{key}`{also}")
    prompt = _value(row, _prompt_columns(row)) or None
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        wholes = _whole_texts(row)
    else:
        wholes = [_joined(prompt, answer, key) for key, answer in (("chosen", chosen), ("rejected", rejected))]
    better, worse = ({"messages": _turns(_with_system(row, whole), "assistant")} for whole in wholes)
    if better["messages"][:-1] != worse["messages"][:-1]:
        raise ValueError("has a chosen and a rejected answer to different prompts")
    if better == worse:
        raise ValueError("has the same answer twice")
    return better, worse


def preference_row(row: Any) -> dict[str, Any]:
    """Converts a row of preferences to the stored form, lists of messages. Raises ValueError."""
    chosen, rejected = preference(row)
    return {"chosen": chosen["messages"], "rejected": rejected["messages"]}


def conversation_prompt(row: Any) -> list[dict[str, str]]:
    """The messages of a prompt, from the column `messages` or `prompt` (text or list). The last one is the user's.

    Raises ValueError.
    """
    _check_row(row)
    prompt = row["messages"] if "messages" in row else row.get("prompt")
    if "messages" not in row and not _is_messages(prompt):
        prompt = [_message("user", prompt)]
    return _turns(_with_system(row, prompt), "user")


def unused(row: Any, schema: str) -> list[str]:
    """Columns of a row, and fields of its messages, that have a value but do not become part of the conversation."""
    if not isinstance(row, dict):
        return []
    row = _in_roles(row)
    is_pair = schema == "preferences"
    used = ("chosen", "rejected", *_prompt_columns(row)) if is_pair else _conversation_columns(row)
    fields = {
        key
        for messages in map(row.get, used)
        if _is_messages(messages)
        for message in messages
        for key, value in message.items()
        if value not in (None, [], "") and key not in ("role", "content", "weight")
    }
    columns = [key for key, value in row.items() if value is not None and key not in (*used, *_SYSTEM, "provenance")]
    return sorted(columns) + sorted(f"messages[].{key}" for key in fields)


def text_of(content: Any) -> Any:
    """The text of a message's content, which may be a list of text parts as in OpenAI's API.

    Any other value is returned unchanged. Raises ValueError for a part that is not text.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"has a content part of type {kind!r}; only text can be used")
        texts.append(text)
    return "".join(texts)


def question_of(messages: list[dict[str, str]]) -> str:
    """All messages before the last answer, as one text. Rows with the same question go to the same split."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages[:-1])


def _check_row(row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError("is not a JSON object")
    for key in _MEANINGFUL:
        if row.get(key):
            raise ValueError(f"has {key}, which a conversation of texts cannot express; leave the column out")


def _question(row: dict[str, Any], columns: Sequence[str]) -> str:
    """The texts of the columns, joined by a blank line."""
    parts = {column: row[column] for column in columns if row.get(column)}
    for column, part in parts.items():
        if not isinstance(part, str):
            raise ValueError(f"has the column {column} of type {type(part).__name__}, not a text")
    return "\n\n".join(parts.values())


def _conversation_columns(row: dict[str, Any]) -> tuple[str, ...]:
    """The columns that hold a row's conversation.

    This is one column with a whole conversation, or the columns of a question and of an answer. Raises ValueError for a
    row of another form.
    """
    for column in _WHOLE:
        if row.get(column) is not None:
            return (column,)
    pairs = [(asks, answer) for asks, answers in _ANSWERS.items() for answer in answers if answer in row]
    asked = [pair for pair in pairs if pair[0] in row] or [pair for pair in pairs if pair[1] == "completion"]
    if asked:
        asks, answer = next((pair for pair in asked if row[pair[1]] is not None), asked[0])
        return (asks, answer) if asks == "prompt" else (asks, *_MORE, answer)
    names = ", ".join(str(name) for name in list(row)[:8]) or "none"
    pairs = "; ".join(f"{asks} and {' or '.join(answers)}" for asks, answers in _ANSWERS.items())
    raise ValueError(f"has none of the columns {', '.join(_WHOLE)}; {pairs} (its columns: {names}); rename them")


def _in_roles(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose messages have `role` and `content` instead of ShareGPT's `from` and `value`. Raises ValueError."""

    def message(said: Any) -> Any:
        if not isinstance(said, dict) or "role" in said or not {"from", "value"} <= said.keys():
            return said
        speaker = said["from"]
        if not isinstance(speaker, str) or speaker.lower() not in _SPEAKERS:
            raise ValueError(f"has a message from {speaker!r}; known are {', '.join(_SPEAKERS)}")
        rest = {key: value for key, value in said.items() if key not in ("from", "value")}
        return {"role": _SPEAKERS[speaker.lower()], "content": said["value"], **rest}

    columns = (*_WHOLE, "prompt", "completion", "response", "chosen", "rejected")
    said = {name: row[name] for name in columns if name in row}
    return row | {
        name: [message(each) for each in value] if isinstance(value, list) else message(value)
        for name, value in said.items()
    }


def _prompt_columns(row: dict[str, Any]) -> tuple[str, ...]:
    """The columns of a row of preferences that hold its prompt."""
    chosen = row.get("chosen")
    whole = _is_messages(chosen) and chosen[0]["role"] != "assistant"
    for key in ("prompt",) if whole else ("prompt", "question", *_WHOLE):
        if row.get(key) is not None:
            return (key,)
    return () if whole else ("instruction", "input")


def _value(row: dict[str, Any], columns: tuple[str, ...]) -> Any:
    return row[columns[0]] if len(columns) == 1 else _question(row, columns) if columns else None


def _joined(prompt: Any, answer: Any, key: str) -> list[dict[str, Any]]:
    """The whole conversation of a prompt and an answer. Both may be a text or a list of messages."""
    answer = [answer] if isinstance(answer, dict) else answer
    turns = answer if _is_messages(answer) else [_message("assistant", answer)]
    if prompt is None:
        if not _is_messages(answer):
            raise ValueError("has no prompt")
        return turns
    before = prompt if _is_messages(prompt) else [_message("user", prompt)]
    if turns[0].get("role") == "assistant":
        return [*before, *turns]
    # Here the answer is a whole conversation, which must contain the prompt.
    said = [text_of(turn.get("content")) for turn in turns[:-1]]
    if any(_stripped(text_of(message.get("content"))) not in map(_stripped, said) for message in before):
        raise ValueError(f"has a prompt that does not occur in `{key}`, a whole conversation; leave out one of them")
    return turns


def _whole_texts(row: dict[str, Any]) -> list[list[dict[str, str]]]:
    """The conversations in two texts: dialogues of "Human:" and "Assistant:", or one prompt with different answers."""
    chosen, rejected = texts = row["chosen"], row["rejected"]
    if all(_HUMAN.match(text) for text in texts):
        roles = {"Human": "user", "Assistant": "assistant"}
        parts = [_HUMAN.split(text)[1:] for text in texts]
        return [
            [{"role": roles[who], "content": said.strip()} for who, said in zip(part[::2], part[1::2], strict=True)]
            for part in parts
        ]
    # Another column may hold the prompt. In that case, the common beginning of the two answers is not the prompt.
    others = [key for key, value in row.items() if key not in _TEXTS and isinstance(value, str | list)]
    if others:
        raise ValueError(f"has no prompt; if one of {', '.join(others)} holds it, rename that column to `prompt`")
    same = next((at for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other), None)
    same = min(len(chosen), len(rejected)) if same is None else same
    end = max(chosen.rfind(space, 0, same) for space in " \n\t")  # at a white space, so that no word is cut in two
    if end < 1 or not chosen[:end].strip():
        raise ValueError("has no prompt: `chosen` and `rejected` are texts that do not begin alike")
    return [[_message("user", text[:end]), _message("assistant", text[end:].lstrip())] for text in texts]


def _with_system(row: dict[str, Any], messages: Any) -> Any:
    """Puts the text of the column `system` before the messages. An empty column is ignored."""
    system = next((row[name] for name in _SYSTEM if row.get(name)), None)
    if not system or not _is_messages(messages):
        return messages
    first = _message("system", system)
    if messages[0].get("role") != "system":
        return [first, *messages]
    if text_of(messages[0].get("content")) != first["content"]:
        raise ValueError("has a system column and another message of role 'system'; leave out one of them")
    return messages


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "role" in each for each in value)


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _turns(messages: Any, last: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("has no messages in its list")
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError("has a message that is not an object")
    for message in messages:
        for key in _MEANINGFUL_IN_MESSAGES:
            if message.get(key):
                raise ValueError(f"has a message with {key}, which a conversation of texts cannot express")
        if message.get("weight") not in (None, 1):
            raise ValueError(f"has a message of weight {message['weight']!r}; only answers of weight 1 can be used")
    turns = [_message(message.get("role"), message.get("content")) for message in messages]
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    expected = ["user", "assistant"] * ((len(spoken) + 1) // 2)
    if not spoken or [turn["role"] for turn in spoken] != expected[: len(spoken)] or spoken[-1]["role"] != last:
        raise ValueError(f"does not alternate user, assistant and end with {last}")
    return turns


def _message(role: Any, content: Any) -> dict[str, str]:
    content = text_of(content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"has a message of role {role!r} whose content is {type(content).__name__}, not a text")
    if not content or not content.strip():
        raise ValueError(f"has an empty message of role {role!r}")
    # OpenAI's newer models call the system role `developer`.
    return {"role": "system" if role == "developer" else role, "content": content}
