"""Where a bucket is, and what is said where its server refuses, hangs or is not trusted."""

import datetime
import http.server
import os
import ssl
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

from core import storage
from core.errors import ObjectExists, StorageError
from core.run.folder import RunFolder, open_run
from core.stores import aws, retries
from data_prep import plan
from tests import stores
from tests.faulty_proxy import FaultyProxy


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
    content = b"content"
    more = ""

    def handle_any(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append((self.command, self.path, dict(self.headers)))
        status, headers, code = self.answer(self)
        error = f"<Error><Code>{code}</Code><Message>So says the server.{self.more}</Message></Error>"
        body = error.encode() if code else self.content
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
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler.seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", "a-very-secret-one")
    monkeypatch.setattr(retries, "BACKOFF_SECONDS", 0.001)
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
    monkeypatch.setattr(retries, "ATTEMPTS", 3)
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
    for code, expected in (
        ("SlowDown", [1, 1, 1, 2, 4, 8, 15, 15]),
        ("InternalError", [0.25, 0.5, 1, 2, 4, 8, 15, 15]),
    ):
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
        monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", f"{tmp_path}/ca.pem")
        assert storage.read_bytes("s3://b/object") == b"content"
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", f"{tmp_path}/nowhere.pem")
        with pytest.raises(
            StorageError, match=r"REQUESTS_CA_BUNDLE is .*nowhere\.pem', which cannot be read \(No such file"
        ):
            storage.read_bytes("s3://b/object")


def test_an_endpoint_may_be_an_ipv6_address(keys, monkeypatch):
    try:
        server = type("V6", (http.server.ThreadingHTTPServer,), {"address_family": 10})(
            ("::1", 0),
            type("Answering", (Server,), {"answer": staticmethod(lambda request: (200, {}, "")), "seen": []}),
        )
    except OSError:
        pytest.skip("this machine has no IPv6")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", f"http://[::1]:{server.server_port}")
    assert storage.read_bytes("s3://b/object") == b"content"
    server.shutdown()
    server.server_close()


def test_a_server_that_hangs_in_the_middle_of_a_body_is_asked_again(s3, bucket: str, monkeypatch):
    monkeypatch.setattr("core.stores.remote.SILENT_SECONDS", 1)
    monkeypatch.setattr(retries, "BACKOFF_SECONDS", 0.001)
    data = os.urandom(3 << 20)
    storage.write_bytes(f"{bucket}/body", data)
    with Hanging(s3.endpoint) as proxy:
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", proxy.url)
        assert storage.read_bytes(f"{bucket}/body") == data
    assert proxy.bodies == 2


def test_a_store_that_ignores_conditions_gets_no_run_and_no_plan_and_loses_none(s3, bucket: str, monkeypatch):
    run = RunFolder(f"{bucket}/run")
    storage.write_bytes(f"{bucket}/old/run.json", b"{}")
    with stores.WithoutConditions(s3) as server, monkeypatch.context() as patched:
        patched.setenv("BUCKET_ENDPOINT_URL", server.url)
        said = rf"\({server.url}\) ignores conditional writes .*; nothing was stored"
        with pytest.raises(StorageError, match=said):
            open_run(run, {"x": 1}, {}, "f")
        with pytest.raises(StorageError, match=said):
            plan.claim(plan.PrepPlan({}, ()), f"{bucket}/set")
        with pytest.raises(ObjectExists):
            storage.claim(f"{bucket}/old/run.json", b"another")
    assert [info.uri for info in storage.list_objects(bucket)] == [f"{bucket}/old/run.json"]
    assert storage.read_bytes(f"{bucket}/old/run.json") == b"{}"
    assert open_run(run, {"x": 1}, {}, "f"), "the store itself takes conditions"
    assert storage.read_bytes(run.description)


class Hanging(FaultyProxy):
    """Sends half of the first two bodies and keeps the connection."""

    bodies = 0

    def draw(self, method: str, path: str) -> str | None:
        if self.bodies == 2:
            return None
        self.bodies += 1
        return "hang in the body"


# --- a HEAD has no answer to read ------------------------------------------------------------------------------


def s3_error(request, status: int, code: str) -> tuple[int, dict[str, str], str]:
    """As S3 answers: with a body, except to HEAD."""
    return status, ({"Content-Length": "0"} if request.command == "HEAD" else {}), code


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (400, "ExpiredToken", "ExpiredToken So says the server.): they have expired; get new ones and set BUCKET_ACC"),
        (403, "RequestTimeTooSkewed", "the clock of this machine is wrong (403 Forbidden RequestTimeTooSkewed"),
        (403, "InvalidAccessKeyId", "the credentials were refused (403 Forbidden InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch", "the credentials were refused (403 Forbidden SignatureDoesNotMatch"),
        (403, "AccessDenied", "nor list bucket 'b'; without the right s3:ListBucket the server gives this answer also"),
        (403, "SecondLevelDomainForbidden", "write the bucket into the endpoint: BUCKET_ENDPOINT_URL=https://b.HOST"),
    ],
)
@pytest.mark.parametrize("ask", [storage.exists, storage.size_of])
def test_what_a_head_hides_is_asked_for(keys, monkeypatch, status: int, code: str, said: str, ask):
    with server_that(lambda request: s3_error(request, status, code)) as (url, seen):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", url)
        with pytest.raises(StorageError) as problem:
            ask("s3://b/folder/object")
    assert said in str(problem.value)
    assert [method for method, _, _ in seen][:2] == ["HEAD", "GET"]


def test_an_object_that_alone_is_denied_is_not_blamed_on_listing(keys, monkeypatch):
    listing = "<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"

    def answer(request):
        return (200, {}, "") if "list-type" in request.path else s3_error(request, 403, "AccessDenied")

    monkeypatch.setattr(Server, "content", listing.encode())
    with server_that(answer) as (url, _):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", url)
        with pytest.raises(StorageError, match=r"may not stat \(403 Forbidden AccessDenied .*\); check that the key"):
            storage.size_of("s3://b/object")


@pytest.mark.parametrize("named", ["<Region>fr-par</Region>", "; the region is wrong; expecting &apos;fr-par&apos;"])
def test_the_region_that_a_refusal_expects_is_taken(keys, monkeypatch, named: str):
    """Without x-amz-bucket-region, which only AWS sends."""
    monkeypatch.setattr(Server, "more", named)

    def answer(request):
        if "/fr-par/s3/" in request.headers.get("Authorization", ""):
            return 200, {}, ""
        return s3_error(request, 400, "AuthorizationHeaderMalformed")

    with server_that(answer) as (url, _):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", url)
        assert storage.size_of("s3://b/object") == len(b"content")


def test_a_server_without_conditional_writes_or_ranges_is_named(keys, monkeypatch):
    with server_that(lambda request: s3_error(request, 501, "NotImplemented")) as (url, _):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", url)
        with pytest.raises(StorageError, match=r"does not take conditional writes \(If-None-Match\), .* use a newer"):
            storage.write_bytes("s3://b/object", b"x", exclusive=True)
    with server_that(lambda request: (200, {}, "")) as (url, seen):
        monkeypatch.setenv("BUCKET_ENDPOINT_URL", url)
        with pytest.raises(StorageError, match=r"ignores byte ranges") as problem:
            storage.read_range("s3://b/object", 2, 4)
    assert len(seen) == 1
    assert "network" not in str(problem.value)
