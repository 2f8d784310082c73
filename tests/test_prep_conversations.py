"""data_prep.inspect for rows of tuning: turns, lengths, duplicates, tokens that carry loss."""

import json
from pathlib import Path

import pytest

from core.data import chat_template, vocabulary
from core.errors import ConfigError, DataError
from data_prep import conversations, inspect
from data_prep import sets as entry
from trainer.data import examples


@pytest.fixture(scope="module")
def encoding(vocab_bpe: Path):
    return vocabulary.read(str(vocab_bpe)).encoding()


ROWS = [
    {"question": "Who came?", "answer": "Ann came.", "id": 1},
    {"question": "Who came?", "answer": "Ann came.", "id": 2},
    {"question": "Who came?", "answer": "Nobody."},
    {"conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"},
        {"from": "human", "value": "Count to many. " * 40}, {"from": "gpt", "value": "One"},
    ]},
    {"text": "no conversation"},
]  # fmt: skip


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_figures_of_conversations(encoding, tmp_path: Path):
    found = conversations.measure(ROWS, "conversations", encoding, length=40)
    assert (found.rows, len(found.problems), found.with_system) == (5, 1, 1)
    assert found.problems[0].startswith("row 5 has none of the columns messages")
    assert found.turns == {1: 3, 2: 1}
    assert (found.same_rows, found.same_questions) == (1, 2)
    assert found.not_used == {"id": 2}
    long = chat_template.render([{"role": "user", "content": "Count to many. " * 40}], encoding)
    assert found.longest[0][0] > len(long.tokens)
    assert (found.longest[0][1], found.too_long, found.without_answer) == (4, 1, 0)
    # Training counts the same tokens and the same targets.
    config = examples.ExamplesConfig(examples=write(tmp_path / "rows.jsonl", ROWS), val_fraction=0, max_bad_fraction=1)
    trained = examples.read_conversations(config, encoding, 40).train
    assert (found.tokens, found.loss_tokens) == (len(trained.tokens), int(trained.answers().sum()))


def test_figures_of_pairs_count_the_last_answers(encoding):
    before = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A long first answer."}]
    pair = {"prompt": [*before, {"role": "user", "content": "R"}], "chosen": "Yes", "rejected": "No"}
    found = conversations.measure([pair], "preferences", encoding, length=1024)
    assert found.loss_tokens == 2 * 2  # a word and the end, chosen and rejected
    assert (found.turns, len(found.lengths)) == ({2: 1}, 2)


def test_classes_of_lengths():
    assert conversations.classes([1, 2, 3, 4, 9]) == [1, 2, 1, 1]
    assert conversations.classes([]) == []


def test_inspect_shows_a_stored_set_and_a_file(tmp_path: Path, vocab_bpe: Path, capsys, monkeypatch):
    monkeypatch.setenv("VOCAB_URL", str(vocab_bpe))
    source = write(tmp_path / "rows.jsonl", ROWS[:4])
    entry.store_rows(f"{tmp_path}/data", source, "chat", "CC0")
    capsys.readouterr()
    for arguments in ([f"{tmp_path}/data", "--set=chat"], [source]):
        assert inspect.main([*arguments, "--length=40"]) == 0
        out = capsys.readouterr().out
        assert "4, of which 0 cannot be used" in out
        assert "longest rows" in out
        assert "texts by tokens" in out
    with pytest.raises(DataError, match=r"data: holds no tokens, but sets; name one: --set=chat$"):
        inspect.main([f"{tmp_path}/data"])


def test_what_cannot_be_shown_is_said(tmp_path: Path, vocab_bpe: Path, monkeypatch):
    monkeypatch.setenv("VOCAB_URL", str(vocab_bpe))
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no rows; give a file with one row per line"):
        inspect.main([write(tmp_path / "empty.jsonl", [])])
    with pytest.raises(DataError, match=r"there is no set 'chat'; store it first: python -m data_prep\.sets"):
        inspect.main([str(tmp_path), "--set=chat"])
    with pytest.raises(ConfigError, match="give one DATA_URL, and whole numbers"):
        inspect.main([str(tmp_path), "--length=0"])
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no rows"):
        entry.store_rows(str(tmp_path), str(tmp_path / "empty.jsonl"), "chat", "CC0")
