"""Verify, inspect and fetch: what they find, show and refuse."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from core import storage
from core.data import manifest
from core.data.shard import HEADER_BYTES
from core.errors import ConfigError, DataError, StorageError
from core.exit_codes import CAPPED
from core.run.reader import read_run
from core.settings import loader as settings
from core.settings.preparation import FetchConfig
from data_prep import fetch, inspect, prepare, verify
from tests.corpus import EOT, documents, documents_of, prepare_set, write_parquet


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, vocab_bpe: Path) -> Path:
    """A prepared set; tests that damage it copy it first."""
    folder = tmp_path_factory.mktemp("made")
    source = write_parquet(folder / "source", [documents(150), documents(250)[150:]])
    prepare_set(source, str(folder / "set"), vocab_bpe)
    return folder / "set"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(made), str(target)], check=True)
    return target


# --- verify ----------------------------------------------------------------------------------------------------


def test_verify_passes_a_good_set(made: Path, capsys: pytest.CaptureFixture):
    assert verify.main([str(made)]) == 0
    assert "match the manifest" in capsys.readouterr().out


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_verify_names_every_damage(copy: Path, capsys: pytest.CaptureFixture):
    shards = sorted((copy / "train").glob("*.bin"))
    flip(shards[0], HEADER_BYTES + 10)
    flip(shards[1], 0)
    shards[2].write_bytes(shards[2].read_bytes()[:-2])
    shards[3].unlink()
    flip(copy / "tokenizer/gpt2.tiktoken", 3)
    assert verify.main([str(copy)]) == 1
    lines = capsys.readouterr().out.splitlines()
    found = {Path(line.split(": ")[0]).name: line for line in lines}
    assert "SHA-256 is" in found[shards[0].name]
    assert "magic number is" in found[shards[1].name]
    assert "its header promises" in found[shards[2].name]
    assert "not found" in found[shards[3].name]
    assert "gpt2.tiktoken" in found
    assert "5 problems" in lines[-1]


def test_verify_counts_apart_what_it_could_not_read(
    copy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """A store that fails has not damaged the set: no one should delete it for that."""
    shards = sorted((copy / "train").glob("*.bin"))
    read_range = storage.read_range

    def refuses(uri: str, start: int, end: int) -> bytes:
        if uri.endswith(shards[0].name):
            raise StorageError(f"{uri}: could not read (503 Slow Down)")
        return read_range(uri, start, end)

    monkeypatch.setattr(storage, "read_range", refuses)
    assert verify.main([str(copy)]) == 1
    *problems, last = capsys.readouterr().out.splitlines()
    assert [problem.partition(": ")[2] for problem in problems] == ["could not read (503 Slow Down)"]
    assert "1 file could not be read, and the others match the manifest; run the same command again" in last
    shards[1].unlink()
    assert verify.main([str(copy)]) == 1
    *_, damage, unread = capsys.readouterr().out.splitlines()
    assert "1 problem in " in damage
    assert "1 file could not be read; run" in unread


def test_verify_finds_ids_outside_the_vocabulary(copy: Path, capsys: pytest.CaptureFixture):
    """A shard that is wrong from the start has a fitting checksum."""
    before = manifest.read(str(copy))
    entry = before.splits["val"].shards[0]
    data = bytearray((copy / entry.name).read_bytes())
    data[HEADER_BYTES + 14 : HEADER_BYTES + 16] = (60000).to_bytes(2, "little")
    (copy / entry.name).write_bytes(data)
    changed = replace(entry, sha256=hashlib.sha256(data).hexdigest())
    val = replace(before.splits["val"], shards=(changed, *before.splits["val"].shards[1:]))
    manifest.write(str(copy), replace(before, splits={**before.splits, "val": val}))
    assert verify.main([str(copy)]) == 1
    assert "token 7 is 60000, but ids end at 50256" in capsys.readouterr().out


# --- inspect ---------------------------------------------------------------------------------------------------


def test_inspect_shows_counts_lengths_and_text(made: Path, capsys: pytest.CaptureFixture):
    assert inspect.main([str(made), "--samples=2", "--seed=3"]) == 0
    out = capsys.readouterr().out
    split = manifest.read(str(made)).splits["train"]
    assert f"{split.tokens:,} tokens, {split.documents:,} documents" in out
    assert "documents by tokens" in out
    assert "█" in out
    assert sum(word in out for word in ("the", "of", "and")) == 3


def test_inspect_refuses_unknown_flags(made: Path):
    with pytest.raises(ConfigError, match="flag --sample=2: unknown"):
        inspect.main([str(made), "--sample=2"])


# --- fetch -----------------------------------------------------------------------------------------------------

TOKENS = np.random.default_rng(1).integers(0, 50257, 25_000)


def llmc(tokens: np.ndarray, magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + tokens.astype(dtype).tobytes()


def fetch_config(folder: Path, vocab: Path, *flags: str) -> FetchConfig:
    fixed = (f"--source.train_url={folder}/train*", f"--source.val_url={folder}/val*", f"--data.url={folder}/set")
    small = ("--data.shard_tokens=10000", f"--tokenizer.vocab_url={vocab}")
    return settings.load(FetchConfig, (*fixed, *small, *flags), {})


def write_source(folder: Path, kind: str) -> None:
    for name, tokens in (
        ("train_000001", TOKENS[:21_000]),
        ("train_000002", TOKENS[21_000:24_000]),
        ("val_000000", TOKENS[24_000:]),
    ):
        if kind == "npy":
            np.save(folder / f"{name}.npy", tokens.astype(np.uint16))
        elif kind == "plain":
            (folder / f"{name}.bin").write_bytes(tokens.astype("<u2").tobytes())
        elif kind == "llm.c":
            (folder / f"{name}.bin").write_bytes(llmc(tokens))
        else:
            (folder / f"{name}.bin").write_bytes(llmc(tokens, 20240801, 7, "<u4"))


@pytest.mark.parametrize("kind", ["llm.c", "llm.c 32 bits", "npy", "plain"])
def test_fetch_keeps_every_token_in_order(kind: str, tmp_path: Path, vocab_bpe: Path):
    write_source(tmp_path, kind)
    made = fetch.fetch(fetch_config(tmp_path, vocab_bpe))
    assert [shard.tokens for shard in made.splits["train"].shards] == [10_000, 10_000, 1_000, 3_000]
    for split, expected in (("train", TOKENS[:24_000]), ("val", TOKENS[24_000:])):
        pieces = [storage.read_bytes(f"{tmp_path}/set/{shard.name}") for shard in made.splits[split].shards]
        found = np.concatenate([np.frombuffer(piece, "<u2", offset=HEADER_BYTES) for piece in pieces])
        assert np.array_equal(found, expected)
    assert made.splits["train"].documents == np.count_nonzero(TOKENS[:24_000] == EOT)
    assert verify.main([f"{tmp_path}/set"]) == 0


def test_fetch_continues_and_leaves_a_complete_set_alone(tmp_path: Path, vocab_bpe: Path):
    write_source(tmp_path, "llm.c")
    made = fetch.fetch(fetch_config(tmp_path, vocab_bpe))
    kept = (tmp_path / "set/train/00000.bin").stat().st_mtime_ns
    for name in ("manifest.json", "parts/train-00001.json", "train/00001.bin"):
        (tmp_path / "set" / name).unlink()
    assert fetch.fetch(fetch_config(tmp_path, vocab_bpe)) == made
    assert fetch.fetch(fetch_config(tmp_path, vocab_bpe)) == made
    assert (tmp_path / "set/train/00000.bin").stat().st_mtime_ns == kept


def test_fetch_stops_at_its_cap_and_goes_on(tmp_path: Path, vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch):
    write_source(tmp_path, "llm.c")
    fixed = [f"--source.{split}_url={tmp_path}/{split}*" for split in ("train", "val")]
    flags = [*fixed, f"--data.url={tmp_path}/set", "--data.shard_tokens=10000", f"--tokenizer.vocab_url={vocab_bpe}"]
    monkeypatch.setenv("RUN_URL", f"{tmp_path}/run")
    monkeypatch.setenv("USD_PER_HOUR", "3600")
    assert fetch.main([*flags, "--max_usd=0.001", "--shutdown_reserve_seconds=0"]) == CAPPED
    assert not manifest.exists(f"{tmp_path}/set")
    assert fetch.main(flags) == 0
    assert verify.main([f"{tmp_path}/set"]) == 0
    run = read_run(f"{tmp_path}/run")
    assert [segment.end["reason"] for segment in run.segments] == ["cap", "finished"]
    assert run.stage == "prep"


def test_fetch_refuses_foreign_tokens_and_truncated_files(tmp_path: Path, vocab_bpe: Path):
    write_source(tmp_path, "llm.c 32 bits")
    wrong = TOKENS[:500].copy()
    wrong[321] = 128_000
    (tmp_path / "train_000003.bin").write_bytes(llmc(wrong, 20240801, 7, "<u4"))
    with pytest.raises(DataError, match=r"train_000003\.bin: token 321 is 128000, GPT-2's ids end at 50256"):
        fetch.fetch(fetch_config(tmp_path, vocab_bpe))
    assert not manifest.exists(f"{tmp_path}/set")
    (tmp_path / "train_000003.bin").write_bytes(llmc(TOKENS[:500])[:-1])
    with pytest.raises(DataError, match=r"2023 bytes, but 500 tokens of 2 bytes take 2024"):
        fetch.fetch(fetch_config(tmp_path, vocab_bpe, f"--data.url={tmp_path}/other"))


def test_a_prepared_set_can_be_imported(made: Path, tmp_path: Path, vocab_bpe: Path):
    flags = (
        f"--source.train_url={made}/train/*.bin",
        f"--source.val_url={made}/val/*.bin",
        f"--data.url={tmp_path}/set",
    )
    found = fetch.fetch(fetch_config(tmp_path, vocab_bpe, *flags))
    assert found.splits["val"].tokens == manifest.read(str(made)).splits["val"].tokens
    assert sorted(documents_of(f"{tmp_path}/set", "val")) == sorted(documents_of(str(made), "val"))


# --- entries ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [prepare, fetch, verify, inspect])
def test_help(entry, capsys: pytest.CaptureFixture):
    assert entry.main(["--help"]) == 0
    assert "DATA_URL" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted(Path("data_prep/configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_load(file: Path):
    schema = FetchConfig if "train_url" in file.read_text() else prepare.PrepConfig
    assert settings.load(schema, [str(file), "--data.url=/tmp/x"], {}).data.url == "/tmp/x"


def test_importing_data_prep_loads_no_torch():
    names = sorted(path.stem for path in Path("data_prep").glob("*.py") if path.stem != "__init__")
    code = f"import sys; [__import__('data_prep.' + name) for name in {names}]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- the overfit set -------------------------------------------------------------------------------------------


def test_the_overfit_set_says_that_it_has_no_validation(tmp_path: Path, vocab_bpe: Path, capsys: pytest.CaptureFixture):
    poem = tmp_path / "poem.txt"
    poem.write_text("Two roads diverged in a yellow wood, and sorry I could not travel both. " * 20)
    flags = (f"--source.url={poem}", f"--data.url={tmp_path}/set", f"--tokenizer.vocab_url={vocab_bpe}")
    assert prepare.main(["data_prep/configs/overfit.yaml", *flags]) == 0
    made = manifest.read(f"{tmp_path}/set")
    assert made.splits["val"].tokens == 0
    assert made.splits["train"].documents == 1
    assert "no validation tokens: training will report no validation loss" in capsys.readouterr().out
