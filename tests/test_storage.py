"""core.storage on local files, memory and a real S3 server: one behaviour."""

import concurrent.futures
import errno
import os
from pathlib import Path

import pytest

from core import storage
from core.errors import ObjectExists, ObjectNotFound, StorageError
from core.stores import faults, remote
from tests.faulty_proxy import FaultyProxy


@pytest.fixture(params=["local", "memory", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    if request.param == "memory":
        return "memory://" + request.node.name.replace("[", "-").rstrip("]")
    return request.getfixturevalue("bucket")


def test_whole_objects_and_ranges(base: str):
    uri = storage.join(base, "a", "b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"hello world")
    assert storage.read_bytes(uri) == b"hello world"
    assert storage.read_range(uri, 6, 11) == b"world"
    assert storage.read_range(uri, 3, 3) == b""
    assert storage.size_of(uri) == 11
    assert storage.exists(uri)
    assert not storage.exists(storage.join(base, "a"))
    storage.write_bytes(uri, b"replaced")
    assert storage.read_bytes(uri) == b"replaced"
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_listing(base: str):
    for name in ("x/2.txt", "x/1.txt", "x/y/3.txt", "z.txt"):
        storage.write_bytes(storage.join(base, name), name.encode())
    assert [info.uri for info in storage.list_objects(storage.join(base, "x"))] == [
        storage.join(base, name) for name in ("x/1.txt", "x/2.txt", "x/y/3.txt")
    ]
    assert storage.list_objects(storage.join(base, "x"))[0].size == 7
    assert storage.list_names(storage.join(base, "x")) == ["1.txt", "2.txt", "y"]
    assert storage.list_objects(storage.join(base, "nothing")) == []
    assert storage.list_names(storage.join(base, "nothing")) == []
    assert storage.expand(storage.join(base, "x/*.txt")) == [storage.join(base, f"x/{n}.txt") for n in (1, 2)]
    assert storage.expand(storage.join(base, "z.txt")) == [storage.join(base, "z.txt")]


def test_missing_object_is_named(base: str):
    storage.write_bytes(storage.join(base, "there"), b"x")
    uri = storage.join(base, "absent")
    for call in (storage.read_bytes, storage.size_of, storage.open_read, lambda u: storage.read_range(u, 0, 4)):
        with pytest.raises(ObjectNotFound, match="absent: not found"):
            call(uri)


def test_exclusive_write_has_one_winner(base: str):
    uri = storage.join(base, "claim")

    def claim(number: int) -> bool:
        try:
            storage.write_bytes(uri, b"%d" % number, exclusive=True)
            return True
        except ObjectExists:
            return False

    storage.write_bytes(storage.join(base, "warm"), b"")
    if base.startswith("memory"):  # one process, no race to speak of
        outcomes = [claim(number) for number in range(8)]
    else:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(claim, range(8)))
    assert sum(outcomes) == 1
    assert storage.read_bytes(uri) == b"%d" % outcomes.index(True)


def test_files_travel_whole(base: str, tmp_path: Path):
    source, target = tmp_path / "source", tmp_path / "deep" / "target"
    source.write_bytes(os.urandom(12 << 20))
    uri = storage.join(base, "big")
    assert storage.write_file(uri, source) == 12 << 20
    assert storage.download(uri, target) == 12 << 20
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(StorageError, match="big: checksum is"):
        storage.download(uri, tmp_path / "bad", expected_sha256="0" * 64)
    assert not (tmp_path / "bad").exists()
    with storage.open_read(uri) as file:
        file.seek(-4, os.SEEK_END)
        assert file.read() == source.read_bytes()[-4:]


class Spoiled(FaultyProxy):
    """Once so many parts of uploads have come, it refuses all requests but those that remove an upload."""

    parts = 2

    def draw(self, method: str, path: str) -> str | None:
        if "partNumber=" in path:
            self.parts -= 1
        return "500" if self.parts < 0 and method != "DELETE" else None


def uploads_left(s3) -> list[str]:
    client = s3._client()
    return [each["Key"] for each in client.list_multipart_uploads(Bucket="tests").get("Uploads", [])]


@pytest.mark.parametrize("how", ["buffer", "file"])
def test_large_objects_go_up_in_parts_whole_or_not_at_all(s3, bucket: str, tmp_path: Path, monkeypatch, how: str):
    monkeypatch.setattr(remote, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(remote, "_RETRIES_OF_PARTS", remote._RETRIES_OFF)
    data = os.urandom(17 << 20)
    uri = storage.join(bucket, "parts")

    def write(content: bytes) -> None:
        if how == "buffer":
            storage.write_bytes(uri, memoryview(content))
        else:
            (tmp_path / "content").write_bytes(content)
            assert storage.write_file(uri, tmp_path / "content") == len(content)

    write(data)
    assert storage.read_bytes(uri) == data
    with pytest.raises(ObjectExists):
        storage.write_bytes(uri, memoryview(data[:-1]), exclusive=True)
    with Spoiled(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StorageError, match=r"parts: could not write after 7 attempts \(500 Internal Server Error"):
            write(bytes(17 << 20))
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    assert storage.read_bytes(uri) == data
    assert uploads_left(s3) == []


def test_short_object_is_an_error_not_a_short_answer(base: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    storage.write_bytes(storage.join(base, "s"), b"12345")
    with pytest.raises(StorageError, match=r"/s: could not read"):
        storage.read_range(storage.join(base, "s"), 2, 10)


def test_failed_local_write_leaves_old_object_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = str(tmp_path / "object")
    storage.write_bytes(uri, b"old")

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match="the disk is full"):
        storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "object"]


def test_missing_bucket_and_credentials_name_the_remedy(s3, monkeypatch: pytest.MonkeyPatch):
    for call in (storage.list_objects, storage.list_names, lambda u: storage.write_bytes(u, b"")):
        with pytest.raises(StorageError, match=r"bucket 'no-such-bucket' does not exist; create it"):
            call("s3://no-such-bucket/folder")


def test_unknown_and_read_only_schemes():
    with pytest.raises(StorageError, match="unknown storage scheme 'ftp'"):
        storage.read_bytes("ftp://host/file")
    with pytest.raises(StorageError, match="read only"):
        storage.write_bytes("hf://datasets/a/b", b"")


def test_transient_faults_are_retried_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.001)
    calls = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 4:
            raise ConnectionResetError("reset by peer")
        return "done"

    assert storage._retrying("read", "s3://b/k", flaky) == "done"
    calls.clear()

    def refused() -> None:
        calls.append(1)
        raise PermissionError("Forbidden")

    with pytest.raises(StorageError, match="may not read"):
        storage._retrying("read", "s3://b/k", refused)
    assert len(calls) == 1
    calls.clear()

    def down() -> None:
        calls.append(1)
        raise TimeoutError("no answer")

    with pytest.raises(StorageError, match="after 7 attempts"):
        storage._retrying("read", "s3://b/k", down)
    assert len(calls) == storage.ATTEMPTS


def test_messages_carry_no_signature():
    error = OSError("Cannot connect to https://bucket.example/key?X-Amz-Signature=abc123&X-Amz-Credential=id")
    assert "abc123" not in faults.brief(error)
