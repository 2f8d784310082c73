"""Whose keys open a bucket, and what is said where there are none or wrong ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core import environment, storage
from core.errors import ConfigError, StorageError
from core.stores import aws, credentials
from tests.fake_metadata import metadata_service

ROOT = Path(__file__).parent.parent
OURS = ("BUCKET_", "AWS_", "GOOGLE_", "AZURE_")


@pytest.fixture
def nothing(s3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A bucket, and a user without any key. Yields the variables that the bucket's keys have in the AWS names."""
    storage.write_bytes(f"{bucket}/object", b"content")
    right = {name: value for name, value in s3.environment().items()}
    for name in [name for name in os.environ if name.startswith(OURS)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", s3.endpoint)
    return right


def test_the_buckets_own_keys_win_over_those_of_the_cloud(nothing, bucket: str, monkeypatch):
    for name, value in (("AWS_ACCESS_KEY_ID", "cloud"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_SESSION_TOKEN", "y")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="the credentials were refused"):
        storage.read_bytes(f"{bucket}/object")
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", nothing["AWS_ACCESS_KEY_ID"])
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", nothing["AWS_SECRET_ACCESS_KEY"])
    assert storage.read_bytes(f"{bucket}/object") == b"content"


def test_half_a_pair_is_refused(nothing, bucket: str, monkeypatch):
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "a")
    with pytest.raises(ConfigError, match="BUCKET_SECRET_ACCESS_KEY is empty, its partner is set; set both or none"):
        storage.read_bytes(f"{bucket}/object")


def test_without_any_key_the_message_names_them(nothing, bucket: str):
    with pytest.raises(
        StorageError, match=r"/object: no credentials; set BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS"
    ):
        storage.read_bytes(f"{bucket}/object")


def write_profile(home: Path, keys: dict[str, str], section: str = "default") -> None:
    (home / ".aws").mkdir(exist_ok=True)
    lines = [f"aws_access_key_id = {keys['AWS_ACCESS_KEY_ID']}"]
    lines += [f"aws_secret_access_key = {keys['AWS_SECRET_ACCESS_KEY']}"]
    (home / ".aws/credentials").write_text("\n".join([f"[{section}]", *lines, ""]))


def test_a_profile_is_used_with_its_region_and_endpoint(nothing, s3, bucket: str, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("BUCKET_ENDPOINT_URL")
    write_profile(tmp_path, nothing, "team")
    text = f"[profile team]\nregion = eu-north-1\nendpoint_url = {s3.endpoint}\n"
    (tmp_path / ".aws/config").write_text(text)
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert storage.read_bytes(f"{bucket}/object") == b"content"
    profile = credentials.profile_settings(os.environ)
    assert aws.place_of("tests", os.environ, profile).region == "eu-north-1"
    assert aws.place_of("tests", {**os.environ, "BUCKET_REGION": "eu-west-1"}, profile).region == "eu-west-1"


def test_a_profile_that_was_renewed_is_read_again(nothing, tmp_path: Path):
    write_profile(tmp_path, {"AWS_ACCESS_KEY_ID": "old", "AWS_SECRET_ACCESS_KEY": "x"})
    provide = credentials.for_s3(os.environ)
    assert provide()["access_key_id"] == "old"
    write_profile(tmp_path, {"AWS_ACCESS_KEY_ID": "new", "AWS_SECRET_ACCESS_KEY": "x"})
    found = provide()
    assert found["access_key_id"] == "new"
    assert found["expires_at"] is not None, "or obstore would not ask again"


def test_a_machines_role_needs_no_other_package(nothing, bucket: str, monkeypatch):
    """Which GPU nodes do not have."""
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    role = {"AccessKeyId": nothing["AWS_ACCESS_KEY_ID"], "SecretAccessKey": nothing["AWS_SECRET_ACCESS_KEY"]}
    role |= {"Token": "", "Expiration": "2099-01-01T00:00:00Z"}
    with metadata_service() as (service, variables):
        service.items |= {"iam/security-credentials/": "node", "iam/security-credentials/node": json.dumps(role)}
        code = "import sys; from core import storage; print(storage.read_bytes(sys.argv[1]).decode())\n"
        code += "print(sorted({'boto3', 'botocore', 'fsspec', 'aiohttp'} & set(sys.modules)))"
        command = [sys.executable, "-c", code, f"{bucket}/object"]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == ["content", "[]"], done.stderr


# --- Google and Azure ------------------------------------------------------------------------------------------

ACCOUNT = {"type": "service_account", "client_email": "a@b", "private_key": "very-private", "private_key_id": "1"}


def test_googles_key_is_a_path_or_its_content(tmp_path: Path):
    (tmp_path / "key.json").write_text(json.dumps(ACCOUNT, indent=2))
    for key in (str(tmp_path / "key.json"), json.dumps(ACCOUNT)):
        [(name, value)] = credentials.for_google({"BUCKET_GOOGLE_KEY": key}).items()
        assert (name, json.loads(value)) == ("service_account_key", ACCOUNT)
    assert credentials.for_google({}) == {}
    (tmp_path / "login.json").write_text('{"type": "authorized_user"}')
    assert credentials.for_google({"BUCKET_GOOGLE_KEY": f"{tmp_path}/login.json"}) == {
        "application_credentials": f"{tmp_path}/login.json"
    }
    sent = {"BUCKET_GOOGLE_KEY": str(tmp_path / "key.json")}
    credentials.inline_google_key(sent)
    assert json.loads(sent["BUCKET_GOOGLE_KEY"]) == ACCOUNT


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("/nowhere/key.json", "the file cannot be read (No such file or directory); give its path or its JSON"),
        ('{"private_key": "very-private', "is not valid JSON; download the service account's key again"),
        ('{"type": "authorized_user"}', "holds a user's login; give its path, or the key of a service account"),
    ],
)
def test_what_is_no_key_of_googles_is_refused_without_showing_it(key: str, said: str):
    with pytest.raises(ConfigError) as problem:
        credentials.for_google({"BUCKET_GOOGLE_KEY": key})
    assert said in str(problem.value)
    assert "very-private" not in str(problem.value)


def test_azures_key_is_the_accounts_or_a_signature():
    assert credentials.for_azure({"BUCKET_AZURE_KEY": "abc="}) == {"account_key": "abc="}
    assert credentials.for_azure({"BUCKET_AZURE_KEY": "?sv=1&sig=x"}) == {"sas_key": "sv=1&sig=x"}
    assert "use_azure_cli" not in credentials.for_azure({"AZURE_STORAGE_ACCOUNT_KEY": "abc="})


@pytest.mark.parametrize("url", ["gs://b/x", "az://account/container/x"])
def test_keys_that_no_library_can_use_are_named(nothing, url: str, monkeypatch):
    monkeypatch.setenv("BUCKET_GOOGLE_KEY", json.dumps(ACCOUNT))
    monkeypatch.setenv("BUCKET_AZURE_KEY", "not base64")
    with pytest.raises(StorageError) as problem:
        storage.read_bytes(url)
    assert f"{url}: could not read" in str(problem.value)
    assert "very-private" not in str(problem.value)


# --- .env ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "BUCKET_ENDPOINT_URL"])
def test_a_dotenv_with_another_servers_keys_in_awss_names_is_refused_with_the_new_ones(tmp_path: Path, name: str):
    file = tmp_path / ".env"
    file.write_text(
        f"AWS_ACCESS_KEY_ID=very-secret\nAWS_SECRET_ACCESS_KEY=s\n{name}=https://x.r2.cloudflarestorage.com\n"
    )
    with pytest.raises(
        ConfigError, match="AWS_ACCESS_KEY_ID to BUCKET_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY to BUCKET_"
    ) as e:
        environment.with_dotenv({}, file)
    assert (f"{name} to BUCKET_ENDPOINT_URL" in str(e.value)) == (name != "BUCKET_ENDPOINT_URL")
    assert "very-secret" not in str(e.value)


@pytest.mark.parametrize(
    "text",
    [
        "AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=s\n",  # on AWS the same keys may serve SkyPilot and the bucket
        "AWS_ACCESS_KEY_ID=a\nAWS_SECRET_ACCESS_KEY=s\nAWS_ENDPOINT_URL_S3=https://s3.eu-west-1.amazonaws.com\n",
        "AWS_ACCESS_KEY_ID=a\nBUCKET_ACCESS_KEY_ID=b\nBUCKET_ENDPOINT_URL=https://r2.example\n",
        "BUCKET_ACCESS_KEY_ID=b\nBUCKET_ENDPOINT_URL=https://r2.example\n",
    ],
)
def test_other_dotenvs_are_fine(tmp_path: Path, text: str):
    (tmp_path / ".env").write_text(text)
    assert environment.with_dotenv({}, tmp_path / ".env")
