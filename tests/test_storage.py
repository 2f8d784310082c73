"""core.storage on local files, memory, two S3 servers, Azure's emulator and a stand-in for Google: one behaviour."""

import errno
import hashlib
import os
from pathlib import Path

import boto3
import pytest

from core import storage
from core.errors import ObjectExists, ObjectNotFound, StorageError
from core.stores import faults, remote, retries
from core.stores.opener import open_store
from tests import racing, stores
from tests.faulty_proxy import FaultyProxy
from tests.later import Later

STORES = ("local", "memory", "s3", "moto", "google", "azure")


@pytest.fixture(scope="module")
def moto():
    """The variables of another S3 server, which has the bucket `tests`."""
    server = Later("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"BUCKET_ACCESS_KEY_ID": "moto", "BUCKET_SECRET_ACCESS_KEY": "moto", "BUCKET_REGION": "us-east-1"}
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="moto",
        aws_secret_access_key="moto",
    )
    client.create_bucket(Bucket="tests")
    yield keys | {"BUCKET_ENDPOINT_URL": f"http://{host}:{port}"}
    server.stop()


@pytest.fixture(scope="module")
def azure(tmp_path_factory: pytest.TempPathFactory):
    if not stores.azurite():
        pytest.skip(stores.HOW_TO_INSTALL)
    with stores.Azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder in a store of each kind; `request.param` is one of STORES."""
    name, variables = request.node.name.replace("[", "-").rstrip("]"), {}
    if request.param == "local":
        yield str(tmp_path / "store")
    elif request.param == "memory":
        yield f"memory://{name}"
    elif request.param == "s3":
        yield request.getfixturevalue("bucket")
    elif request.param == "google":
        request.getfixturevalue("bucket")
        with stores.GoogleStandIn(request.getfixturevalue("s3")) as server:
            for variable, value in server.environment().items():
                monkeypatch.setenv(variable, value)
            yield f"gs://tests/{name}"
    else:
        server = request.getfixturevalue(request.param)
        variables, root = (server, "s3://tests") if request.param == "moto" else (server.environment(), server.url)
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        yield f"{root}/{name}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "base" in metafunc.fixturenames:
        metafunc.parametrize("base", STORES, indirect=True)


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
    for call in (storage.read_bytes, storage.size_of, lambda u: storage.read_range(u, 0, 4)):
        with pytest.raises(ObjectNotFound, match="absent: not found"):
            call(uri)


def race(base: str, rounds: int) -> list[int]:
    if "BUCKET_ENDPOINT_URL" in os.environ and os.environ.get("BUCKET_ACCESS_KEY_ID") == "moto":
        pytest.skip("moto looks for the object and stores its own in two steps, so that both may win")
    return (racing.by_threads if base.startswith("memory") else racing.by_processes)(base, rounds)


def test_of_two_writers_who_want_no_other_exactly_one_wins(base: str):
    assert len(race(base, 30)) == 30


@pytest.mark.slow
def test_of_two_writers_exactly_one_wins_a_thousand_times(base: str):
    assert len(race(base, 1000)) == 1000


@pytest.mark.parametrize("rounds", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_exactly_one_wins_where_the_file_system_has_no_hard_links(tmp_path: Path, rounds: int):
    assert len(racing.by_processes(str(tmp_path), rounds, hard_links=False)) == rounds
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number:04d}" for number in range(rounds)]


@pytest.mark.parametrize("code", ["EPERM", "ENOTSUP", "ENOSYS", "EINVAL"])
@pytest.mark.parametrize("lacks", ["chmod", "fsync", "link"])
def test_a_folder_may_lack_what_disks_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str, code: str):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(getattr(errno, code), code)

    monkeypatch.setattr(os, lacks, refuse)
    for exclusive in (True, False):
        storage.write_bytes(f"{tmp_path}/a", b"x", exclusive=exclusive)
    assert storage.read_bytes(f"{tmp_path}/a") == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_store_that_ignores_conditions_lets_both_win(s3, bucket: str, monkeypatch: pytest.MonkeyPatch):
    """So that the races above can fail."""
    with stores.WithoutConditions(s3) as server:
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", server.url)
        with pytest.raises(AssertionError, match="round 0"):
            race(bucket, 2)


NAMES = ("with space", "plus+and&", "é", "#hash", "question?", "percent%41", "star[x]", "quote'\"", "~tilde", "a=b,c;d")


def test_names_are_taken_as_they_are(base: str):
    uris = [storage.join(base, name, "x") for name in NAMES]
    for uri in uris:
        storage.write_bytes(uri, uri.encode())
    assert {info.uri: storage.read_bytes(info.uri).decode() for info in storage.list_objects(base)} == {
        uri: uri for uri in uris
    }
    assert storage.list_names(base) == sorted(NAMES)
    for uri in uris:
        storage.delete(uri)
    assert storage.list_objects(base) == []


@pytest.mark.parametrize("name", ["a//b", "a/../b", "line\nend"])
def test_names_that_no_object_store_takes_are_refused(name: str):
    with pytest.raises(StorageError, match=r"could not write: object stores do not accept this name \(.*rename"):
        storage.write_bytes(f"memory://refused/{name}", b"")


def test_many_ranges_at_once(base: str):
    data = os.urandom(5 << 20)
    uri = storage.join(base, "ranges")
    storage.write_bytes(uri, data)
    ranges = [(0, 10), (4 << 20, (4 << 20) + 2048), (5, 3000), (2048, 2049), ((5 << 20) - 1, 5 << 20)]
    assert [bytes(each) for each in storage.read_ranges(uri, ranges)] == [data[start:end] for start, end in ranges]
    assert storage.read_ranges(uri, []) == []


class Counting(FaultyProxy):
    requests = 0

    def draw(self, method: str, path: str) -> str | None:
        self.requests += 1
        return None


def test_ranges_that_are_near_each_other_come_by_one_request(s3, bucket: str, monkeypatch: pytest.MonkeyPatch):
    storage.write_bytes(f"{bucket}/near", bytes(4 << 20))
    with Counting(s3.endpoint) as proxy:
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", proxy.url)
        storage.read_ranges(f"{bucket}/near", [(start, start + 2048) for start in range(0, 2 << 20, 100_000)])
        assert proxy.requests == 1
        storage.read_ranges(f"{bucket}/near", [(0, 2048), (3 << 20, (3 << 20) + 2048)])
        assert proxy.requests == 3


def test_large_objects_come_and_go_in_parts(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "READ_PART_BYTES", 5 << 20)
    monkeypatch.setattr(remote, "PART_BYTES", 5 << 20)
    data, uri = os.urandom(23 << 20), storage.join(base, "large")
    storage.write_bytes(uri, memoryview(data))
    assert storage.read_bytes(uri) == data
    found = memoryview(bytearray(len(data)))
    assert b"".join(storage.read_into(uri, found)) == data
    monkeypatch.setattr("core.stores.retries.BACKOFF_SECONDS", 0.0)  # a short answer is asked for again
    with pytest.raises(StorageError, match=r"got \d+ of \d+ bytes"):
        list(storage.read_into(uri, memoryview(bytearray(len(data) + 1))))
    assert storage.download(uri, tmp_path / "copy", hashlib.sha256(data).hexdigest()) == len(data)
    assert storage.write_file(uri, tmp_path / "copy") == len(data)
    assert storage.read_range(uri, 1, 12 << 20) == data[1 : 12 << 20]


def test_empty_objects_and_marked_folders(base: str):
    storage.write_bytes(storage.join(base, "f/empty"), b"")
    assert storage.read_bytes(storage.join(base, "f/empty")) == b""
    assert storage.size_of(storage.join(base, "f/empty")) == 0
    assert [info.name for info in storage.list_objects(storage.join(base, "f"))] == ["empty"]


def test_an_empty_object_that_marks_a_folder_is_none(moto: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    for variable, value in moto.items():
        monkeypatch.setenv(variable, value)
    client = boto3.client(
        "s3", endpoint_url=moto["BUCKET_ENDPOINT_URL"], aws_access_key_id="moto", aws_secret_access_key="moto"
    )
    for key in ("marked/", "marked/below/", "marked/object"):
        client.put_object(Bucket="tests", Key=key, Body=b"x" if key.endswith("t") else b"")
    assert [info.uri for info in storage.list_objects("s3://tests/marked")] == ["s3://tests/marked/object"]
    assert storage.list_names("s3://tests/marked") == ["below", "object"]


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
    assert b"".join(storage.chunks(uri)) == source.read_bytes()


class Spoiled(FaultyProxy):
    """Once so many parts of uploads have come, it refuses all requests but those that remove an upload."""

    parts = 2

    def draw(self, method: str, path: str) -> str | None:
        if "partNumber=" in path:
            self.parts -= 1
        return "500" if self.parts < 0 and method != "DELETE" else None


def uploads_left(s3, folder: str) -> list[str]:
    """Keys below a folder whose uploads are not complete."""
    found = s3._client().list_multipart_uploads(Bucket="tests", Prefix=folder.removeprefix("s3://tests/"))
    return [each["Key"] for each in found.get("Uploads", [])]


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
    assert uploads_left(s3, bucket) == []


def test_short_object_is_an_error_not_a_short_answer(base: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retries, "ATTEMPTS", 1)
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


def test_the_patience_is_45_seconds(monkeypatch: pytest.MonkeyPatch):
    pauses = []
    monkeypatch.setattr(retries.random, "uniform", lambda low, high: 1.0)
    monkeypatch.setattr(retries.time, "sleep", pauses.append)

    def down() -> None:
        raise TimeoutError("no answer")

    with pytest.raises(StorageError):
        retries.retrying("s3://b/k", "read", open_store("s3://b/k")[0], down)
    assert sum(pauses) == 45.75


def test_transient_faults_are_retried_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retries, "BACKOFF_SECONDS", 0.001)
    calls = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 4:
            raise ConnectionResetError("reset by peer")
        return "done"

    store, _ = open_store("s3://b/k")
    assert retries.retrying("s3://b/k", "read", store, flaky) == "done"
    calls.clear()

    def refused() -> None:
        calls.append(1)
        raise PermissionError("Forbidden")

    with pytest.raises(StorageError, match="may not read"):
        retries.retrying("s3://b/k", "read", store, refused)
    assert len(calls) == 1
    calls.clear()

    def down() -> None:
        calls.append(1)
        raise TimeoutError("no answer")

    with pytest.raises(StorageError, match="after 9 attempts"):
        retries.retrying("s3://b/k", "read", store, down)
    assert len(calls) == retries.ATTEMPTS


def test_messages_carry_no_signature():
    error = OSError("Cannot connect to https://bucket.example/key?X-Amz-Signature=abc123&X-Amz-Credential=id")
    assert "abc123" not in faults.brief(error)
