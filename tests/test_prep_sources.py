"""Other sources than parquet on disk: JSON lines, plain text, a Hub that throttles, and documents that are left out."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from core import storage
from core.data import manifest
from core.errors import DataError, StorageError
from core.settings import loader as settings
from core.settings.preparation import PrepConfig
from core.stores import hub
from data_prep import build, duplicates, plan
from tests.corpus import both_splits, documents, documents_of, encoded, prepare_set, stored, table, write_parquet


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("part_bytes", [700, 701, 1000, 4096, 10**6])
def test_json_lines_are_read_once_wherever_parts_are_cut(tmp_path: Path, vocab_bpe: Path, part_bytes: int):
    texts = documents(100)
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": text, "id": i} for i, text in enumerate(texts)]).rstrip(b"\n"))
    prepare_set(str(tmp_path / "a.jsonl"), str(tmp_path / "set"), vocab_bpe, f"--data.part_bytes={part_bytes}")
    assert both_splits(str(tmp_path / "set")) == encoded(texts, vocab_bpe)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_json_lines(tmp_path: Path, vocab_bpe: Path, suffix: str):
    texts = documents(100)
    data = jsonl([{"text": text, "id": f"{i}"} for i, text in enumerate(texts)])
    packed = gzip.compress(data) if suffix == "gz" else pa.compress(data, "zstd", asbytes=True)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed)
    prepare_set(str(tmp_path / "*.jsonl.*"), str(tmp_path / "set"), vocab_bpe)
    assert both_splits(str(tmp_path / "set")) == encoded(texts, vocab_bpe)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"damaged or truncated|more than source\.max_bad_share"):
        prepare_set(str(tmp_path / "*.jsonl.*"), str(tmp_path / "other"), vocab_bpe)


def test_lone_surrogate_becomes_the_replacement_character(tmp_path: Path, vocab_bpe: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b", "id": "x"}\n')
    prepare_set(str(tmp_path / "a.jsonl"), str(tmp_path / "set"), vocab_bpe, "--data.val_fraction=0")
    assert documents_of(str(tmp_path / "set"), "train") == encoded(["a \ufffd b"], vocab_bpe)


def test_bad_json_lines_are_counted(tmp_path: Path, vocab_bpe: Path):
    rows = jsonl([{"text": text, "id": i} for i, text in enumerate(documents(400))])
    (tmp_path / "a.jsonl").write_bytes(rows + b'{"text": 7, "id": "n"}\nnot json\n[1]\n')
    prepare_set(str(tmp_path / "a.jsonl"), str(tmp_path / "set"), vocab_bpe)
    assert manifest.read(str(tmp_path / "set")).stats["dropped"] == {"bad": 3}


def test_plain_text_is_one_document_per_file(tmp_path: Path, vocab_bpe: Path):
    (tmp_path / "poem.txt").write_text("Roses are red,\nviolets are blue.\n")
    prepare_set(str(tmp_path / "poem.txt"), str(tmp_path / "set"), vocab_bpe, "--data.val_fraction=0")
    assert documents_of(str(tmp_path / "set"), "train") == encoded(["Roses are red,\nviolets are blue.\n"], vocab_bpe)


def test_text_hash_takes_the_place_of_a_missing_id(tmp_path: Path, vocab_bpe: Path):
    texts = documents(200)
    for name, rows in (("a", table(texts)), ("b", table(texts[::-1]))):
        pq.write_table(rows.drop_columns(["id"]), tmp_path / f"{name}.parquet")
        prepare_set(str(tmp_path / f"{name}.parquet"), str(tmp_path / name), vocab_bpe, "--source.id_column=")
    first, second = (documents_of(str(tmp_path / name), "val") for name in "ab")
    assert len(first) > 5
    assert sorted(first) == sorted(second)


# --- filters ---------------------------------------------------------------------------------------------------


def test_filters_drop_and_count(tmp_path: Path, vocab_bpe: Path):
    texts = [*documents(90), "tiny", *documents(9, words=400)]
    source = write_parquet(tmp_path / "source", [texts])
    url = str(tmp_path / "set")
    flags = ("--filter.min_score=3.5", "--filter.languages=en", "--filter.min_tokens=5", "--filter.max_tokens=100")
    prepare_set(source, url, vocab_bpe, *flags)
    kept = [text for i, text in enumerate(texts) if i % 3 and i % 10 != 9 and i < 90]
    assert both_splits(url) == encoded(kept, vocab_bpe)
    assert manifest.read(url).stats["dropped"] == {"language": 6, "long": 6, "low_score": 34}


def test_filter_on_a_column_that_holds_no_numbers(tmp_path: Path, vocab_bpe: Path):
    source = write_parquet(tmp_path / "source", [documents(5)])
    with pytest.raises(DataError, match=r"column 'dump' is string, filter\.min_score needs numbers"):
        prepare_set(source, str(tmp_path / "set"), vocab_bpe, "--filter.min_score=3", "--filter.score_column=dump")


# --- duplicates ------------------------------------------------------------------------------------------------


def repeated_source(tmp_path: Path) -> tuple[str, list[str]]:
    """Five files in which every third text occurs again, in the same file and in others; and the distinct texts."""
    texts = documents(120)
    files = [texts[number * 24 : number * 24 + 24] + texts[::3] for number in range(5)]
    files[0] += files[0][:5]
    return write_parquet(tmp_path / "source", files), texts


def test_exact_duplicates_are_dropped_across_files_and_nodes(tmp_path: Path, vocab_bpe: Path):
    source, texts = repeated_source(tmp_path)
    prepare_set(source, str(tmp_path / "one"), vocab_bpe, "--filter.drop_duplicates=true", "--workers=2")
    assert both_splits(str(tmp_path / "one")) == encoded(texts, vocab_bpe)
    assert manifest.read(str(tmp_path / "one")).stats["dropped"] == {"duplicate": 5 * 64 + 5 - 120}
    for rank in (1, 0):
        flags = ("--filter.drop_duplicates=true", "--num_nodes=2", f"--node_rank={rank}")
        prepare_set(source, str(tmp_path / "two"), vocab_bpe, *flags)
    assert stored(str(tmp_path / "one")) == stored(str(tmp_path / "two"))


def test_duplicates_are_found_range_by_range(tmp_path: Path, vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch):
    source, texts = repeated_source(tmp_path)
    monkeypatch.setattr(duplicates, "MEMORY_BYTES", 10 * duplicates.SORT_BYTES)
    prepare_set(source, str(tmp_path / "set"), vocab_bpe, "--filter.drop_duplicates=true")
    assert both_splits(str(tmp_path / "set")) == encoded(texts, vocab_bpe)


# --- where a source is pinned, and where nothing can be written ------------------------------------------------


@pytest.mark.parametrize("address", ["", "@main"])
def test_a_configs_revision_does_not_hinder_another_source(address: str, tmp_path: Path, vocab_bpe: Path):
    """SOURCE_URL replaces the source of a config whole: the revision is read for an hf:// address that names none."""
    source = write_parquet(tmp_path / "source", [documents(60)])
    written = "revision: c0ffee" if not address else f"url: hf://datasets/a/b{address}/x.parquet"
    config = tmp_path / "config.yaml"
    config.write_text(f"source:\n  {written}\ndata:\n  url: {tmp_path}/set\n")
    environment = {"SOURCE_URL": source, "VOCAB_URL": str(vocab_bpe)}
    loaded = settings.load(PrepConfig, [str(config), "--workers=1"], environment)
    assert build.prepare(loaded).source["revision"] == ""
    # The same documents without that config are the same set: the unused revision is no part of it.
    plain = settings.load(PrepConfig, [f"--data.url={tmp_path}/set", "--workers=1"], environment)
    assert build.prepare(plain) is not None


