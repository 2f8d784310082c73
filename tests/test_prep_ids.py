"""Ids decide the split: files of one name in several folders, and ids that many documents share."""

import json
from pathlib import Path

import pytest

from core.data import manifest
from core.errors import DataError
from tests.corpus import documents, prepare_set


def chapters(folder: Path, count: int = 30) -> str:
    for number, text in enumerate(documents(count)):
        (folder / f"{number:02d}").mkdir(parents=True)
        (folder / f"{number:02d}/text.txt").write_text(text)
    return str(folder / "**/*.txt")


@pytest.mark.parametrize(("flags", "both"), [((), "val"), (("--data.val_fraction=0.5", "--data.seed=3"), "train")])
def test_files_of_the_same_name_fall_into_both_splits(flags, both: str, tmp_path: Path, vocab_bpe: Path):
    source = chapters(tmp_path / "book")
    prepare_set(source, str(tmp_path / "set"), vocab_bpe, "--data.val_fraction=0.2", *flags)
    splits = manifest.read(str(tmp_path / "set")).splits
    assert 0 < splits[both].documents < 30


def test_the_id_is_the_path_below_the_pattern_wherever_the_folder_lies(tmp_path: Path, vocab_bpe: Path, bucket: str):
    from core import storage

    source = chapters(tmp_path / "book")
    for path in (tmp_path / "book").rglob("*.txt"):
        storage.write_file(f"{bucket}/a/b/{path.relative_to(tmp_path / 'book').as_posix()}", path)
    made = []
    for number, place in enumerate((source, f"{tmp_path}/book/*/text.txt", f"{bucket}/a/b/**/*.txt")):
        prepare_set(place, f"{tmp_path}/{number}", vocab_bpe, "--data.val_fraction=0.3")
        made.append(manifest.read(f"{tmp_path}/{number}").splits)
    assert made[0] == made[1] == made[2]


def test_an_id_that_many_documents_share_is_named(tmp_path: Path, vocab_bpe: Path, caplog: pytest.LogCaptureFixture):
    rows = [{"id": "wiki" if i % 20 else f"d{i}", "text": text} for i, text in enumerate(documents(400))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_set(str(tmp_path / "a.jsonl"), str(tmp_path / "set"), vocab_bpe, "--data.seed=1")
    said = r"380 of 400 documents have the same id (column 'id')"
    assert said in caplog.text
    caplog.clear()
    prepare_set(str(tmp_path / "a.jsonl"), str(tmp_path / "new"), vocab_bpe, "--source.id_column=")
    assert "the same" not in caplog.text
    for row in rows:
        row["id"] = "wiki"
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="400 of 400 documents have the same id"):
        prepare_set(str(tmp_path / "b.jsonl"), str(tmp_path / "all"), vocab_bpe, "--data.val_fraction=0.9999")
