"""Preparation from a Hub that throttles, redirects and fails: a small server with the Hub's answers."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from core.data import manifest
from core.errors import ConfigError
from core.stores import hub
from tests import patched
from tests.corpus import documents, prepare_set, stored, write_parquet
from tests.fake_hub import COMMIT, REPOSITORY, Hub


@pytest.fixture
def fake_hub(tmp_path: Path):
    write_parquet(tmp_path / "hub", [documents(60), documents(120)[60:]])
    with Hub() as server:
        server.files = {f"data/{file.name}": file.read_bytes() for file in (tmp_path / "hub").iterdir()}
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_throttling_hub_gives_the_same_set(fake_hub: Hub, tmp_path: Path, vocab_bpe: Path):
    # A process of its own: huggingface_hub reads HF_ENDPOINT when it is imported.
    url = f"hf://datasets/{REPOSITORY}/data/*.parquet"
    small = ("--data.part_bytes=20000", "--data.shard_tokens=5000", "--data.val_fraction=0.1", "--workers=1")
    flags = (f"--source.url={url}", f"--data.url={tmp_path}/set", f"--tokenizer.vocab_url={vocab_bpe}", *small)
    address = f"http://127.0.0.1:{fake_hub.server_port}"
    environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, *patched.module_of("data_prep.prepare", patched.NO_PAUSES), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "read failed" in done.stderr  # it was refused, and said so
    assert "hf_secret" not in done.stderr + done.stdout
    assert "Bearer hf_secret" in fake_hub.tokens
    # The newest revision is pinned: every file was read at the commit.
    assert manifest.read(f"{tmp_path}/set").source["revision"] == COMMIT
    assert all(COMMIT in path for path in fake_hub.requests if "/resolve/" in path)
    prepare_set(str(tmp_path / "hub/*.parquet"), f"{tmp_path}/local", vocab_bpe)
    throttled, local = (
        {name: sha for name, sha in stored(f"{tmp_path}/{url}").items() if name.endswith(".bin")}
        for url in ("set", "local")
    )
    assert throttled == local


def test_hub_addresses():
    where = hub.parse("hf://datasets/a/b@v1.2/sample/10BT/*.parquet")
    assert where == hub.HubPath("datasets", "a/b", "v1.2", "sample/10BT/*.parquet")
    assert where.at("c0ffee") == "hf://datasets/a/b@c0ffee/sample/10BT/*.parquet"
    assert hub.parse("hf://datasets/a/b/c").revision == ""


@pytest.mark.parametrize(
    ("written", "revision", "path"),
    [
        ("refs/convert/parquet/default/train/*.parquet", "refs/convert/parquet", "default/train/*.parquet"),
        ("refs%2Fconvert%2Fparquet/default/0.parquet", "refs/convert/parquet", "default/0.parquet"),
        ("refs/pr/12/a.parquet", "refs/pr/12", "a.parquet"),
        ("my%2Fbranch/a.parquet", "my/branch", "a.parquet"),
        ("~parquet/a.parquet", "~parquet", "a.parquet"),
        ("refs/a.parquet", "refs", "a.parquet"),
    ],
)
def test_revisions_are_read_as_huggingface_hub_reads_them(
    written: str, revision: str, path: str, monkeypatch: pytest.MonkeyPatch
):
    where = hub.parse(f"hf://datasets/a/b@{written}")
    assert (where.revision, where.path) == (revision, path)
    assert hub.parse(where.at(revision)) == where
    from huggingface_hub import HfFileSystem

    monkeypatch.setattr(HfFileSystem, "_repo_and_revision_exist", lambda *_: (True, None))
    theirs = HfFileSystem().resolve_path(f"datasets/a/b@{written}")
    assert (theirs.revision, theirs.path_in_repo) == (revision, path)


def test_addresses_outside_the_form_are_refused():
    with pytest.raises(ConfigError, match="not of the form hf://datasets/OWNER/NAME"):
        hub.parse("hf://a/b/c.parquet")
