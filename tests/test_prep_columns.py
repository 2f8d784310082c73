"""Columns and rows that Arrow or Python cannot take as they are: types, names, deep and huge values, decoded sizes."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.data import manifest
from core.errors import DataError
from data_prep.sources import parquet
from data_prep.sources.files import Part, SourceFile
from data_prep.sources.rows import read_rows
from tests.corpus import documents, documents_of, prepare_set
from tests.rare import fast_only

TEXTS = documents(40)
IDS = [f"d{i}" for i in range(40)]
SCORES = [float(i % 4) for i in range(40)]
LANGUAGES = ["en" if i % 4 else "de" for i in range(40)]


def written(folder: Path, columns: dict) -> str:
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return str(folder / "a.parquet")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("language", pa.string_view()),
        ("language", pa.dictionary(pa.int32(), pa.string())),
        ("score", pa.float16()),
        ("score", pa.decimal128(5, 2)),
        ("score", pa.int8()),
    ],
    ids=str,
)
def test_filters_take_every_type_of_text_and_number(column: str, kind: pa.DataType, tmp_path: Path, vocab_bpe: Path):
    values = pa.array(LANGUAGES if column == "language" else SCORES).cast(kind)
    flag = "--filter.languages=en" if column == "language" else "--filter.min_score=1"
    source = written(tmp_path, {"text": TEXTS, "id": IDS, column: values})
    prepare_set(source, str(tmp_path / "set"), vocab_bpe, flag)
    assert manifest.read(str(tmp_path / "set")).stats["documents"] == 30


@pytest.mark.parametrize("name", ["body.text", "body", "a.b.c"])
def test_a_column_may_have_dots_in_its_name(name: str, tmp_path: Path, vocab_bpe: Path):
    others = {"body.other": IDS, "body.": IDS, "bodytext": IDS}
    source = written(tmp_path, {name: TEXTS, "id": IDS, **others})
    prepare_set(source, str(tmp_path / "set"), vocab_bpe, f"--source.text_column={name}")
    assert manifest.read(str(tmp_path / "set")).stats["documents"] == 40


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()], ids=str)
def test_strings_that_were_written_as_bytes_are_read_as_utf8(kind: pa.DataType, tmp_path: Path, vocab_bpe: Path):
    """Hive, Impala and others do not mark strings as such. The set is that of the same strings, id for id."""
    texts = [f"{text} naïve 中文" for text in TEXTS]
    flags = ("--filter.languages=en", "--data.val_fraction=0.3")
    plain = {"text": texts, "id": IDS, "language": LANGUAGES}
    prepare_set(written(tmp_path, plain), str(tmp_path / "plain"), vocab_bpe, *flags)
    as_bytes = {name: pa.array(values).cast(pa.binary()).cast(kind) for name, values in plain.items()}
    prepare_set(written(tmp_path, as_bytes), str(tmp_path / "bytes"), vocab_bpe, *flags)
    for split in ("train", "val"):
        found = documents_of(str(tmp_path / "bytes"), split)
        assert found
        assert found == documents_of(str(tmp_path / "plain"), split)


def test_rows_for_tuning_may_hold_strings_as_bytes(tmp_path: Path):
    """A row whose text is not UTF-8 is a bad row; bytes that are no text stay what they are."""
    answer = pa.array([b"fine", b"\xff broken", b"good"], pa.binary()).view(pa.string())
    turns = pa.array([[{"content": "naïve".encode()}]] * 3)
    columns = {"question": pa.array([b"one", b"two", b"\xff\xd8"]), "answer": answer, "turns": turns}
    assert read_rows(written(tmp_path, columns)) == [
        {"question": "one", "answer": "fine", "turns": [{"content": "naïve"}]},
        None,
        {"question": b"\xff\xd8", "answer": "good", "turns": [{"content": "naïve"}]},
    ]


def test_bytes_that_are_no_text_are_bad_rows(tmp_path: Path, vocab_bpe: Path):
    texts = [b"\xff\xd8\xff\xe0 a picture", *(text.encode() for text in TEXTS[1:])]
    source = written(tmp_path, {"text": texts, "id": IDS})
    with pytest.raises(DataError, match=r"1 of 40 rows have no text, no id or no valid UTF-8"):
        prepare_set(source, str(tmp_path / "set"), vocab_bpe)
    prepare_set(source, str(tmp_path / "set"), vocab_bpe, "--source.max_bad_share=0.1")
    assert manifest.read(str(tmp_path / "set")).stats["dropped"] == {"bad": 1}


def test_a_type_that_cannot_be_used_is_refused_for_every_file_at_the_start(tmp_path: Path, vocab_bpe: Path):
    for number, values in enumerate((TEXTS, TEXTS, [[text] for text in TEXTS])):
        pq.write_table(pa.table({"text": values, "id": IDS}), tmp_path / f"{number}.parquet")
    with pytest.raises(DataError, match=r"2\.parquet: column 'text' is list<element: string>, not text"):
        prepare_set(str(tmp_path / "*.parquet"), str(tmp_path / "set"), vocab_bpe)
    assert not (tmp_path / "set").exists()


def test_an_intact_file_is_not_called_damaged(tmp_path: Path, vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch):
    def lacks(*_: object, **__: object) -> None:
        raise pa.ArrowNotImplementedError("Support for codec 'lzo' not built")

    source = written(tmp_path, {"text": TEXTS, "id": IDS})
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lacks)
    with pytest.raises(DataError, match=r"codec 'lzo' not built\); Arrow .* lacks a feature of it") as caught:
        prepare_set(source, str(tmp_path / "set"), vocab_bpe)
    assert "damaged" not in str(caught.value)


# --- decoded sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding", fast_only(["dictionary", "DELTA_BYTE_ARRAY", "late dictionary"], {"late dictionary"})
)
def test_batches_are_bounded_by_decoded_bytes(encoding: str, tmp_path: Path):
    rows = 60_000
    long = [f"{k} " + "The terms of use apply. " * 160 for k in range(20)]
    texts = [("short" if encoding.startswith("late") and i < 5000 else long[i % 20]) for i in range(rows)]
    if encoding == "DELTA_BYTE_ARRAY":
        texts.sort()
    table = pa.table({"text": texts, "id": [str(i) for i in range(rows)]})
    path = tmp_path / "a.parquet"
    options = {"use_dictionary": False, "column_encoding": {"text": encoding}} if encoding.isupper() else {}
    pq.write_table(table, path, compression="zstd", **options)
    whole = table.nbytes
    del texts, table
    file = SourceFile(str(path), path.stat().st_size, "")
    before = pa.total_allocated_bytes()
    largest = count = at_most = 0
    for batch in parquet.read(Part(0, file, 0, file.size), None, ["text", "id"], lambda count: None):
        largest, count = max(largest, batch.nbytes), count + batch.num_rows
        at_most = max(at_most, pa.total_allocated_bytes() - before)
    assert count == rows
    assert largest < 1.5 * parquet.BATCH_BYTES
    assert at_most < whole / 2


def test_rows_come_once_and_in_order_whatever_their_size(tmp_path: Path):
    texts = [str(i) * (1 if i % 3000 < 2000 else 900) for i in range(20_000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=7000)
    file = SourceFile(str(tmp_path / "a.parquet"), (tmp_path / "a.parquet").stat().st_size, "")
    batches = parquet.read(Part(0, file, 0, file.size), None, ["text"], lambda count: None)
    assert [text for batch in batches for text in batch.column("text").to_pylist()] == texts


# --- JSON ------------------------------------------------------------------------------------------------------

ROWS = "".join(json.dumps({"id": f"d{i}", "text": text, "score": 1}) + "\n" for i, text in enumerate(documents(300)))
DEEP = '{"id":"x","text":"fine","score":1,"meta":' + "[" * 100_000 + "]" * 100_000 + "}\n"
HUGE = '{"id":"y","text":"fine","score":' + "9" * 400 + "}\n"
LONG = '{"id":"z","text":"fine","score":' + "9" * 5000 + "}\n"


@pytest.mark.parametrize("row", [DEEP, HUGE, LONG], ids=["deep", "huge", "digits"])
@pytest.mark.parametrize("first", [False, True])
def test_a_row_that_the_parser_refuses_is_a_bad_row(row: str, first: bool, tmp_path: Path, vocab_bpe: Path):
    (tmp_path / "a.jsonl").write_text(row + ROWS if first else ROWS + row)
    prepare_set(str(tmp_path / "a.jsonl"), str(tmp_path / "set"), vocab_bpe, "--filter.min_score=0")
    assert manifest.read(str(tmp_path / "set")).stats["dropped"] == {"bad": 1}


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.ndjson", "A.JSONL", "A.NDJSON.GZ", "a.Json"])
def test_every_name_of_json_lines_is_read(name: str, tmp_path: Path, vocab_bpe: Path):
    (tmp_path / name).write_bytes(gzip.compress(ROWS.encode()) if name.lower().endswith("gz") else ROWS.encode())
    prepare_set(str(tmp_path / name), str(tmp_path / "set"), vocab_bpe)
    assert manifest.read(str(tmp_path / "set")).stats["documents"] == 300
    assert len(read_rows(str(tmp_path / name))) == 300


def test_rows_of_a_set_may_be_a_list_and_a_deep_one_is_none(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps([{"a": 1}, {"a": 2}], indent=1))
    assert read_rows(str(tmp_path / "a.json")) == [{"a": 1}, {"a": 2}]
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n' + DEEP)
    assert read_rows(str(tmp_path / "b.jsonl")) == [{"a": 1}, None]
