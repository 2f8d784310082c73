"""Preparation end to end on small parquet files: the tokens, the split, the bytes, and what is refused."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core import storage
from core.data import manifest, vocabulary
from core.errors import DataError, LauncherError, StorageError
from data_prep import build
from tests.corpus import documents, documents_of, prepare_config, prepare_set, speeches, stored, table, write_parquet


@pytest.fixture
def source(tmp_path: Path) -> str:
    texts = speeches(12) + documents(400) + ["<|endoftext|> is text here", "short"]
    return write_parquet(tmp_path / "source", [texts[:150], texts[150:]])


def test_every_document_is_there_once_and_encoded_as_tiktoken_does(source: str, tmp_path: Path, vocab_bpe: Path):
    url = str(tmp_path / "set")
    prepare_set(source, url, vocab_bpe)
    encoding = vocabulary.read(str(vocab_bpe)).encoding()
    texts = [text for file in sorted(Path(source).parent.iterdir()) for text in pq.read_table(file)["text"].to_pylist()]
    expected = sorted(tuple(encoding.encode_ordinary(text)) for text in texts)
    assert sorted(documents_of(url, "train") + documents_of(url, "val")) == expected


def test_full_shards_have_exactly_the_set_size(source: str, tmp_path: Path, vocab_bpe: Path):
    url = str(tmp_path / "set")
    prepare_set(source, url, vocab_bpe)
    by_part: dict[str, list[int]] = {}
    for shard in sorted(manifest.read(url).splits["train"].shards, key=lambda shard: shard.name):
        by_part.setdefault(shard.name.rsplit("-", 1)[0], []).append(shard.tokens)
    assert len(by_part) > 3
    assert any(len(sizes) > 1 for sizes in by_part.values())
    assert all(size == 5000 for sizes in by_part.values() for size in sizes[:-1])


def test_split_follows_the_hash_of_the_id(source: str, tmp_path: Path, vocab_bpe: Path):
    url = str(tmp_path / "set")
    prepare_set(source, url, vocab_bpe)
    encoding = vocabulary.read(str(vocab_bpe)).encoding()
    expected: dict[str, list] = {"train": [], "val": []}
    for file in sorted(Path(source).parent.iterdir()):
        rows = pq.read_table(file)
        for key, text in zip(rows["id"].to_pylist(), rows["text"].to_pylist(), strict=True):
            digest = hashlib.blake2b(key.encode(), digest_size=16, key=b"1337").digest()
            below = int.from_bytes(digest[:8], "big") < int(0.1 * 2**64)
            expected["val" if below else "train"].append(tuple(encoding.encode_ordinary(text)))
    for split, texts in expected.items():
        assert sorted(documents_of(url, split)) == sorted(texts), split
    assert len(expected["val"]) == manifest.read(url).splits["val"].documents > 10


def test_stated_validation_size_is_met_to_the_document(source: str, tmp_path: Path, vocab_bpe: Path):
    whole, limited = str(tmp_path / "whole"), str(tmp_path / "limited")
    prepare_set(source, whole, vocab_bpe)
    prepare_set(source, limited, vocab_bpe, "--data.val_tokens=1000")
    split = manifest.read(limited).splits["val"]
    longest = max(len(document) + 1 for document in documents_of(limited, "val"))
    assert 1000 <= split.tokens < 1000 + longest
    assert set(documents_of(limited, "val")) < set(documents_of(whole, "val"))
    together = [documents_of(url, "train") + documents_of(url, "val") for url in (whole, limited)]
    assert sorted(together[0]) == sorted(together[1])


def test_number_of_workers_does_not_change_a_byte(source: str, tmp_path: Path, vocab_bpe: Path):
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    prepare_set(source, one, vocab_bpe, "--workers=1")
    prepare_set(source, many, vocab_bpe, "--workers=3")
    assert stored(one) == stored(many)


def test_seed_changes_order_and_split(source: str, tmp_path: Path, vocab_bpe: Path):
    urls = [str(tmp_path / seed) for seed in ("1", "2")]
    for url in urls:
        prepare_set(source, url, vocab_bpe, f"--data.seed={url[-1]}")
    assert manifest.read(urls[0]).fingerprint != manifest.read(urls[1]).fingerprint
    assert set(documents_of(urls[0], "val")) != set(documents_of(urls[1], "val"))


def test_without_shuffle_the_order_is_that_of_the_source(tmp_path: Path, vocab_bpe: Path):
    texts = documents(60)
    source = write_parquet(tmp_path / "source", [texts])
    prepare_set(source, str(tmp_path / "set"), vocab_bpe, "--data.shuffle=false", "--data.val_fraction=0")
    encoding = vocabulary.read(str(vocab_bpe)).encoding()
    assert documents_of(str(tmp_path / "set"), "train") == [tuple(encoding.encode_ordinary(text)) for text in texts]


def test_shuffle_moves_documents_within_a_shard(tmp_path: Path, vocab_bpe: Path):
    texts = documents(60)
    source = write_parquet(tmp_path / "source", [texts])
    prepare_set(source, str(tmp_path / "set"), vocab_bpe, "--data.val_fraction=0")
    encoding = vocabulary.read(str(vocab_bpe)).encoding()
    expected = [tuple(encoding.encode_ordinary(text)) for text in texts]
    found = documents_of(str(tmp_path / "set"), "train")
    assert found != expected
    assert sorted(found) == sorted(expected)


def test_same_bytes_from_a_bucket(source: str, tmp_path: Path, vocab_bpe: Path, bucket: str):
    for file in Path(source).parent.iterdir():
        storage.write_file(f"{bucket}/source/{file.name}", file)
    prepare_set(f"{bucket}/source/*.parquet", f"{bucket}/set", vocab_bpe, "--workers=2")
    prepare_set(source, str(tmp_path / "set"), vocab_bpe)
    assert manifest.read(f"{bucket}/set").fingerprint == manifest.read(str(tmp_path / "set")).fingerprint


# --- again, and with something else ----------------------------------------------------------------------------


def test_a_complete_set_is_left_alone(source: str, tmp_path: Path, vocab_bpe: Path, caplog: pytest.LogCaptureFixture):
    url = str(tmp_path / "set")
    prepare_set(source, url, vocab_bpe)
    times = {path: path.stat().st_mtime_ns for path in Path(url).rglob("*")}
    caplog.set_level("INFO")
    prepare_set(source, url, vocab_bpe)
    assert "is complete already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in Path(url).rglob("*")} == times


def test_a_finished_part_is_not_done_again_and_a_missing_one_is(source: str, tmp_path: Path, vocab_bpe: Path):
    url = str(tmp_path / "set")
    prepare_set(source, url, vocab_bpe)
    before = stored(url)
    kept = Path(url, "train/00000-000.bin").stat().st_mtime_ns
    for name in ("manifest.json", "parts/00001.json", "train/00001-000.bin"):
        Path(url, name).unlink()
    prepare_set(source, url, vocab_bpe)
    assert stored(url) == before
    assert Path(url, "train/00000-000.bin").stat().st_mtime_ns == kept


@pytest.mark.parametrize("unfinished", [False, True])
def test_another_seed_is_refused(source: str, tmp_path: Path, vocab_bpe: Path, unfinished: bool):
    url = str(tmp_path / "set")
    prepare_set(source, url, vocab_bpe)
    if unfinished:
        Path(url, "manifest.json").unlink()
    before = stored(url)
    with pytest.raises(DataError, match=r"data\.seed is 1337 there and 7 here.*choose another data\.url"):
        prepare_set(source, url, vocab_bpe, "--data.seed=7")
    assert stored(url) == before


def test_a_changed_source_is_refused(source: str, tmp_path: Path, vocab_bpe: Path):
    url = str(tmp_path / "set")
    prepare_set(source, url, vocab_bpe)
    pq.write_table(table(documents(5)), Path(source).parent / "000_00000.parquet")
    with pytest.raises(DataError, match=r"the source has changed: 000_00000\.parquet has another content"):
        prepare_set(source, url, vocab_bpe)


def test_finalize_refuses_while_parts_are_missing(source: str, tmp_path: Path, vocab_bpe: Path):
    url = str(tmp_path / "set")
    prepare_set(source, url, vocab_bpe, "--num_nodes=2", "--node_rank=1", "--phase=encode")
    with pytest.raises(DataError, match=r"parts are missing \(00000, 00002.*run python -m data_prep.prepare"):
        prepare_set(source, url, vocab_bpe, "--phase=finalize")
    assert not manifest.exists(url)


def test_nodes_make_the_same_bytes_as_one(source: str, tmp_path: Path, vocab_bpe: Path):
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    prepare_set(source, one, vocab_bpe)
    for rank in (2, 0, 1):
        assert not manifest.exists(many)
        prepare_set(source, many, vocab_bpe, "--num_nodes=3", f"--node_rank={rank}")
    assert stored(one) == stored(many)


# --- bad input -------------------------------------------------------------------------------------------------


def write(tmp_path: Path, data: pa.Table) -> str:
    pq.write_table(data, tmp_path / "bad.parquet")
    return str(tmp_path / "bad.parquet")


def refused(source: str, tmp_path: Path, vocab: Path, *flags: str) -> str:
    """The one sentence that prep stops with; no manifest may be there."""
    with pytest.raises(LauncherError) as caught:
        prepare_set(source, str(tmp_path / "set"), vocab, *flags)
    assert not manifest.exists(str(tmp_path / "set"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_column(tmp_path: Path, vocab_bpe: Path):
    source = write(tmp_path, table(["a"]).drop_columns(["id"]))
    message = refused(source, tmp_path, vocab_bpe, "--source.id_column=id")
    assert "has no column 'id', only text, dump" in message
    message = refused(source, tmp_path, vocab_bpe, "--source.id_column=uuid")
    assert "--source.id_column= (empty)" in message
    assert "did you mean text?" in refused(source, tmp_path, vocab_bpe, "--source.text_column=txet")


def test_wrong_type(tmp_path: Path, vocab_bpe: Path):
    source = write(tmp_path, pa.table({"text": [1, 2], "id": ["a", "b"]}))
    assert "column 'text' is int64, not text" in refused(source, tmp_path, vocab_bpe, "--source.text_column=text")
    assert "has no column text, content or messages, only text (int64), id (string)" in refused(
        source, tmp_path, vocab_bpe
    )


def test_few_bad_rows_are_counted(tmp_path: Path, vocab_bpe: Path):
    good = documents(300)
    damaged = pa.array([b"fine", b"\xff\xfe broken"] + [b"x"] * 301, pa.binary()).view(pa.string())
    rows = table([*good, None, "", "last"]).set_column(0, "text", damaged)
    rows = rows.set_column(0, "text", pa.chunked_array([damaged.slice(0, 2), pa.array([*good[2:], None, "", "last"])]))
    prepare_set(write(tmp_path, rows), str(tmp_path / "set"), vocab_bpe)
    assert manifest.read(str(tmp_path / "set")).stats["dropped"] == {"bad": 2, "empty": 1}


def test_many_bad_rows_stop_the_run(tmp_path: Path, vocab_bpe: Path):
    source = write(tmp_path, table([*documents(90), *[None] * 10]))
    message = refused(source, tmp_path, vocab_bpe)
    assert "10 of 100 rows have no text, no id or no valid UTF-8, more than source.max_bad_share = 0.01" in message
    prepare_set(source, str(tmp_path / "set"), vocab_bpe, "--source.max_bad_share=0.2")
    assert manifest.read(str(tmp_path / "set")).stats["dropped"] == {"bad": 10}


def test_many_bad_rows_stop_a_part_early(tmp_path: Path, vocab_bpe: Path):
    source = write(tmp_path, table([*documents(1000), *[None] * 100, *documents(5000)]))
    assert "rows have no text, no id" in refused(source, tmp_path, vocab_bpe, "--data.part_bytes=10000000")
    assert not list(Path(tmp_path, "set/parts").glob("0*.json"))


@pytest.mark.parametrize("cut", [7, 1000, 4000])
def test_truncated_parquet(tmp_path: Path, vocab_bpe: Path, cut: int):
    source = Path(write(tmp_path, table(documents(200))))
    source.write_bytes(source.read_bytes()[:-cut])
    assert "truncated or has another format: copy it again" in refused(str(source), tmp_path, vocab_bpe)


def test_damaged_pages(tmp_path: Path, vocab_bpe: Path):
    source = Path(write(tmp_path, table(documents(200))))
    data = bytearray(source.read_bytes())
    data[40:400] = bytes(360)
    source.write_bytes(data)
    assert "cannot be read as parquet" in refused(str(source), tmp_path, vocab_bpe)


def test_foreign_and_empty_sources(tmp_path: Path, vocab_bpe: Path):
    (tmp_path / "a.parquet").write_text("this is no parquet file, whatever its name says")
    assert "has another format" in refused(str(tmp_path / "a.parquet"), tmp_path, vocab_bpe)
    assert "no file matches" in refused(str(tmp_path / "*.nothing"), tmp_path, vocab_bpe)
    (tmp_path / "a.png").write_text("text,id")
    assert "a.nothing: not found" in refused(str(tmp_path / "a.nothing"), tmp_path, vocab_bpe)
    assert "unknown kind of source" in refused(str(tmp_path / "a.png"), tmp_path, vocab_bpe)
    none = write(tmp_path, table([]))
    assert "no document is left for training" in refused(none, tmp_path, vocab_bpe)


def test_missing_bucket(tmp_path: Path, vocab_bpe: Path, s3):
    source = write(tmp_path, table(documents(3)))
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        prepare_set(source, "s3://no-such-bucket/set", vocab_bpe)


def test_folder_without_write_permission(tmp_path: Path, vocab_bpe: Path):
    (tmp_path / "set").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="set"):
        prepare_set(write(tmp_path, table(documents(3))), str(tmp_path / "set"), vocab_bpe)


def test_full_disk(source: str, tmp_path: Path, vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch):
    prepare_set(source, str(tmp_path / "whole"), vocab_bpe)
    calls = iter(range(10**6))

    def full(handle: int) -> None:
        if next(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "could not write: the disk is full" in refused(source, tmp_path, vocab_bpe)
    kept = set(Path(tmp_path, "set/parts").glob("0*.json"))
    assert kept
    times = {path: path.stat().st_mtime_ns for path in kept}
    prepare_set(source, str(tmp_path / "set"), vocab_bpe)
    assert {path: path.stat().st_mtime_ns for path in kept} == times
    assert stored(str(tmp_path / "set")) == stored(str(tmp_path / "whole"))


def test_a_validation_set_that_is_too_small_is_reported(
    source: str, tmp_path: Path, vocab_bpe: Path, caplog: pytest.LogCaptureFixture
):
    prepare_set(source, str(tmp_path / "set"), vocab_bpe, "--data.val_tokens=100000000")
    assert "not the 100000000 that data.val_tokens asks for; raise data.val_fraction" in caplog.text


def test_manifest_holds_no_time_and_no_machine(source: str, tmp_path: Path, vocab_bpe: Path):
    build.prepare(prepare_config(source, str(tmp_path / "a"), vocab_bpe))
    build.prepare(prepare_config(source, str(tmp_path / "b"), vocab_bpe))
    first, second = (json.loads(Path(tmp_path, name, "manifest.json").read_text()) for name in "ab")
    assert first == second


def test_preparing_parquet_imports_no_pandas(source: str, tmp_path: Path, vocab_bpe: Path):
    """Arrow imports it behind one's back where it is installed: half a second in every worker."""
    flags = [f"--source.url={source}", f"--data.url={tmp_path}/set", f"--tokenizer.vocab_url={vocab_bpe}"]
    code = f"""import sys
from data_prep import prepare
prepare.main({[*flags, "--workers=1"]})
print("pandas" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
