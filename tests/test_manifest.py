"""The data manifest: what is read is what was written, and nothing else is taken for one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from core.data import manifest
from core.data.manifest import Manifest, ShardEntry, Split, TokenizerInfo
from core.errors import DataError

SHARDS = (ShardEntry("train/a.bin", 100, 1224, "a" * 64), ShardEntry("train/b.bin", 50, 1124, "b" * 64))
GOOD = Manifest(
    TokenizerInfo("gpt2", 50257, 50256, "tokenizer/gpt2.tiktoken", "c" * 64),
    {"url": "x.parquet"},
    {"seed": 1},
    {"train": Split(150, 3, SHARDS), "val": Split(0, 0, ())},
)


def test_round_trip(tmp_path: Path):
    manifest.write(str(tmp_path), GOOD)
    assert manifest.read(str(tmp_path)) == GOOD


def test_fingerprint_is_that_of_the_tokens_in_order():
    swapped = replace(GOOD, splits={**GOOD.splits, "train": Split(150, 3, SHARDS[::-1])})
    other_words = replace(GOOD, tokenizer=replace(GOOD.tokenizer, vocab_sha256="d" * 64))
    assert len({each.fingerprint for each in (GOOD, swapped, other_words)}) == 3
    assert replace(GOOD, source={"url": "elsewhere"}, stats={"documents": 3}).fingerprint == GOOD.fingerprint


def document(**changes: object) -> bytes:
    return json.dumps(json.loads(GOOD.to_bytes()) | changes).encode()


def with_train(**changes: object) -> bytes:
    whole = json.loads(GOOD.to_bytes())
    whole["splits"]["train"] |= changes
    return json.dumps(whole).encode()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "not valid JSON"),
        (document(format="checkpoint"), "format is 'checkpoint', not 'token-shards'"),
        (document(version=9), "manifest version 9 is not 1"),
        (document(bits=8), "bits is 8"),
        (document(tokenizer={"name": "gpt2"}), "incomplete manifest"),
        (document(fingerprint="0" * 64), "fingerprint does not match its shards"),
        (with_train(tokens=151), "split 'train' says 151 tokens, its shards add up to 150"),
        (with_train(shards=[{"name": "a", "tokens": 150, "bytes": 7, "sha256": ""}]), "150 tokens in 7 bytes"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path: Path, data: bytes, problem: str):
    (tmp_path / "manifest.json").write_bytes(data)
    with pytest.raises(DataError, match=rf"manifest\.json: .*{problem}"):
        manifest.read(str(tmp_path))


def test_a_missing_manifest_and_an_empty_split_name_the_remedy(tmp_path: Path):
    with pytest.raises(DataError, match=r"there is no manifest; prepare the data first"):
        manifest.read(str(tmp_path))
    with pytest.raises(DataError, match=r"has no 'val' tokens \(it has train, val\)"):
        GOOD.split("val", "s3://b/set")
