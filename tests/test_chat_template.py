"""core.data.chat_template: ids, targets, and the same text by way of `transformers`' template language."""

import jinja2
import pytest

from core.data import chat_template, vocabulary
from core.data.chat_template import NO_TARGET, render
from core.data.vocabulary import GPT2_END_OF_TEXT
from core.errors import CheckpointError, DataError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hello  there\n"},
    {"role": "assistant", "content": "Hi!\n\n### Well\n  …"},
    {"role": "user", "content": "'s that all?"},
    {"role": "assistant", "content": "Yes 🙂."},
]
TEXT = (
    "### System:\nBe brief.\n\n### User:\nHello  there\n\n### Assistant:\nHi!\n\n### Well\n  …"
    "\n\n### User:\n's that all?\n\n### Assistant:\nYes 🙂."
)


@pytest.fixture(scope="module")
def encoding(vocab_bpe):
    return vocabulary.read(str(vocab_bpe)).encoding()


def test_ids_are_those_of_the_whole_text(encoding):
    assert render(MESSAGES, encoding).tokens == [GPT2_END_OF_TEXT, *encoding.encode_ordinary(TEXT)]
    asked = render(MESSAGES[:2], encoding, add_generation_prompt=True).tokens
    assert encoding.decode(asked[1:]) == "### System:\nBe brief.\n\n### User:\nHello  there\n\n### Assistant:\n"
    assert asked == render(MESSAGES, encoding).tokens[: len(asked)]


def test_targets_are_the_answers_and_their_ends_only(encoding):
    tokens, targets = render(MESSAGES, encoding)
    assert len(tokens) == len(targets)
    wanted = [target for target in targets if target != NO_TARGET]
    answers = [encoding.encode_ordinary(message["content"]) for message in MESSAGES if message["role"] == "assistant"]
    assert wanted == [*answers[0], GPT2_END_OF_TEXT, *answers[1], GPT2_END_OF_TEXT]
    for position, target in enumerate(targets[:-1]):
        assert target in (NO_TARGET, GPT2_END_OF_TEXT, tokens[position + 1])
    assert GPT2_END_OF_TEXT not in tokens[1:]


@pytest.mark.parametrize("ask", [False, True])
def test_template_for_transformers_gives_the_same_text(encoding, ask: bool):
    # As transformers compiles it (utils/chat_template_utils.py).
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(chat_template.JINJA)
    text = template.render(messages=MESSAGES, bos_token="<|endoftext|>", add_generation_prompt=ask)
    assert text == encoding.decode(render(MESSAGES, encoding, add_generation_prompt=ask).tokens)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "a conversation without messages; give at least one of role user"),
        ([{"role": "tool", "content": "x"}], "message 0: its role is 'tool', must be one of system, user, assistant"),
        (
            [MESSAGES[0], {"role": "user", "content": " \n"}],
            r"message 1 \(role user\): its content is ' \\n', must be a text that is not empty",
        ),
    ],
)
def test_what_cannot_be_rendered_is_refused(encoding, messages: list, error: str):
    with pytest.raises(DataError, match=f"^{error}$"):
        render(messages, encoding)


def test_state_of_a_checkpoint_tells_which_template():
    assert not chat_template.is_tuned({}, "run")
    assert chat_template.is_tuned({"template": chat_template.NAME}, "run")
    with pytest.raises(CheckpointError, match=r"^run: was tuned with the chat template 'other'; .* headed-turns only$"):
        chat_template.is_tuned({"template": "other"}, "run")


@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_of_a_conversation_has_its_tokens(encoding, prompt: bool):
    messages = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": "Hello!"},
    ]
    text = chat_template.text_of(messages, prompt)
    assert encoding.encode(text, allowed_special="all") == chat_template.render(messages, encoding, prompt).tokens
