"""trainer.data: windows are right whether they come by range or from disk, whatever goes wrong."""

import hashlib
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from core import storage
from core.data import manifest
from core.data.manifest import Manifest, ShardEntry, Split, TokenizerInfo
from core.data.shard import shard_bytes
from core.errors import DataError, StorageError
from core.stores import retries
from tests.patience import PATIENCE_SECONDS
from trainer.data.cache import ShardCache
from trainer.data.loader import Batches, TokenSource

SIZES = [500, 137, 1000, 8, 13, 260]
LENGTH = 16


def make_set(url: str, vocab_size: int = 50257) -> np.ndarray:
    """A token set of random ids at `url`. Returns the whole stream."""
    random = np.random.default_rng(7)
    entries, stream = [], []
    for number, size in enumerate(SIZES):
        tokens = random.integers(0, 50257, size, dtype=np.uint16)
        data = shard_bytes(tokens)
        name = f"train/{number:05d}.bin"
        storage.write_bytes(storage.join(url, name), data)
        entries.append(ShardEntry(name, size, len(data), hashlib.sha256(data).hexdigest()))
        stream.append(tokens)
    tokenizer = TokenizerInfo("gpt2", vocab_size, 50256, "tokenizer/gpt2.tiktoken", "0")
    splits = {"train": Split(sum(SIZES), 1, tuple(entries))}
    manifest.write(url, Manifest(tokenizer, {}, {}, splits))
    return np.concatenate(stream)


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "set") if request.param == "local" else f"{request.getfixturevalue('bucket')}/set"


def source(url: str, folder: Path, limit_bytes: float = 1e9) -> TokenSource:
    cache = ShardCache(url, manifest.read(url), "train", folder, limit_bytes)
    return TokenSource(cache, LENGTH, seed=5, shards_mixed=2)


def batches(tokens: TokenSource, first_step: int = 0, rank: int = 0, world: int = 1, fetches: bool = True) -> Batches:
    return Batches(tokens, first_step, 8, 2, rank, world, prefetch=2, device=torch.device("cpu"), fetches=fetches)


def expected(stream: np.ndarray, tokens: TokenSource, numbers: np.ndarray) -> np.ndarray:
    where = tokens.order.locate(numbers)
    begins = (tokens.order.first_window[where.shard] + where.window) * LENGTH
    return np.stack([stream[begin : begin + LENGTH + 1] for begin in begins])


