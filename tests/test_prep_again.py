"""Preparation a second time: a mended source, corrected settings, another spelling; what is checked before the plan."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.data import manifest
from core.errors import DataError
from data_prep import plan
from tests.corpus import documents, prepare_set, stored
from tests.test_prep_fetch import fetch, ids


def lines_of(texts: list[str], first: int = 0) -> bytes:
    return "".join(json.dumps({"id": f"d{first + i}", "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def shards(data_url: Path) -> dict[str, str]:
    return {name: digest for name, digest in stored(str(data_url)).items() if "plan" not in name}


def incompressible(count: int) -> list[str]:
    random = np.random.default_rng(7)
    return [" ".join(map(str, random.integers(0, 1 << 60, 40))) for _ in range(count)]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param((), id="", marks=pytest.mark.slow),
        pytest.param(("--filter.drop_duplicates=true",), id="without duplicates"),
    ],
)
def test_finished_parts_survive_a_mended_source(flags: tuple[str, ...], tmp_path: Path, vocab_bpe: Path):
    """The damage lies behind what the start looks at, so that the parts before it are finished."""
    files = ((100, 0), (100, 10_000), (3000, 20_000))
    whole = [gzip.compress(lines_of(incompressible(count), first)) for count, first in files]
    assert len(whole[2]) > 1 << 20
    for number, data in enumerate(whole):
        (tmp_path / f"{number}.jsonl.gz").write_bytes(data if number < 2 else data[:-20])
    arguments = (str(tmp_path / "*.gz"), str(tmp_path / "set"), vocab_bpe, *flags)
    with pytest.raises(DataError, match=r"2\.jsonl\.gz: .* truncated: copy it again, then run the same command"):
        prepare_set(*arguments)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "set/parts").glob("0000?.json")}
    assert len(kept) == (0 if flags else 2)
    (tmp_path / "2.jsonl.gz").write_bytes(whole[2])
    prepare_set(*arguments)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    prepare_set(arguments[0], str(tmp_path / "fresh"), vocab_bpe, *flags)
    fresh = stored(str(tmp_path / "fresh"))
    if flags:  # the hashes of the truncated plan's parts stay
        fresh = {name: digest for name, digest in fresh.items() if not name.endswith((".hashes", ".drops"))}
    assert fresh.items() <= stored(str(tmp_path / "set")).items()


def test_a_mended_source_that_changes_a_finished_part_is_refused(tmp_path: Path, vocab_bpe: Path):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_bytes(lines_of(documents(50), number))
    arguments = (str(tmp_path / "*.jsonl"), str(tmp_path / "set"), vocab_bpe)
    prepare_set(*arguments, "--phase=encode")
    before = stored(str(tmp_path / "set"))
    (tmp_path / "1.jsonl").write_bytes(lines_of(documents(60)))
    with pytest.raises(DataError, match=r"the source has changed: 1\.jsonl has another content"):
        prepare_set(*arguments)
    assert stored(str(tmp_path / "set")) == before


def test_while_nothing_is_recorded_a_new_plan_replaces_the_old(tmp_path: Path, vocab_bpe: Path):
    (tmp_path / "a.jsonl").write_bytes(lines_of(documents(50)))
    arguments = (str(tmp_path / "a.jsonl"), str(tmp_path / "set"), vocab_bpe)
    prepare_set(*arguments, "--phase=encode")
    (tmp_path / "set/parts/00000.json").unlink()
    prepare_set(*arguments, "--source.id_column=", "--data.seed=3")
    prepare_set(arguments[0], str(tmp_path / "fresh"), vocab_bpe, "--source.id_column=", "--data.seed=3")
    assert manifest.read(str(tmp_path / "set")).to_bytes() == manifest.read(str(tmp_path / "fresh")).to_bytes()


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz"])
def test_columns_of_every_file_are_checked_before_the_plan_is_stored(kind: str, tmp_path: Path, vocab_bpe: Path):
    for number, column in enumerate(("text", "text", "body")):
        rows = {"id": [f"{number}-{i}" for i in range(20)], column: documents(20)}
        if kind == "parquet":
            pq.write_table(pa.table(rows), tmp_path / f"{number}.parquet")
        else:
            found = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
            data = "".join(json.dumps(row) + "\n" for row in found).encode()
            (tmp_path / f"{number}.{kind}").write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    with pytest.raises(DataError, match=rf"2\.{kind}: has no column 'text', only id, body"):
        prepare_set(str(tmp_path / f"*.{kind}"), str(tmp_path / "set"), vocab_bpe)
    assert not (tmp_path / "set").exists()


def test_the_named_remedy_for_a_missing_id_is_accepted(tmp_path: Path, vocab_bpe: Path):
    pq.write_table(pa.table({"text": documents(50)}), tmp_path / "a.parquet")
    arguments = (str(tmp_path / "*.parquet"), str(tmp_path / "set"), vocab_bpe)
    with pytest.raises(DataError, match=r"set --source\.id_column= \(empty\)"):
        prepare_set(*arguments, "--source.id_column=id")
    assert not (tmp_path / "set").exists()
    prepare_set(*arguments, "--source.id_column=")


def test_the_same_folder_spelt_differently_is_continued(
    tmp_path: Path, vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch
):
    for number in range(2):
        (tmp_path / f"source/{number}").mkdir(parents=True)
        (tmp_path / f"source/{number}/a.txt").write_text("\n".join(documents(30 + number)))
    (tmp_path / "link").symlink_to("source")
    monkeypatch.chdir(tmp_path)
    places = ("source/**/*.txt", "./source/**/*.txt", str(tmp_path / "source/**/*.txt"), f"file://{tmp_path}/link/*/*")
    prepare_set(places[0], str(tmp_path / "fresh"), vocab_bpe)
    prepare_set(places[0], str(tmp_path / "set"), vocab_bpe, "--num_nodes=2", "--node_rank=0")
    os.chdir(tmp_path / "source")  # where the first spelling names nothing
    for place in places[2:]:
        prepare_set(place, str(tmp_path / "set"), vocab_bpe)
        assert stored(str(tmp_path / "set")) == stored(str(tmp_path / "fresh"))
    assert plan.read(str(tmp_path / "set")).files[0].uri == "source/0/a.txt"


def test_an_import_keeps_its_finished_shards_when_a_later_file_is_mended(tmp_path: Path):
    for number in range(3):
        tokens = ids(5000)
        tokens[7] = 60_000 if number == 2 else 7
        np.save(tmp_path / f"{number}.npy", tokens)
    with pytest.raises(DataError, match=r"2\.npy: token 7 is 60000"):
        fetch(tmp_path, "*.npy", "", "--workers=1")
    kept = (tmp_path / "set/train/00000.bin").stat().st_mtime_ns
    tokens[7] = 8
    np.save(tmp_path / "2.npy", tokens)
    assert fetch(tmp_path, "*.npy", "", "--workers=1").splits["train"].tokens == 15_000
    assert (tmp_path / "set/train/00000.bin").stat().st_mtime_ns == kept
