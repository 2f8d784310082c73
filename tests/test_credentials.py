"""Whose keys open a bucket, which server it is on, and what is said where that goes wrong."""

import datetime
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from core import environment, storage
from core.errors import ConfigError, StorageError
from core.stores import aws, credentials
from tests.fake_metadata import metadata_service
from tests.faulty_proxy import FaultyProxy

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


# --- addresses -------------------------------------------------------------------------------------------------


def test_the_service_and_the_endpoint_by_the_variables():
    assert aws.service_of(aws.endpoint_of({})) == "aws"
    assert aws.service_of("https://s3.eu-west-1.amazonaws.com") == "aws"
    assert aws.service_of("https://0f.r2.cloudflarestorage.com") == "r2"
    assert aws.service_of("http://amazonaws.com.example:9000") == "s3-like"
    given = {"AWS_ENDPOINT_URL": "http://a/", "AWS_ENDPOINT_URL_S3": "http://b/"}
    assert aws.endpoint_of(given) == "http://b"
    assert aws.endpoint_of({**given, "BUCKET_ENDPOINT_URL": "http://c"}) == "http://c"


@pytest.mark.parametrize(
    ("region", "variables", "endpoint"),
    [
        ("us-east-1", {}, None),
        ("cn-north-1", {}, "https://s3.cn-north-1.amazonaws.com.cn"),
        ("us-east-1", {"AWS_USE_FIPS_ENDPOINT": "true"}, "https://s3-fips.us-east-1.amazonaws.com"),
        ("us-west-2", {"AWS_USE_DUALSTACK_ENDPOINT": "true"}, "https://s3.dualstack.us-west-2.amazonaws.com"),
    ],
)
def test_addresses_of_aws(region: str, variables: dict[str, str], endpoint: str | None):
    assert aws.Place("b", None, region).settings(variables).get("endpoint") == endpoint


def test_the_bucket_may_be_a_part_of_the_hosts_name():
    assert aws.Place("b", "https://b.s3.example.com", None).settings({})["virtual_hosted_style_request"]
    assert "virtual_hosted_style_request" not in aws.Place("b", "https://bb.s3.example.com", None).settings({})


# --- what a server may say -------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Answers every request as `answer` says; a function of the request."""

    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.command, self.path, dict(self.headers)))
        status, headers, code = self.answer(self)
        body = (
            f"<Error><Code>{code}</Code><Message>So says the server.</Message></Error>".encode() if code else b"content"
        )
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "Last-Modified": LONG_AGO, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = handle_any

    def log_message(self, *_: object) -> None:
        pass


LONG_AGO = "Sat, 01 Jan 2000 00:00:00 GMT"