def fetch_all(each: Batches, tokens: TokenSource) -> None:
    """Wait until the read-ahead has every shard on disk that a window begins in."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    wanted = tokens.order.shards_from(0, len(SIZES))
    while not all(tokens.cache.path(shard).exists() for shard in wanted):
        assert time.monotonic() < deadline
        assert each._read_ahead.failure is None
        time.sleep(0.01)


def test_windows_by_range_and_from_disk_are_the_same(url: str, tmp_path: Path):
    stream = make_set(url)
    tokens = source(url, tmp_path / "cache")
    numbers = np.arange(2 * tokens.order.windows)
    right = expected(stream, tokens, numbers)
    assert np.array_equal(tokens.samples(numbers), right)
    assert not list((tmp_path / "cache").rglob("*.bin")), "nothing was fetched whole for that"
    each = batches(tokens)
    fetch_all(each, tokens)
    assert np.array_equal(tokens.samples(numbers), right)
    assert np.array_equal(tokens.cache.stream(495, 300), stream[495:795])
    each.close()


def test_ranks_together_see_each_global_batch_once(url: str, tmp_path: Path):
    stream = make_set(url)
    found = {}
    for world in (1, 2, 4):
        everyone = [
            batches(source(url, tmp_path / "cache"), 3, rank, world, fetches=rank == 0) for rank in range(world)
        ]
        steps = [torch.cat([next(each) for each in everyone for _ in range(4 // world)]) for _ in range(5)]
        found[world] = torch.stack(steps).numpy()
        for each in everyone:
            each.close()
    tokens = source(url, tmp_path / "cache")
    right = expected(stream, tokens, np.arange(3 * 8, 8 * 8)).reshape(5, 8, LENGTH + 1)
    for world in (1, 2, 4):
        assert np.array_equal(found[world], right)


def test_the_cache_stays_within_its_bound(url: str, tmp_path: Path):
    stream = make_set(url)
    limit = 1024 * 3 + 2 * 1800  # two or three of five shards
    tokens = source(url, tmp_path / "cache", limit)
    each = batches(tokens)
    seen = []
    for _ in range(3 * tokens.order.windows // 8):
        seen += [next(each) for _ in range(4)]
        held = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.bin") if path.exists())
        assert held <= limit
    each.close()
    numbers = np.arange(len(seen) * 2)
    assert np.array_equal(torch.cat(seen).numpy(), expected(stream, tokens, numbers))


def test_a_shard_that_vanishes_from_disk_is_read_by_range(url: str, tmp_path: Path):
    stream = make_set(url)
    tokens = source(url, tmp_path / "cache")
    each = batches(tokens)
    fetch_all(each, tokens)
    each.close()
    shutil.rmtree(tmp_path / "cache")
    again = source(url, tmp_path / "cache")
    numbers = np.arange(30)
    assert np.array_equal(again.samples(numbers), expected(stream, again, numbers))


def test_what_an_earlier_boot_left_is_removed_unread(url: str, tmp_path: Path):
    stream = make_set(url)
    folder = tmp_path / "cache"
    fingerprint = manifest.read(url).fingerprint[:16]
    # As after a power cut: the name is there, its content is not.
    left = folder / f"{fingerprint}-an-earlier-boot" / "train" / "00000.bin"
    other = folder / "another-set" / "train" / "00000.bin"
    for path in (left, other):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(1024 + 2 * SIZES[0]))
    tokens = source(url, folder)
    each = batches(tokens)
    fetch_all(each, tokens)
    numbers = np.arange(2)
    assert np.array_equal(tokens.samples(numbers), expected(stream, tokens, numbers))
    each.close()
    assert not left.exists()
    assert other.exists()


def take_until_failure(each: Batches) -> Exception:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            next(each)
        except DataError as error:
            return error
    raise AssertionError("the damage was not noticed")


def test_a_corrupt_shard_is_fetched_once_more_then_stops_the_run_by_name(url: str, tmp_path: Path, caplog):
    make_set(url)
    victim = storage.join(url, "train/00002.bin")
    data = bytearray(storage.read_bytes(victim))
    data[1500] ^= 1
    storage.write_bytes(victim, bytes(data))
    each = batches(source(url, tmp_path / "cache"))
    error = take_until_failure(each)
    each.close()
    assert "train/00002.bin: checksum is" in str(error)
    assert "fetched twice with the same result" in str(error)
    assert "fetching it once more" in caplog.text
    assert not list((tmp_path / "cache").rglob("00002.bin"))


def test_a_corrupt_transfer_is_healed_by_the_second_fetch(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stream = make_set(url)
    real, spoiled = storage.chunks, []

    def chunks(uri: str, most: int | None = None):
        if uri.endswith("00002.bin") and not spoiled:
            spoiled.append(uri)
            return [b"".join(real(uri))[::-1]]
        return real(uri, most)

    monkeypatch.setattr(storage, "chunks", chunks)
    tokens = source(url, tmp_path / "cache")
    each = batches(tokens)
    fetch_all(each, tokens)
    assert spoiled
    assert np.array_equal(tokens.samples(np.arange(40)), expected(stream, tokens, np.arange(40)))
    each.close()


def test_an_id_outside_the_vocabulary_is_named(url: str, tmp_path: Path):
    make_set(url, vocab_size=100)
    with pytest.raises(
        DataError, match=r"train/0000\d\.bin: token \d+ at or after position \d+, the vocabulary has 100"
    ):
        source(url, tmp_path / "cache").samples(np.arange(4))


def test_a_stall_of_the_storage_is_waited_out(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stream = make_set(url)
    monkeypatch.setattr(retries, "ATTEMPTS", 1)
    monkeypatch.setattr("trainer.data.cache.STALL_RETRY_SECONDS", 0.05)
    monkeypatch.setattr("trainer.data.cache.PATIENCE_SECONDS", 0.05)
    real, down_until = storage.read_ranges, time.monotonic() + 1.0

    def read_ranges(uri: str, ranges: list[tuple[int, int]]):
        if time.monotonic() < down_until:
            raise StorageError(f"{uri}: could not read after 1 attempts (reset)")
        return real(uri, ranges)

    monkeypatch.setattr(storage, "read_ranges", read_ranges)
    tokens = source(url, tmp_path / "cache")
    each = batches(tokens, fetches=False)
    started = time.monotonic()
    found = torch.cat([next(each) for _ in range(4)]).numpy()
    each.close()
    assert np.array_equal(found, expected(stream, tokens, np.arange(8)))
    assert time.monotonic() > max(down_until, started)


def test_a_full_disk_slows_down_and_does_not_stop(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    stream = make_set(url)
    monkeypatch.setattr("trainer.data.cache.STALL_RETRY_SECONDS", 0.05)
    monkeypatch.setattr("trainer.data.cache.PATIENCE_SECONDS", 0.05)

    def download(uri: str, path: Path, expected_sha256: str, **more: object) -> int:
        raise StorageError(f"{path}: could not write: the disk is full; free space or choose another folder")

    monkeypatch.setattr(storage, "download", download)
    tokens = source(url, tmp_path / "cache")
    each = batches(tokens)
    found = torch.cat([next(each) for _ in range(40)]).numpy()
    each.close()
    assert np.array_equal(found, expected(stream, tokens, np.arange(80)))
    assert "the disk is full" in caplog.text
