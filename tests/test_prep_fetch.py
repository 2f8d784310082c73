"""Import of ready-made shards: what would give wrong tokens silently is refused, before anything is stored."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from core import storage
from core.data import manifest
from core.data.manifest import Manifest
from core.data.shard import HEADER_BYTES
from core.errors import DataError
from core.settings import loader as settings
from core.settings.preparation import FetchConfig
from data_prep import fetch as entry
from tests.corpus import EOT

RANDOM = np.random.default_rng(5)


def ids(count: int, top: int = 50_000) -> np.ndarray:
    """Documents of a hundred tokens."""
    tokens = RANDOM.integers(0, top, count)
    tokens[::100] = EOT
    return tokens


def fetch(folder: Path, train: str, val: str = "", *flags: str) -> Manifest:
    from tests.corpus import vocab_bpe

    places = [f"--source.train_url={folder}/{train}", f"--data.url={folder}/set"]
    places += [f"--source.val_url={folder}/{val}"] if val else []
    return entry.fetch(settings.load(FetchConfig, [*places, f"--tokenizer.vocab_url={vocab_bpe()}", *flags], {}))


def imported(folder: Path, split: str = "train") -> np.ndarray:
    shards = manifest.read(f"{folder}/set").splits[split].shards
    data = [storage.read_bytes(f"{folder}/set/{shard.name}") for shard in shards]
    return np.concatenate([np.frombuffer(each, "<u2", offset=HEADER_BYTES) for each in data])


def save(path: Path, tokens: np.ndarray, dtype: str = "<u2") -> Path:
    np.save(path, tokens.astype(dtype))
    return path


# --- both splits -----------------------------------------------------------------------------------------------


def link(source: Path, target: Path) -> None:
    target.symlink_to(source)


def copy(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def link_folder(source: Path, target: Path) -> None:
    target.parent.rmdir()
    target.parent.symlink_to(source.parent)
    source.rename(source.with_name(target.name))


def test_a_pattern_that_takes_validation_into_training_is_refused(tmp_path: Path):
    for name in ("edu_train_000000", "edu_train_000001", "edu_val_000000"):
        save(tmp_path / f"{name}.npy", ids(5000))
    with pytest.raises(DataError, match=r"edu_val_000000\.npy: is in both splits, .*narrow source\.train_url"):
        fetch(tmp_path, "*.npy", "*val*.npy")
    assert not (tmp_path / "set").exists()
    made = fetch(tmp_path, "*train*.npy", "*val*.npy")
    assert (made.splits["train"].tokens, made.splits["val"].tokens) == (10_000, 5000)


@pytest.mark.parametrize("count", [5000, 100_000], ids=["small", "large"])
@pytest.mark.parametrize("twice", [link, os.link, copy, link_folder])
def test_a_file_under_two_names_is_in_both_splits_too(tmp_path: Path, twice: Callable, count: int):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    save(tmp_path / "train/0.npy", ids(count))
    twice(save(tmp_path / "train/1.npy", ids(count)), tmp_path / "val/2.npy")
    with pytest.raises(DataError, match=r"is in both splits|has the content of .*/val/2\.npy"):
        fetch(tmp_path, "train/*.npy", "val/*.npy")
    assert not (tmp_path / "set").exists()


def test_files_that_only_end_alike_are_two(tmp_path: Path):
    tail = ids(60_000)
    save(tmp_path / "train.npy", np.concatenate([ids(20_000), tail]))
    save(tmp_path / "val.npy", np.concatenate([ids(20_000), tail]))
    assert fetch(tmp_path, "train.npy", "val.npy").splits["val"].tokens == 80_000


def test_a_bucket_is_looked_at_likewise(bucket: str, tmp_path: Path):
    for name in ("train_0", "val_0"):
        storage.write_file(f"{bucket}/{name}.npy", save(tmp_path / f"{name}.npy", ids(5000)))
    arguments = [
        f"--source.train_url={bucket}/*.npy",
        f"--source.val_url={bucket}/val*.npy",
        f"--data.url={bucket}/set",
    ]
    with pytest.raises(DataError, match=r"val_0\.npy: is in both splits"):
        entry.fetch(settings.load(FetchConfig, arguments, {}))
    assert storage.list_objects(f"{bucket}/set") == []


def test_one_file_by_two_names_in_a_split_is_refused(tmp_path: Path):
    link(save(tmp_path / "0.npy", ids(5000)), tmp_path / "newest.npy")
    with pytest.raises(DataError, match=r"newest\.npy: has two names in the train split; narrow source\.train_url"):
        fetch(tmp_path, "*.npy")


# --- widths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [50_000, 65, 128_000], ids=["GPT-2", "characters", "another vocabulary"])
@pytest.mark.parametrize("dtype", ["<u4", "<i8", ">u4", ">i8"])
def test_wide_ids_without_a_header_are_refused_with_what_mends_them(tmp_path: Path, dtype: str, top: int):
    tokens = ids(20_000, top)
    tokens.astype(dtype).tofile(tmp_path / "raw.bin")
    bits = 8 * np.dtype(dtype).itemsize
    with pytest.raises(
        DataError, match=rf"raw\.bin: .* are zero, so its ids are {bits} bits wide .*np\.save\("
    ) as caught:
        fetch(tmp_path, "raw.bin")
    assert not (tmp_path / "set").exists()
    remedy = str(caught.value).rpartition("type: ")[2].replace("FILE", f"{tmp_path}/raw")
    eval(remedy, {"np": np})
    if top == 128_000:
        with pytest.raises(DataError, match=r"GPT-2's ids end at 50256"):
            fetch(tmp_path, "raw.npy")
        assert not manifest.exists(f"{tmp_path}/set")
    else:
        fetch(tmp_path, "raw.npy")
        assert np.array_equal(imported(tmp_path), tokens)


@pytest.mark.parametrize("shard_tokens", [30_001, 30_002])
def test_wide_ids_after_others_are_refused_before_the_set_counts(tmp_path: Path, shard_tokens: int):
    """The beginning of the file does not show them; every shard is looked at, whatever half of an id it begins with."""
    data = ids(40_000).astype("<u2").tobytes() + ids(60_000).astype("<u4").tobytes()
    (tmp_path / "raw.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"ids are 32 bits wide .*np\.fromfile\('FILE\.bin', '<u4'\)"):
        fetch(tmp_path, "raw.bin", "", f"--data.shard_tokens={shard_tokens}")
    assert not manifest.exists(f"{tmp_path}/set")


def test_ids_of_16_bits_are_taken_whatever_zeros_they_hold(tmp_path: Path):
    padded = ids(20_000)
    padded[5000:17_000] = 0
    exclamations = ids(20_000)
    exclamations[RANDOM.random(20_000) < 0.3] = 0
    for name, tokens in (("padded", padded), ("exclamations", exclamations), ("short", ids(7)), ("zeros", 0 * padded)):
        tokens.astype("<u2").tofile(tmp_path / f"{name}.bin")
        folder = tmp_path / name
        folder.mkdir()
        (tmp_path / f"{name}.bin").rename(folder / "raw.bin")
        if name == "zeros":  # what no text is, and what a header looks like
            with pytest.raises(DataError, match="has an unknown header"):
                fetch(folder, "raw.bin")
            continue
        fetch(folder, "raw.bin")
        assert np.array_equal(imported(folder), tokens)


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<i4", ">i4", "<u4", "<i8", ">i8", "<u8"])
def test_an_array_says_how_wide_its_ids_are(tmp_path: Path, dtype: str):
    tokens = ids(20_000)
    save(tmp_path / "0.npy", tokens, dtype)
    fetch(tmp_path, "0.npy")
    assert np.array_equal(imported(tmp_path), tokens)


@pytest.mark.parametrize(("wrong", "dtype"), [(-100, "<i4"), (50_257, "<i8"), (70_000, "<u4"), (1 << 40, "<u8")])
def test_an_array_with_an_id_that_does_not_fit_is_refused(tmp_path: Path, wrong: int, dtype: str):
    tokens = ids(5000)
    tokens[321] = wrong
    save(tmp_path / "0.npy", tokens, dtype)
    with pytest.raises(DataError, match=rf"token 321 is {wrong}, GPT-2's ids end at 50256; .*prepare its text"):
        fetch(tmp_path, "0.npy")
    assert not manifest.exists(f"{tmp_path}/set")


@pytest.mark.parametrize("tokens", [ids(5000).reshape(50, 100), ids(5000) / 1], ids=["rows", "floats"])
def test_an_array_that_is_no_row_of_ids_is_refused(tmp_path: Path, tokens: np.ndarray):
    np.save(tmp_path / "0.npy", tokens)
    with pytest.raises(DataError, match="not a list of token ids; save a one-dimensional integer array"):
        fetch(tmp_path, "0.npy")


@pytest.mark.parametrize(("magic", "version"), [(20240520, 2), (20240801, 8), (20240522, 1), (20240326, 3)])
def test_a_header_that_is_not_known_is_not_read_as_tokens(tmp_path: Path, magic: int, version: int):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, 5000
    (tmp_path / "0.bin").write_bytes(header.tobytes() + ids(5000).astype("<u2").tobytes())
    with pytest.raises(DataError, match=rf"has an unknown header \(magic {magic}, version {version}\)"):
        fetch(tmp_path, "0.bin")
    assert not (tmp_path / "set").exists()


# --- end of text -----------------------------------------------------------------------------------------------


def test_a_split_without_an_end_of_text_token_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save(tmp_path / "train.npy", RANDOM.integers(0, 65, 20_000))
    save(tmp_path / "val.npy", ids(5000))
    with caplog.at_level(logging.WARNING):
        made = fetch(tmp_path, "train.npy", "val.npy")
    assert made.splits["train"].documents == 0
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"{tmp_path}/set: no end-of-text token (50256) occurs in the train split" in warning
    assert "characters" in warning