def test_the_revision_in_an_address_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(plan.storage, "pinned", lambda uri: uri)
    url = "hf://datasets/a/b@v2/x.parquet"
    assert plan.pinned(url, "v1", str(tmp_path)) == url
    assert plan.pinned("hf://datasets/a/b/x.parquet", "v1", str(tmp_path)) == "hf://datasets/a/b@v1/x.parquet"


def test_shipped_configs_pin_their_source_in_its_address():
    for path in Path("data_prep/configs").glob("fineweb-edu*.yaml"):
        if "ready" not in path.name:
            assert hub.parse(yaml.safe_load(path.read_text())["source"]["url"]).revision, path


def test_a_bucket_without_write_permission_is_refused_before_any_work(
    s3, bucket: str, tmp_path: Path, vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    local = write_parquet(tmp_path / "source", [documents(60)])
    for path in Path(local).parent.iterdir():
        storage.write_file(f"{bucket}/source/{path.name}", path)
    for name, value in s3.reader_environment().items():
        monkeypatch.setenv(name, value)
    caplog.set_level("INFO")
    with pytest.raises(StorageError, match=r"may not write .*check that the key may read and write this bucket"):
        prepare_set(f"{bucket}/source/*.parquet", f"{bucket}/set", vocab_bpe)
    assert "workers" not in caplog.text  # the line before the first part
    assert storage.list_objects(f"{bucket}/set") == []