@contextmanager
def server_that(answer, context: ssl.SSLContext | None = None) -> Iterator[tuple[str, list]]:
    handler = type("Answering", (Server,), {"answer": staticmethod(answer), "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "a-very-secret-one")
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr("core.stores.faults.THROTTLED_SECONDS", 0.001)


@pytest.mark.parametrize(
    ("status", "code", "said", "requests"),
    [
        (403, "InvalidAccessKeyId", "the credentials were refused (403 Forbidden InvalidAccessKeyId So says", 1),
        (
            403,
            "SignatureDoesNotMatch",
            "check BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY, BUCKET_SESSION_TOKEN if",
            1,
        ),
        (400, "ExpiredToken", "the credentials were refused (400 Bad Request ExpiredToken", 2),  # asked for once more
        (403, "RequestTimeTooSkewed", "the clock of this machine is wrong", 1),
        (
            403,
            "AccessDenied",
            "may not read (403 Forbidden AccessDenied So says the server.); check that the key may",
            1,
        ),
        (404, "NoSuchBucket", "bucket 'b' does not exist; create it (`aws --endpoint-url http", 1),
        (404, "NoSuchKey", "not found; check the URL", 1),
        (501, "NotImplemented", "could not read: 501 Not Implemented NotImplemented So says the server.", 1),
        (503, "SlowDown", "could not read after 3 attempts (503 Service Unavailable SlowDown", 3),
        (429, "TooManyRequests", "could not read after 3 attempts (429 Too Many Requests", 3),
        (500, "InternalError", "could not read after 3 attempts (500 Internal Server Error", 3),
    ],
)
def test_each_refusal_names_the_object_the_reason_and_the_remedy(keys, monkeypatch, status, code, said, requests):
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    with server_that(lambda request: (status, {}, code)) as (url, seen):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", url)
        with pytest.raises(StorageError) as problem:
            storage.read_bytes("s3://b/folder/object")
    assert str(problem.value).startswith("s3://b/folder/object: ")
    assert said in str(problem.value)
    assert len(seen) == requests
    assert "a-very-secret-one" not in str(problem.value)


def test_a_throttling_server_is_left_alone_for_a_second(keys, monkeypatch):
    monkeypatch.undo()
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setattr("random.uniform", lambda low, high: 1.0)
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "a-very-secret-one")
    for code, expected in (("SlowDown", [1, 1, 1, 2, 4, 8]), ("InternalError", [0.25, 0.5, 1, 2, 4, 8])):
        pauses.clear()
        with server_that(lambda request, code=code: (503 if code == "SlowDown" else 500, {}, code)) as (url, _):
            monkeypatch.setenv("BUCKET_ENDPOINT_URL", url)
            with pytest.raises(StorageError):
                storage.read_bytes("s3://b/object")
        assert pauses == expected


def test_a_bucket_in_another_region_is_found(keys, monkeypatch):
    """As AWS does: a redirect without an address, and the region in a header for anybody who asks."""

    def answer(request):
        home = {"x-amz-bucket-region": "eu-west-1"}
        if "/eu-west-1/s3/" in request.headers.get("Authorization", ""):
            return 200, {}, ""
        return 301, home, "PermanentRedirect"

    with server_that(answer) as (url, seen):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", url)
        assert storage.read_bytes("s3://b/object") == b"content"
        assert [method for method, _, _ in seen] == ["GET", "HEAD", "GET"]
        assert storage.read_bytes("s3://b/object") == b"content"
        assert len(seen) == 4, "the region is remembered"


def test_a_bucket_in_a_region_that_nobody_tells_is_named(keys, monkeypatch):
    with server_that(lambda request: (301, {}, "PermanentRedirect")) as (url, _):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", url)
        with pytest.raises(StorageError, match=r"bucket 'b' is in another region \(.*\); set BUCKET_REGION"):
            storage.read_bytes("s3://b/object")


def test_an_endpoint_with_a_path_and_a_proxy(s3, bucket: str, keys, monkeypatch):
    with server_that(lambda request: (200, {}, "")) as (url, seen):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", f"{url}/tenant/s3/")
        assert storage.read_bytes("s3://b.with.dots/object") == b"content"
        assert seen[-1][1] == "/tenant/s3/b.with.dots/object"
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", "http://store.invalid:9000")
        monkeypatch.setenv("HTTP_PROXY", url)
        assert storage.read_bytes("s3://b/by-proxy") == b"content"
        assert seen[-1][1] == "http://store.invalid:9000/b/by-proxy"


def authority(folder: Path) -> None:
    """A private authority (ca.pem) and the certificate of localhost that it has signed (server.pem, with its key)."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, key, issuer: str, signer, *extensions) -> x509.Certificate:
        names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in (name, issuer)]
        made = x509.CertificateBuilder(*reversed(names), key.public_key(), x509.random_serial_number())
        made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        for extension in extensions:
            made = made.add_extension(extension, critical=False)
        return made.sign(signer, hashes.SHA256())

    ours, servers = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = certificate("ca", ours, "ca", ours, x509.BasicConstraints(ca=True, path_length=None))
    server = certificate("server", servers, "ca", ours, x509.SubjectAlternativeName([x509.DNSName("localhost")]))
    plain = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "ca.pem").write_bytes(ca.public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(servers.private_bytes(*plain) + server.public_bytes(Encoding.PEM))


def test_a_server_behind_a_private_authority(keys, tmp_path: Path, monkeypatch):
    authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    with server_that(lambda request: (200, {}, ""), context) as (url, _):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", url.replace("http://127.0.0.1", "https://localhost"))
        with pytest.raises(StorageError, match=r"is not trusted \(UnknownIssuer\); set REQUESTS_CA_BUNDLE"):
            storage.read_bytes("s3://b/object")
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", f"{tmp_path}/ca.pem")
        assert storage.read_bytes("s3://b/object") == b"content"
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", f"{tmp_path}/nowhere.pem")
        with pytest.raises(StorageError, match="certificates cannot be read"):
            storage.read_bytes("s3://b/object")


def test_an_endpoint_may_be_an_ipv6_address(keys, monkeypatch):
    try:
        server = type("V6", (http.server.ThreadingHTTPServer,), {"address_family": 10})(
            ("::1", 0),
            type("Answering", (Server,), {"answer": staticmethod(lambda request: (200, {}, "")), "seen": []}),
        )
    except OSError:
        pytest.skip("this machine has no IPv6")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", f"http://[::1]:{server.server_port}")
    assert storage.read_bytes("s3://b/object") == b"content"
    server.shutdown()
    server.server_close()


def test_a_server_that_hangs_in_the_middle_of_a_body_is_asked_again(s3, bucket: str, monkeypatch):
    monkeypatch.setattr("core.stores.remote.SILENT_SECONDS", 1)
    monkeypatch.setattr(storage, "BACKOFF_SECONDS", 0.001)
    data = os.urandom(3 << 20)
    storage.write_bytes(f"{bucket}/body", data)
    with Hanging(s3.endpoint) as proxy:
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", proxy.url)
        assert storage.read_bytes(f"{bucket}/body") == data
    assert proxy.bodies == 2


class Hanging(FaultyProxy):
    """Sends half of the first two bodies and keeps the connection."""

    bodies = 0

    def draw(self, method: str, path: str) -> str | None:
        if self.bodies == 2:
            return None
        self.bodies += 1
        return "hang in the body"
