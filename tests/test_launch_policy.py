"""The bucket policy of docs/launch.md: what a run does is allowed, nothing else. Judged by moto's IAM."""

import json
import urllib.request
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from core import storage
from core.errors import ObjectExists, StorageError
from tests.later import Later

POLICY = Path(__file__).parent.parent / "launch/bucket-policy.json"
BUCKET = "my-bucket"
OTHERS = ("runs/second/run.json", "data/other/manifest.json", "runs/first-2/run.json")


@pytest.fixture(scope="module")
def limited():
    """The environment of a user with this policy alone."""
    server = Later("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    root = {"endpoint_url": endpoint, "region_name": "us-east-1"}
    root |= {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
    s3, iam = boto3.client("s3", **root), boto3.client("iam", **root)
    for name in (BUCKET, "other-bucket"):
        s3.create_bucket(Bucket=name)
    s3.put_object(Bucket=BUCKET, Key="private/notes", Body=b"not a run's business")
    for key in OTHERS:
        s3.put_object(Bucket=BUCKET, Key=key, Body=b"of another run")
    iam.create_user(UserName="run")
    text = POLICY.read_text()
    for name, own in (("BUCKET", BUCKET), ("/RUN/", "/first/"), ("/DATA/", "/fineweb-edu-10bt/")):
        text = text.replace(name, own)
    iam.put_user_policy(UserName="run", PolicyName="bucket", PolicyDocument=text)
    key = iam.create_access_key(UserName="run")["AccessKey"]
    enforce(endpoint, after="0")
    ours = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    ours |= {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ours.items():
            patch.setenv(name, value)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        yield
    enforce(endpoint, after="inf")
    server.stop()


def client():
    return boto3.session.Session().client("s3")


def enforce(endpoint: str, after: str) -> None:
    """moto checks permissions after this many requests."""
    headers = {"Content-Type": "text/plain"}
    request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", after.encode(), headers, method="POST")
    urllib.request.urlopen(request)


def test_all_that_a_run_does_is_allowed(limited):
    for folder in ("runs/first", "data/fineweb-edu-10bt"):
        uri = f"s3://{BUCKET}/{folder}/small/object"
        storage.write_bytes(uri, b"0123456789", exclusive=True)
        with pytest.raises(ObjectExists):
            storage.write_bytes(uri, b"other", exclusive=True)
        storage.write_bytes(uri, b"0123456789")
        assert storage.read_bytes(uri) == b"0123456789"
        assert storage.read_range(uri, 2, 5) == b"234"
        assert storage.size_of(uri) == 10
        assert [info.uri for info in storage.list_objects(f"s3://{BUCKET}/{folder}/small")] == [uri]
        storage.delete(uri)
        assert not storage.exists(uri)
    storage.write_bytes(f"s3://{BUCKET}/.check-123", b"as launch.check does")
    storage.delete(f"s3://{BUCKET}/.check-123")


def test_large_objects_go_up_in_parts(limited, tmp_path):
    file = tmp_path / "large"
    file.write_bytes(b"x" * (6 << 20))
    s3 = client()
    upload = {"Bucket": BUCKET, "Key": "runs/first/large"}
    part = {"UploadId": s3.create_multipart_upload(**upload)["UploadId"], **upload}
    s3.upload_part(PartNumber=1, Body=file.read_bytes(), **part)
    assert len(s3.list_parts(**part)["Parts"]) == 1
    s3.abort_multipart_upload(**part)
    assert storage.write_file("s3://" + BUCKET + "/runs/first/large", file) == 6 << 20


@pytest.mark.parametrize("uri", ["s3://other-bucket/runs/x", f"s3://{BUCKET}/private/notes", f"s3://{BUCKET}/top"])
def test_nothing_else_can_be_written_or_read(limited, uri):
    with pytest.raises(StorageError, match="may not write"):
        storage.write_bytes(uri, b"x")
    with pytest.raises(StorageError, match="may not read"):
        storage.read_bytes(uri)


@pytest.mark.parametrize("key", OTHERS)
def test_the_objects_of_other_runs_are_read_and_neither_changed_nor_deleted(limited, key):
    """A tuning starts from another run's weights, and compares itself with others."""
    uri = f"s3://{BUCKET}/{key}"
    assert storage.read_bytes(uri) == b"of another run"
    with pytest.raises(StorageError, match="may not write"):
        storage.write_bytes(uri, b"x")
    with pytest.raises(StorageError, match="may not delete"):
        storage.delete(uri)
    assert storage.read_bytes(uri) == b"of another run"


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("list_buckets", {}),
        ("create_bucket", {"Bucket": "new-bucket"}),
        ("delete_bucket", {"Bucket": BUCKET}),
        ("put_bucket_policy", {"Bucket": BUCKET, "Policy": json.dumps({"Statement": []})}),
        ("get_bucket_policy", {"Bucket": BUCKET}),
        ("list_objects_v2", {"Bucket": "other-bucket"}),
    ],
)
def test_the_bucket_itself_is_out_of_reach(limited, operation, arguments):
    with pytest.raises(ClientError, match="AccessDenied"):
        getattr(client(), operation)(**arguments)
