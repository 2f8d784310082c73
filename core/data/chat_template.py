"""Renders conversations as text and token ids, for fine-tuning, chat and export.

GPT-2's vocabulary has one special token, end of text, so plain text marks the turns:

    <|endoftext|>### System:\nBe brief.\n\n### User:\nHello\n\n### Assistant:\nHi!\n\n### User:\n…

An answer ends when the model predicts the end-of-text token. So the target of an answer's last token is the end of
text, although the heading of the next turn follows. As an input, the end-of-text token appears only at the beginning of
a conversation. If `model.document_mask` is true, the model therefore attends to all turns of a conversation, and to no
other conversation in the same row. A user can type a heading, so do not rely on roles to protect secrets.

The state of a checkpoint that was fine-tuned with this template has `template: headed-turns`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from core.data.vocabulary import GPT2_END_OF_TEXT
from core.errors import CheckpointError, DataError

NAME = "headed-turns"
STATE_KEY = "template"
ROLES = ("system", "user", "assistant")
NO_TARGET = -1
END_OF_TEXT = "<|endoftext|>"
_SEPARATOR = "\n\n"
# Stop texts for a model that writes the heading of the next turn instead of ending its answer.
STOP = tuple(f"{_SEPARATOR}### {role.capitalize()}:" for role in ROLES)
# The same template for `transformers`, as tokenizer.chat_template.
JINJA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


class Rendered(NamedTuple):
    """`targets[i]` is the token that follows `tokens[i]`, if that token belongs to an answer or ends an answer.

    Otherwise it is NO_TARGET.
    """

    tokens: list[int]
    targets: list[int]

    def last_answer_only(self) -> "Rendered":
        """A copy that keeps only the targets of the last answer.

        Both texts of a preference pair have the same earlier answers, so the losses of these answers would cancel out.
        """
        begin = len(self.targets)
        while begin and self.targets[begin - 1] != NO_TARGET:
            begin -= 1
        return Rendered(self.tokens, [NO_TARGET] * begin + self.targets[begin:])


def render(messages: Iterable[Mapping[str, Any]], encoding, add_generation_prompt: bool = False) -> Rendered:
    """Token ids and targets of `messages`, {"role": system | user | assistant, "content": text}.

    If `add_generation_prompt` is true, the text ends with the heading of the assistant's answer. Headings and contents
    are encoded separately. Contents are stripped of white space, so the ids are the same as if the whole text were
    encoded at once. Raises DataError, which names the wrong message.
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


def text_of(messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    """The text of a conversation, as JINJA makes it. `render` returns the token ids of this text. Raises DataError."""
    turns = [_checked(message, number) for number, message in enumerate(messages)]
    headed = [f"### {role.capitalize()}:\n{content}" for role, content in turns]
    return END_OF_TEXT + _SEPARATOR.join([*headed, "### Assistant:\n"] if add_generation_prompt else headed)


def is_tuned(state: Mapping[str, Any], where: str) -> bool:
    """Whether a checkpoint with this state was fine-tuned with this template.

    Raises CheckpointError if it was fine-tuned with another template.
    """
    name = state.get(STATE_KEY)
    if name not in (None, NAME):
        raise CheckpointError(f"{where}: was tuned with the chat template {name!r}; this program knows {NAME} only")
    return name is not None


def _checked(message: Mapping[str, Any], number: int) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise DataError(f"message {number}: its role is {role!r}, must be one of {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"message {number} (role {role}): its content is {content!r}, must be a text that is not empty")
    return role, content.strip()
