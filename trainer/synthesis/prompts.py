"""Prompts out of a file, each once."""

import hashlib
import json
from dataclasses import dataclass

from core import storage
from core.data.conversations import conversation_prompt
from core.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """`digest` is of the normalised text: what differs in case and white space alone is the same prompt."""

    messages: tuple[dict[str, str], ...]
    digest: str


@dataclass(frozen=True)
class Prompts:
    prompts: tuple[Prompt, ...]
    duplicates: int
    fingerprint: str


def read(uri: str) -> Prompts:
    """Lines of a .txt file, or rows of a .jsonl file with `prompt` or `messages`. Raises DataError naming the line."""
    if not uri.endswith((".txt", ".jsonl")):
        raise DataError(f"{uri}: unknown kind of file; give .txt with a prompt per line, or .jsonl")
    content = storage.read_bytes(uri)
    found: dict[str, Prompt] = {}
    count = 0
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        count += 1
        try:
            row = {"prompt": line.decode()} if uri.endswith(".txt") else json.loads(line)
            messages = conversation_prompt(row)
        except ValueError as error:
            raise DataError(f"{uri}: line {number} {error}; give a text as `prompt`, or `messages`") from error
        digest = digest_of("\n".join(f"{each['role']}: {each['content']}" for each in messages))
        found.setdefault(digest, Prompt(tuple(messages), digest))
    if not found:
        raise DataError(f"{uri}: holds no prompt; give one per line")
    return Prompts(tuple(found.values()), count - len(found), hashlib.sha256(content).hexdigest())


def digest_of(text: str) -> str:
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()
