"""What storage says is not trusted: names of objects, sizes, JSON, texts. Nothing outside, no traceback."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from core import output, storage, untrusted
from core.data import manifest, sets, vocabulary
from core.data.manifest import Manifest, ShardEntry, Split, TokenizerInfo
from core.data.shard import shard_bytes
from core.errors import CheckpointError, DataError, LauncherError, ObjectDamaged, RunError
from core.run.folder import RunFolder, id_of, open_run, read_description
from core.run.reader import read_run
from core.storage import ObjectInfo
from costs.report import build
from launch import runs
from tests import checkpoints, hostile
from tests.golden import NOON, preempted_and_resumed
from tests.test_cache import make_set
from trainer.checkpoint import blocks, layout
from trainer.data.cache import ReadAhead, ShardCache
from trainer.weights import folder
from trainer.weights import open as opened

LATER = NOON + 86400
CPU = torch.device("cpu")


def files_in(path: Path) -> set[str]:
    return {str(each.relative_to(path)) for each in path.rglob("*") if each.is_file()}


# --- names and places ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*hostile.NAMES, None, 7, "a\ud800"])
def test_a_name_that_leads_out_is_none(tmp_path: Path, name):
    with pytest.raises(DataError, match=r"^s3://b: the name .* (is|has|holds) .*; nothing was written"):
        untrusted.inside(tmp_path, name, "s3://b")


@pytest.mark.parametrize("name", ["train/00012-001.bin", "logs/20261129T223940Z-node-000-6e6f91f1/a.jsonl", "ü b/é=1"])
def test_a_good_name_is_a_path_in_its_folder(tmp_path: Path, name: str):
    assert untrusted.inside(tmp_path, name, "s3://b") == tmp_path / name


def test_a_link_that_leads_out_is_not_followed(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/train").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"leads to .*, out of"):
        untrusted.inside(tmp_path / "in", "train/a.bin", "s3://b")
    (tmp_path / "also").symlink_to(tmp_path / "in")
    assert untrusted.inside(tmp_path / "also", "a.bin", "s3://b") == tmp_path / "also/a.bin"


def one_shard(url: str, name: str, data: bytes, tokens: int = 50) -> Manifest:
    entry = ShardEntry(name, tokens, len(data), hashlib.sha256(data).hexdigest())
    tokenizer = TokenizerInfo("gpt2", 50257, 50256, "tokenizer/gpt2.tiktoken", "0")
    made = Manifest(tokenizer, {}, {}, {"train": Split(tokens, 1, (entry,))})
    manifest.write(url, made)
    return made


@pytest.mark.parametrize("name", ["{outside}", "../../escaped.bin", "train/../../../escaped.bin", "a\0.bin", "a.txt"])
def test_a_manifest_cannot_name_a_file_outside(tmp_path: Path, name: str):
    name = name.replace("{outside}", str(tmp_path / "escaped.bin"))
    made = one_shard(str(tmp_path / "set"), name, shard_bytes(np.zeros(50, np.uint16)))
    with pytest.raises(DataError, match=r"manifest\.json: (the name|shard) "):
        manifest.read(str(tmp_path / "set"))
    if name != "a.txt":
        with pytest.raises(DataError, match=r"the name "):
            ShardCache(str(tmp_path / "set"), made, "train", tmp_path / "cache", 1e9)


@pytest.mark.parametrize("problem", ["magic number is 0", "header says 49 tokens", "at most 1,124;"])
def test_no_shard_gets_its_name_before_its_header_is_looked_at(tmp_path: Path, problem: str):
    url = str(tmp_path / "set")
    good = shard_bytes(np.zeros(50, np.uint16))
    data = {"magic": b"\0" * len(good), "header": shard_bytes(np.zeros(49, np.uint16)), "at": good}[problem.split()[0]]
    made = one_shard(url, "train/a.bin", data.ljust(len(good), b"\0"))
    storage.write_bytes(storage.join(url, "train/a.bin"), data.ljust(len(good), b"\0") + b"\0" * (problem[0] == "a"))
    cache = ShardCache(url, made, "train", tmp_path / "cache", 1e9)
    each = ReadAhead(cache, lambda count: [])
    with pytest.raises((DataError, ObjectDamaged), match=problem if problem[0] != "h" else "its header promises 49"):
        each._fetch(0)
    each.close()
    assert files_in(tmp_path / "cache") == set()


def test_a_link_in_the_cache_is_not_written_through(tmp_path: Path):
    url = str(tmp_path / "set")
    make_set(url)
    cache = ShardCache(url, manifest.read(url), "train", tmp_path / "cache", 1e9)
    (tmp_path / "elsewhere").mkdir()
    cache.folder.mkdir(parents=True)
    (cache.folder / "train").symlink_to(tmp_path / "elsewhere")
    each = ReadAhead(cache, lambda count: [])
    with pytest.raises(DataError, match=r"out of"):
        each._fetch(0)
    each.close()
    assert files_in(tmp_path / "elsewhere") == set()


@pytest.mark.parametrize("name", [name for name in hostile.NAMES if name])
def test_pull_writes_nothing_outside_its_folder(tmp_path: Path, monkeypatch, name: str):
    """A server may list any key."""
    url = f"memory://pull-{hashlib.md5(name.encode()).hexdigest()}/run"
    storage.write_bytes(f"{url}/run.json", b"{}")
    listing = [ObjectInfo(f"{url}/run.json", 2), ObjectInfo(f"{url}/ledger/{name}", 7)]
    monkeypatch.setattr(storage, "list_objects", lambda prefix: listing)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"the name .*nothing was written"):
        runs.pull([url, str(tmp_path / "a/b/c")])
    assert files_in(tmp_path) == set()


# --- sizes and JSON --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested more than 64 deep"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 deep"),
        ("1e999", "out of range"),
        ("-1e999", "out of range"),
        ("9" * 5000, "a whole number of 5000 digits"),
        (str(2**64), "a whole number of 20 digits"),
        ("NaN", "which JSON does not have as a number"),
        ("[Infinity]", "which JSON does not have as a number"),
        ("{", "Expecting"),
    ],
)
def test_json_has_bounds(text: str, why: str):
    with pytest.raises(ValueError, match=why):
        untrusted.parse_json(text)


def test_json_within_the_bounds_is_that_of_the_library():
    value = {"a": [[1, 2.5, -3], [2**64 - 1], None, True, "é"] * 40, "b": {"c": {}}}
    assert untrusted.parse_json(json.dumps(value).encode()) == value
    assert untrusted.parse_json("[" * 64 + "]" * 64)
    assert np.isnan(untrusted.parse_json("NaN", is_finite=False))


def test_what_is_too_large_is_not_read(tmp_path: Path):
    uri = str(tmp_path / "a.json")
    with open(uri, "wb") as file:
        file.truncate(1 << 40)  # a terabyte, of which nothing is on the disk
    with pytest.raises(ObjectDamaged, match=r"a\.json: has 1,099,511,627,776 bytes, must have at most 268,435,456;"):
        storage.read_bytes(uri, untrusted.DOCUMENT_BYTES)
    with pytest.raises(ValueError, match=r"must have at most"):
        untrusted.read_json(uri)
    storage.write_bytes("memory://large/a", b"x" * 100)
    with pytest.raises(ObjectDamaged, match=r"at most 99;"):
        storage.download("memory://large/a", tmp_path / "b", most=99)
    assert not (tmp_path / "b").exists()


DEEP = b"[" * 100_000 + b"]" * 100_000


def test_a_deep_document_is_one_sentence_everywhere(tmp_path: Path):
    url = str(tmp_path)
    for name in ("run.json", "manifest.json", "sets/x.json", "config.json", "evaluations/step-1/a-01234567.json"):
        storage.write_bytes(storage.join(url, name), DEEP)
    with pytest.raises(RunError, match=r"is not a run description"):
        read_description(RunFolder(url))
    with pytest.raises(DataError, match=r"not valid JSON"):
        manifest.read(url)
    with pytest.raises(DataError, match=r"not a description of a set"):
        sets.info_of(url, "x")
    with pytest.raises(CheckpointError, match=r"not valid JSON"):
        folder.read_config(url)
    sets.write(url, "rows", "conversations", "me", "MIT", DEEP + b"\n")
    with pytest.raises(DataError, match=r"a row is not JSON"):
        sets.read(url, "rows")


# --- runs and checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("identity", []),
        ("config", "x"),
        ("data_fingerprint", 7),
        ("id", "../../escaped"),
        ("id", 7),
        ("id", "a' OR tags.x = 'b"),
        ("format", "x"),
    ],
)
def test_a_changed_run_json_is_refused(tmp_path: Path, key: str, value):
    run = RunFolder(str(tmp_path))
    assert open_run(run, {"a": 1}, {}, "f")
    assert len(id_of(run)) == 16
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(RunError, match=r"is not a run description of this release"):
        open_run(run, {"a": 1}, {}, "f")


def change_manifest(run_url: str, **changes) -> None:
    """Change the manifest of step 1, and its marker with it, as one who may write can."""
    place = layout.folder_of(run_url, 1)
    name = changes.pop("stored_as", layout.manifest_name(1))
    document = json.loads(storage.read_bytes(storage.join(place, layout.manifest_name(1)))) | changes
    data = json.dumps(document).encode()
    storage.write_bytes(storage.join(place, name), data)
    marker = {"manifest": name, "xxh3_128": layout.checksum(data)}
    storage.write_bytes(storage.join(place, layout.MARKER), json.dumps(marker).encode())


def state_of(run_url: str) -> dict:
    return layout.read_manifest(run_url, 1, layout.stored(run_url)[1]).state


@pytest.mark.parametrize(
    "changes",
    [
        {"stored_as": "../../../elsewhere.json"},
        {"files": [{"name": "../a", "bytes": 1, "xxh3_128": "0"}]},
        {"files": 7},
        {"files": [7]},
        {"step": 2},
        {"step": "1"},
        {"segment": None},
        {"state": []},
        {"state": {"config": 7}},
        {"state": {}},
        {"state": {"config": {"model": {"layers": "many"}}}},
        {"state": {"config": {"model": [1]}}},
    ],
)
def test_a_manifest_of_a_checkpoint_is_checked_beyond_its_checksum(tmp_path: Path, changes: dict):
    url = checkpoints.store(str(tmp_path / "runs/first"), checkpoints.random_model())
    change_manifest(url, **changes)
    with pytest.raises(LauncherError):
        opened.open_weights(url, CPU)


@pytest.mark.parametrize("model", [{"layers": 2**16}, {"width": 10**6}, {"mlp_width": 2**60}])
def test_no_memory_is_taken_for_a_model_that_its_files_do_not_hold(tmp_path: Path, model: dict):
    url = checkpoints.store(str(tmp_path), checkpoints.random_model())
    state = state_of(url)
    state["config"]["model"] |= model
    change_manifest(url, state=state)
    with pytest.raises(CheckpointError, match=r"which its files of .* bytes do not hold"):
        opened.open_weights(url, CPU)


@pytest.mark.parametrize("model", [{"layers": 10**9}, {"width": 2**40}, {"context": 2**40}, {"heads": 3 * 2**30}])
def test_a_model_of_absurd_size_is_refused_at_once(tmp_path: Path, model: dict):
    """A width of 2^40 once took hours, for the numbers that divide it; in a report, too."""
    url = checkpoints.store(str(tmp_path / "run"), checkpoints.random_model())
    state = state_of(url)
    state["config"]["model"] |= model
    change_manifest(url, state=state)
    with pytest.raises(LauncherError, match=r"must be above 0 and at most"):
        opened.open_weights(url, CPU)
    run = preempted_and_resumed(tmp_path / "report")
    run.write("run.json", json.dumps({"config": state["config"]}))
    assert build(read_run(run.url), NOON + 86400).units.usd_per_exaflop is None


def test_adapters_of_themselves_are_no_loop(tmp_path: Path):
    url = checkpoints.store(str(tmp_path), checkpoints.random_model())
    change_manifest(url, state=state_of(url) | {"lora": {"rank": 2}, "start": url, "start_digest": "0"})
    with pytest.raises(CheckpointError, match=r"its adapters belong to .*, which is not another model"):
        opened.open_weights(url, CPU)


def safetensors_file(header: object) -> np.ndarray:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return np.frombuffer(bytearray(len(text).to_bytes(8, "little") + text + b"\0" * 64), np.uint8)


@pytest.mark.parametrize(
    "header",
    [
        [],
        7,
        DEEP,
        b"\xff\xfe",
        {"a": 7},
        {"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1 << 40]}},
        {"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [True, 4], "data_offsets": [0, 16]}},
    ],
)
def test_a_header_of_safetensors_is_checked(header):
    with pytest.raises(ValueError, match=r"safetensors|JSON|nested|decode"):
        blocks.tensors_of(safetensors_file(header))


def test_blocks_of_another_shape_than_their_name_are_refused(tmp_path: Path):
    url = checkpoints.store(str(tmp_path), checkpoints.random_model())
    place = layout.folder_of(url, 1)
    for key, shape in (("model.ln_f.weight[0:16]", (8,)), ("model.x[0:1]", (1,)), ("model.ln_f.weight", (16,))):
        data = safetensors.torch.save({key: torch.zeros(shape)}) + b"\0" * 4_000_000
        data = safetensors.torch.save({key: torch.zeros(shape), "exp_avg.pad[0:1000000]": torch.zeros(1_000_000)})
        name = layout.payload_name(1, 0, 1)
        storage.write_bytes(storage.join(place, name), data)
        change_manifest(url, files=[{"name": name, "bytes": len(data), "xxh3_128": layout.checksum(data)}])
        with pytest.raises(CheckpointError, match=r"matches no weight of this model|is not a row block"):
            opened.open_weights(url, CPU)


def test_an_index_of_weights_cannot_name_a_file_outside(tmp_path: Path):
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    for name in ("../secret.safetensors", "x.bin", 7):
        (tmp_path / "model" / folder.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match=r"is not an index of weights"):
            folder.read_tensors(str(tmp_path / "model"))


def test_weights_that_are_no_safetensors_are_one_sentence(tmp_path: Path):
    (tmp_path / folder.WEIGHTS).write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"cut off or damaged"):
        folder.read_tensors(str(tmp_path))


@pytest.mark.parametrize("data", [b"#version: 0.2\n\xe2\x98\x83 a\n", b"#version\n\xff\n", b"\xff\xff", b"a b\n"])
def test_a_foreign_vocabulary_is_one_sentence(data: bytes):
    with pytest.raises(DataError):
        vocabulary.parse(data, "s3://b/vocab.bpe")


def test_the_shard_names_that_we_write_pass():
    for name in ("train/00012-001.bin", "train/rest-00000.bin", "val/00000.bin", "train/00000.bin"):
        assert untrusted.mistake_in_name(name) is None
    assert dataclasses.is_dataclass(ShardEntry)


def test_visible_leaves_words_alone():
    for text in ("plain", "två\ttabs\n", "≤ – … \u202f9\u00a0%", "日本 🙂"):
        assert output.visible(text) == text
    assert output.visible("a\rb\x1b[0m\x7f\u2066") == "a\\rb\\x1b[0m\\x7f\\u2066"
