"""Data sets by their names on the Hub: from a copy in its cache, offline, and from a small server with its answers."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from core.data import manifest
from core.settings import loader as settings
from core.settings.preparation import PrepConfig, SourceConfig
from data_prep import plan
from tests import hub_cache, patched
from tests.corpus import both_splits, documents, encoded, prepare_set, speeches, stored
from tests.fake_hub import COMMIT, REPOSITORY, Hub
from tests.patience import PATIENCE_SECONDS
from tests.test_prep_kinds import as_arrow, as_csv, as_lines, as_parquet, as_tar, packed

SMALL = ("--data.part_bytes=20000", "--data.shard_tokens=5000", "--data.val_fraction=0.1", "--workers=1")
CARD = """---
configs:
- config_name: sample-1
  data_files:
  - split: train
    path: sample/1/*
  - split: test
    path: test/*
- config_name: sample-2
  data_files: sample/2/*
---
A data set.
"""
TEXTS = [*speeches(8), *documents(150)]
HALVES = (TEXTS[::2], TEXTS[1::2])
FORMATS = {
    "parquet": as_parquet,
    "jsonl.zst": packed("zstd", as_lines),
    "csv": as_csv,
    "txt": lambda texts: "\n".join(texts).encode(),
    "arrow": as_arrow,
    "tar": as_tar,
}


def repository(suffix: str) -> dict[str, bytes]:
    """Files of a data set with two configurations."""
    write = FORMATS[suffix]
    files = {"README.md": CARD.encode(), ".gitattributes": b""}
    for number, texts in enumerate(HALVES):
        files[f"sample/1/{number}.{suffix}"] = write(texts)
    return files | {f"test/0.{suffix}": write(documents(3)), f"sample/2/0.{suffix}": write(documents(5))}


def start(url: Path, vocab: Path, environment: Mapping[str, str], *flags: str) -> subprocess.Popen:
    """A preparation in a process of its own: huggingface_hub reads its variables when it is imported."""
    fixed = (f"--data.url={url}", f"--tokenizer.vocab_url={vocab}", *SMALL)
    command = [sys.executable, *patched.module_of("data_prep.prepare", patched.NO_PAUSES), *fixed, *flags]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | environment
    )


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, errors
    return errors


REFUSED = """
import json, os, sys
from core.settings import loader
from core.errors import LauncherError
from core.settings.preparation import PrepConfig
from data_prep import plan

for flags in json.loads(sys.argv[1]):
    try:
        file = plan.make(loader.load(PrepConfig, flags, {}))[1].files[0]
        print("not refused:", file.reader, file.options)
    except LauncherError as error:
        print(error)
"""


def refusals(url: Path, environment: Mapping[str, str], *cases: tuple[str, ...]) -> list[str]:
    """The sentence of each of these preparations, all in one process."""
    flags = json.dumps([[f"--data.url={url}", *case] for case in cases])
    command = [sys.executable, "-c", REFUSED, flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


NAMED = (f"--source.dataset={REPOSITORY}", "--source.name=sample-1")


SLOW = [pytest.param(suffix, marks=pytest.mark.slow) for suffix in ("csv", "parquet", "txt", "arrow", "tar")]


@pytest.mark.parametrize("suffix", ["jsonl.zst", *SLOW])
def test_named_offline_killed_and_resumed(suffix: str, tmp_path: Path, vocab_bpe: Path):
    """The ids are tiktoken's, and the bytes those of a preparation of the same files by their address."""
    snapshot = hub_cache.lay_out(tmp_path / "home", REPOSITORY, repository(suffix))
    environment = hub_cache.offline(tmp_path / "home")
    slow = ("--tokenizer.engine=tiktoken",)
    process = start(tmp_path / "set", vocab_bpe, environment, *NAMED, *slow)
    records = tmp_path / "set/parts"
    while process.poll() is None and not list(records.glob("0*.json")):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in records.glob("0*.json")}
    assert kept
    finish(start(tmp_path / "set", vocab_bpe, environment, *NAMED))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    texts = ["\n".join(texts) for texts in HALVES] if suffix == "txt" else TEXTS
    assert both_splits(str(tmp_path / "set")) == encoded(texts, vocab_bpe)
    assert manifest.read(str(tmp_path / "set")).source["revision"] == COMMIT
    assert shards(tmp_path / "set") == shards_of_files(f"{snapshot}/sample/1/*", tmp_path, vocab_bpe)


def shards(url: Path) -> dict[str, str]:
    return {name: sha for name, sha in stored(str(url)).items() if name.endswith(".bin")}


def shards_of_files(address: str, tmp_path: Path, vocab: Path) -> dict[str, str]:
    prepare_set(address, str(tmp_path / "files"), vocab)
    return shards(tmp_path / "files")


@pytest.mark.slow
def test_nodes_offline_make_the_same_bytes_as_one(tmp_path: Path, vocab_bpe: Path):
    hub_cache.lay_out(tmp_path / "home", REPOSITORY, repository("csv"))
    environment = hub_cache.offline(tmp_path / "home")
    finish(start(tmp_path / "one", vocab_bpe, environment, *NAMED))
    for rank in (1, 0):
        finish(start(tmp_path / "two", vocab_bpe, environment, *NAMED, "--num-nodes=2", f"--node-rank={rank}"))
    assert stored(str(tmp_path / "one")) == stored(str(tmp_path / "two"))


def with_semicolons() -> dict[str, bytes]:
    """Files of a data set whose card says how its table is written."""
    card = "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n  sep: ';'\n---\n"
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=";")
    writer.writerows([["text"], *([text] for text in documents(50))])
    return {"README.md": card.encode(), "a.csv": stream.getvalue().encode()}


@pytest.mark.slow
def test_what_a_card_says_about_a_format_is_followed(tmp_path: Path, vocab_bpe: Path):
    hub_cache.lay_out(tmp_path / "home", REPOSITORY, with_semicolons())
    finish(start(tmp_path / "set", vocab_bpe, hub_cache.offline(tmp_path / "home"), NAMED[0]))
    assert both_splits(str(tmp_path / "set")) == encoded(documents(50), vocab_bpe)
    [file] = json.loads((tmp_path / "set/parts/plan.json").read_text())["files"]
    assert (file["reader"], file["options"]) == ("csv", '{"sep": ";"}')


def test_refused_offline_or_read_as_the_card_says(tmp_path: Path):
    hub_cache.lay_out(tmp_path / "home", REPOSITORY, repository("csv"))
    hub_cache.lay_out(tmp_path / "home", "owner/script", {"script.py": b"", "README.md": b"# by a script"})
    hub_cache.lay_out(tmp_path / "home", "owner/table", with_semicolons())
    no_name, name, split, column, dataset, revision, script, table = refusals(
        tmp_path / "set",
        hub_cache.offline(tmp_path / "home"),
        NAMED[:1],
        (NAMED[0], "--source.name=sample1"),
        (*NAMED, "--source.split=tset"),
        (*NAMED, "--source.text_column=txet"),
        ("--source.dataset=owner/nmae",),
        (*NAMED, "--source.revision=v2"),
        ("--source.dataset=owner/script",),
        ("--source.dataset=owner/table",),
    )
    assert no_name == "source.name is empty, and owner/name has the configurations sample-1, sample-2; choose one"
    assert name.startswith("source.name is 'sample1', but")
    assert name.endswith("did you mean sample-1 or sample-2?")
    assert split == "source.split is 'tset', but owner/name (sample-1) has only train, test; did you mean test?"
    assert column.endswith("has no column 'txet', only id, text; did you mean text?")
    assert dataset.startswith("source.dataset is 'owner/nmae', of which")
    assert "did you mean owner/name" in dataset
    assert "has no copy at revision 'v2'" in revision
    assert "has no data files (only README.md, script.py)" in script
    assert table == 'not refused: csv {"sep": ";"}', "what a card says about its format is followed"


# --- online --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path):
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def online(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "empty"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "",
    }


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_named_on_a_throttling_hub(suffix: str, hub: Hub, tmp_path: Path, vocab_bpe: Path):
    hub.files = repository(suffix)
    flags = [*NAMED, "--source.revision=v1"]
    assert "read failed" in finish(start(tmp_path / "set", vocab_bpe, online(hub, tmp_path), *flags))
    assert both_splits(str(tmp_path / "set")) == encoded(TEXTS, vocab_bpe)
    assert manifest.read(str(tmp_path / "set")).source == {
        "url": f"hf://datasets/{REPOSITORY}",
        "name": "sample-1",
        "split": "train",
        "revision": COMMIT,
        "files": 2,
        "bytes": sum(len(data) for name, data in hub.files.items() if name.startswith("sample/1/")),
        "plan_sha256": plan.read(str(tmp_path / "set")).sha256,
    }
    # The same set from a copy, on a machine without network, is complete already; by its address, too.
    hub_cache.lay_out(tmp_path / "home", REPOSITORY, hub.files)
    before = stored(str(tmp_path / "set"))
    address = f"--source.url=hf://datasets/{REPOSITORY}@{COMMIT}/sample/1/*"
    for again in (
        start(tmp_path / "set", vocab_bpe, hub_cache.offline(tmp_path / "home"), *NAMED),
        start(tmp_path / "set", vocab_bpe, online(hub, tmp_path), address),
    ):
        assert "is complete already" in finish(again)
    assert stored(str(tmp_path / "set")) == before


@pytest.mark.slow
def test_begun_by_address_and_continued_by_name(hub: Hub, tmp_path: Path, vocab_bpe: Path):
    """As a preparation that an earlier release began: the stored plan stays in force."""
    hub.files = repository("parquet")
    environment = online(hub, tmp_path)
    address = f"--source.url=hf://datasets/{REPOSITORY}@{COMMIT}/sample/1/*.parquet"
    finish(start(tmp_path / "set", vocab_bpe, environment, address, "--num-nodes=2", "--node-rank=1"))
    begun = (tmp_path / "set/parts/plan.json").read_bytes()
    finish(start(tmp_path / "set", vocab_bpe, environment, *NAMED, "--num-nodes=2", "--node-rank=0"))
    assert (tmp_path / "set/parts/plan.json").read_bytes() == begun
    finish(start(tmp_path / "one", vocab_bpe, environment, address))
    assert stored(str(tmp_path / "set")) == stored(str(tmp_path / "one"))


@pytest.mark.slow
def test_the_newest_commit_is_pinned_when_a_preparation_begins(hub: Hub, tmp_path: Path, vocab_bpe: Path):
    hub.files = repository("csv")
    nodes = ("--num-nodes=2", "--node-rank=1")
    finish(start(tmp_path / "set", vocab_bpe, online(hub, tmp_path), *NAMED, *nodes))
    hub.newest = "f" * 40
    finish(start(tmp_path / "set", vocab_bpe, online(hub, tmp_path), *NAMED))
    assert manifest.read(str(tmp_path / "set")).source["revision"] == COMMIT


def test_refused_online(hub: Hub, tmp_path: Path):
    hub.files = repository("csv")
    unknown, revision = refusals(
        tmp_path / "set",
        online(hub, tmp_path),
        ("--source.dataset=owner/nmae",),
        (*NAMED, "--source.revision=v9"),
    )
    assert unknown.startswith("source.dataset is 'owner/nmae', which the Hub does not have or does not show; did you")
    assert "did you mean owner/name or " in unknown
    assert revision.startswith("source.revision is 'v9', which owner/name does not have; name a commit, tag or branch")
    hub.gated = True
    [gated] = refusals(tmp_path / "set", online(hub, tmp_path), NAMED)
    assert gated.startswith("source.dataset is 'owner/name', which is gated: accept its terms at http")
    assert "/datasets/owner/name, and set HF_TOKEN" in gated


# --- settings ------------------------------------------------------------------------------------------------------


def source_of(tmp_path: Path, written: str, environment: dict[str, str], *flags: str) -> SourceConfig:
    (tmp_path / "c.yaml").write_text(written)
    return settings.load(PrepConfig, [str(tmp_path / "c.yaml"), "--data.url=/d", *flags], environment).source


def test_a_source_replaces_the_one_of_the_config(tmp_path: Path):
    written = "source: {dataset: a/b, name: c, split: test, revision: v1, text_column: body}"
    assert source_of(tmp_path, written, {}).place == "a/b/c/test"
    found = source_of(tmp_path, written, {"SOURCE_URL": "x.csv"})
    assert (found.url, found.dataset, found.name, found.split, found.revision) == ("x.csv", "", "", "train", "")
    assert found.text_column == "body"
    found = source_of(tmp_path, written, {"SOURCE_URL": "x.csv"}, "--source.dataset=d/e", "--source.name=f")
    assert (found.place, found.revision) == ("d/e/f/train", "")
    assert source_of(tmp_path, written, {"SOURCE_URL": ""}, "--source.split=all").place == "a/b/c/all"


def test_two_sources_or_none_are_refused(tmp_path: Path):
    with pytest.raises(settings.ConfigError, match=r"source\.url: is 'x', but dataset is 'a/b', too; give one of them"):
        source_of(tmp_path, "source: {dataset: a/b, url: x}", {})
    with pytest.raises(settings.ConfigError, match=r"source\.url: is empty, and so is dataset; name a data set"):
        source_of(tmp_path, "data: {seed: 1}", {})
    with pytest.raises(
        settings.ConfigError, match=r"dataset: is './folder', which is not a name on the Hub; write OWNER"
    ):
        source_of(tmp_path, "source: {dataset: ./folder}", {})
