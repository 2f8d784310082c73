"""Small sets beside the shards: checked when stored, checked when read."""

import hashlib
import json
from pathlib import Path

import pytest

from core.data import sets
from core.errors import ConfigError, DataError
from data_prep import hellaswag
from data_prep import sets as entry

GOOD = [
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
    {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    {"instruction": "Say hello.", "output": "Hello."},
]


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def test_instructions_are_stored_in_one_form(tmp_path: Path, capsys: pytest.CaptureFixture):
    source = write_rows(tmp_path / "rows.jsonl", GOOD)
    assert entry.main(["instructions", str(tmp_path), f"--from={source}", "--licence=CC0"]) == 0
    assert "3 rows" in capsys.readouterr().out
    rows = sets.read(str(tmp_path), "instructions")
    assert [row["messages"][0]["content"] for row in rows] == ["2+2?", "Add.\n\n2 and 2", "Say hello."]
    assert sets.info_of(str(tmp_path), "instructions").licence == "CC0"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("not json", "is not a JSON object"),
        ({"text": "x"}, "has none of the columns messages, conversations; instruction and .*its columns: text"),
        ({"instruction": "x"}, "instruction and output or response; .*its columns: instruction"),
        ({"question": "x", "answer": {"text": ["y"]}}, "whose content is dict, not a text"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "has a message from 'tool'; known are human, user, gpt"),
        ({"instruction": "x", "output": " "}, "empty message of role 'assistant'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "does not alternate user, assistant"),
        ({"messages": [{"role": "system", "content": "x"}]}, "does not alternate user, assistant"),
        ({"messages": ["x"]}, "a message that is not an object"),
    ],
)
def test_bad_rows_are_named_and_refused(tmp_path: Path, row, problem: str):
    source = write_rows(tmp_path / "rows.jsonl", [*GOOD, row])
    with pytest.raises(DataError, match=f"1 of 4 rows are not conversations .row 4: .*{problem}"):
        entry.store_rows(str(tmp_path), source, "instructions", "CC0")
    entry.store_rows(str(tmp_path), write_rows(tmp_path / "many.jsonl", [*GOOD * 40, row]), "instructions", "CC0")
    assert len(sets.read(str(tmp_path), "instructions")) == 120


