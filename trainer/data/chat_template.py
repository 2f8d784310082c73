"""Conversations as text, for fine-tuning, chat and export alike.

GPT-2's vocabulary has one special token, end of text, so that turns are marked by plain text:

    <|endoftext|>### System:\nBe brief.\n\n### User:\nHello\n\n### Assistant:\nHi!\n\n### User:\n…

An answer is over when the model predicts the end-of-text token. That token is never *within* a conversation, only at
its beginning: a model that attends within documents alone (`model.document_mask`) sees all turns, and conversations
packed into one row stay apart. So the target of an answer's last token is the end of text although the next turn's
heading follows it. What a user writes cannot be told from a heading; nothing secret may depend on roles.

A tuned checkpoint says `template: headed-turns` in its state.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from core.data.vocabulary import GPT2_END_OF_TEXT
from core.errors import CheckpointError, DataError

NAME = "headed-turns"
STATE_KEY = "template"
ROLES = ("system", "user", "assistant")
NO_TARGET = -1
_SEPARATOR = "\n\n"
# For models that go on with the next turn instead of ending.
STOP = tuple(f"{_SEPARATOR}### {role.capitalize()}:" for role in ROLES)
# The same for `transformers`, as tokenizer.chat_template.
JINJA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


class Rendered(NamedTuple):
    """`targets[i]` is what the model shall predict at `tokens[i]`: answers and their ends; elsewhere NO_TARGET."""

    tokens: list[int]
    targets: list[int]


def render(messages: Iterable[Mapping[str, Any]], encoding, add_generation_prompt: bool = False) -> Rendered:
    """`messages` are {"role": system | user | assistant, "content": text}. Raises DataError naming the message.

    With `add_generation_prompt` it ends where the assistant's answer begins. The ids are those of the whole text: no
    pre-token reaches over the edge of a text without white space at its ends.
    """
    tokens, targets = [GPT2_END_OF_TEXT], [NO_TARGET]
    separator = ""
    for number, message in enumerate(messages):
        role, text = _checked(message, number)
        heading = encoding.encode_ordinary(f"{separator}### {role.capitalize()}:\n")
        content = encoding.encode_ordinary(text)
        tokens += heading + content
        targets += [NO_TARGET] * (len(heading) + len(content))
        if role == "assistant":
            targets[-len(content) - 1 :] = [*content, GPT2_END_OF_TEXT]
        separator = _SEPARATOR
    if len(tokens) == 1:
        raise DataError("a conversation without messages; give at least one of role user")
    if add_generation_prompt:
        heading = encoding.encode_ordinary(f"{_SEPARATOR}### Assistant:\n")
        tokens += heading
        targets += [NO_TARGET] * len(heading)
    return Rendered(tokens, targets)


def is_tuned(state: Mapping[str, Any], where: str) -> bool:
    """Does this checkpoint's state name our template? Raises CheckpointError for another one."""
    name = state.get(STATE_KEY)
    if name not in (None, NAME):
        raise CheckpointError(f"{where}: is tuned on the turn template {name!r}; this program knows {NAME} only")
    return name is not None


def _checked(message: Mapping[str, Any], number: int) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"message {number}: its role is {role!r}, must be one of {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"message {number} (role {role}): its content is {content!r}, must be a text that is not empty")
    return role, content.strip()