def test_damaged_and_missing_sets_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"there is no set 'hellaswag'; store it first: python -m data_prep\.sets"):
        sets.read(str(tmp_path), "hellaswag")
    entry.store_rows(str(tmp_path), write_rows(tmp_path / "rows.jsonl", GOOD), "instructions", "CC0")
    (tmp_path / "sets/instructions.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="its checksum has changed"):
        sets.read(str(tmp_path), "instructions")


def test_a_missing_evaluation_set_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = dict.fromkeys(hellaswag.FIELDS, "x") | {"label": 3}
    source = write_rows(tmp_path / "hellaswag.jsonl", [row])
    monkeypatch.setattr(hellaswag, "SOURCE", source)
    with pytest.raises(DataError, match=r"leave the set out with --evaluation_sets=, or store a copy: python -m data_"):
        hellaswag.ensure(str(tmp_path / "data"), ["hellaswag"])
    assert not (tmp_path / "data/sets/hellaswag.json").exists()
    published = hashlib.sha256(hellaswag.stored_form([row], "x")).hexdigest()
    monkeypatch.setattr(hellaswag, "ROWS_SHA256", published)
    hellaswag.ensure(str(tmp_path / "data"), [])
    assert not (tmp_path / "data").exists()
    hellaswag.ensure(str(tmp_path / "data"), ["hellaswag"])
    assert sets.info_of(str(tmp_path / "data"), "hellaswag").sha256 == published
    Path(source).unlink()  # from now on nothing is fetched
    hellaswag.ensure(str(tmp_path / "data"), ["hellaswag"])


def test_hellaswag_is_the_published_one_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    row = dict.fromkeys(hellaswag.FIELDS, "x") | {"ind": 1, "label": "3", "endings": ["a", "b", "c", "d"]}
    shuffled = dict(sorted(row.items()))
    source = write_rows(tmp_path / "hellaswag.jsonl", [shuffled])
    with pytest.raises(DataError, match=r"its 1 rows have the checksum .* HellaSwag's validation set has dc1be2fa1bef"):
        hellaswag.store(str(tmp_path), source)
    assert not (tmp_path / "sets").exists()
    with pytest.raises(DataError, match=r"not HellaSwag.s rows .KeyError"):
        hellaswag.store(str(tmp_path), write_rows(tmp_path / "other.jsonl", [{"a": 1}]))
    # The checksum is that of one form, whatever the order of columns in the copy.
    assert list(json.loads(hellaswag.stored_form([shuffled], "x"))) == list(hellaswag.FIELDS)
    assert json.loads(hellaswag.stored_form([shuffled], "x"))["label"] == 3


def test_unknown_kind_and_missing_source(tmp_path: Path):
    with pytest.raises(ConfigError, match="give a kind and a DATA_URL"):
        entry.main(["mmlu", str(tmp_path)])
    with pytest.raises(ConfigError, match="--from is missing"):
        entry.main(["instructions", str(tmp_path)])


def test_preference_pairs_are_stored_in_one_form(tmp_path: Path):
    pairs = [{"prompt": "Q", "chosen": "A", "rejected": "B"}]
    source = write_rows(tmp_path / "pairs.jsonl", pairs)
    assert entry.main(["preferences", str(tmp_path), f"--from={source}", "--licence=CC0"]) == 0
    assert sets.info_of(str(tmp_path), "preferences").schema == "preferences"
    (row,) = sets.read(str(tmp_path), "preferences")
    question = {"role": "user", "content": "Q"}
    assert row["chosen"] == [question, {"role": "assistant", "content": "A"}]
    assert row["rejected"] == [question, {"role": "assistant", "content": "B"}]
    source = write_rows(tmp_path / "bad.jsonl", [{"prompt": "Q", "chosen": "A"}])
    with pytest.raises(DataError, match=r"1 of 1 rows are not preferences \(row 1: has no `rejected`"):
        entry.main(["preferences", str(tmp_path), f"--from={source}"])


PARTS = [{"type": "text", "text": "Q"}, {"type": "text", "text": " 1"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": ["A"]}]},
        {"prompt": [{"role": "user", "content": PARTS}], "completion": [{"role": "assistant", "content": "A"}]},
        {"prompt": "Q 1", "completion": "A"},
    ],
)
def test_a_content_is_a_text_or_parts_of_one(row):
    expected = [{"role": "user", "content": "Q 1"}, {"role": "assistant", "content": "A"}]
    assert sets.conversation(row) == {"messages": expected}
    system = {"role": "system", "content": "Be brief."}
    assert sets.conversation(row | {"system": "Be brief."}) == {"messages": [system, *expected]}


SAID = [{"from": "human", "value": "Q 1"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    ("row", "not_used"),
    [
        ({"conversations": SAID, "id": "x"}, ["id"]),  # ShareGPT
        ({"conversations": [{"role": "user", "content": "Q 1"}, {"role": "assistant", "content": "A"}]}, []),
        ({"conversations": [SAID[0], SAID[1] | {"weight": 1, "source": "y"}]}, ["messages[].source"]),
        ({"question": "Q 1", "answer": "A"}, []),
        ({"question": "Q 1", "response": "A", "level": 1}, ["level"]),
        ({"instruction": "Q 1", "context": "", "response": "A"}, []),  # Dolly
        ({"instruction": "Q 1", "input": "", "output": "A", "text": "Q 1 A"}, ["text"]),  # Alpaca
        ({"prompt": "Q 1", "response": "A"}, []),
    ],
)
def test_rows_of_usual_sets_become_conversations(row, not_used: list[str]):
    expected = [{"role": "user", "content": "Q 1"}, {"role": "assistant", "content": "A"}]
    assert sets.conversation(row) == {"messages": expected}
    assert sets.unused(row, "conversations") == not_used
    system = {"role": "system", "content": "Be brief."}
    for column in ("system", "system_prompt"):
        assert sets.conversation(row | {column: "Be brief."}) == {"messages": [system, *expected]}


def test_a_context_belongs_to_the_question():
    row = {"instruction": "Who?", "context": "Ann came.", "response": "Ann"}
    assert sets.conversation(row)["messages"][0]["content"] == "Who?\n\nAnn came."
    row = {"question": "Who?", "context": "Ann came.", "answer": "Ann"}
    assert sets.conversation(row)["messages"][0]["content"] == "Who?\n\nAnn came."


def test_pairs_of_sharegpt():
    better, worse = sets.preference(
        {"conversations": SAID[:1], "chosen": SAID[1], "rejected": {**SAID[1], "value": "B"}}
    )
    assert [each["messages"][-1]["content"] for each in (better, worse)] == ["A", "B"]
    assert better["messages"][0] == {"role": "user", "content": "Q 1"}


def test_parts_in_prompts_and_of_other_kinds():
    user = {"role": "user", "content": PARTS}
    for row in ({"messages": [user]}, {"prompt": [user]}, {"prompt": PARTS}, {"prompt": "Q 1"}):
        assert sets.conversation_prompt(row) == [{"role": "user", "content": "Q 1"}]
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(ValueError, match="has a content part of type 'image_url'; only text can be used"):
        sets.conversation({"messages": [picture, {"role": "assistant", "content": "A"}]})
    with pytest.raises(ValueError, match="has a message with tool_calls"):
        sets.conversation({"messages": [user, {"role": "assistant", "content": "A", "tool_calls": [{}]}]})


def test_columns_that_are_not_used_are_named(tmp_path: Path, capfd):
    row = {"instruction": "Q", "output": "A", "category": "open", "id": None, "system": "Be brief."}
    entry.main(["instructions", str(tmp_path), f"--from={write_rows(tmp_path / 'rows.jsonl', [row, row])}"])
    assert "rows.jsonl: columns that are not used: category in 2 rows" in capfd.readouterr().err
    assert sets.read(str(tmp_path), "instructions")[0]["messages"][0]["content"] == "Be brief."
