"""S3 objects by botocore: whole, by range, in parts; and what there is.

core.storage is the way in; this is its transport. Measured 0.25 CPU-seconds per GB up and 0.4 down, where s3fs takes
3.3 up, 0.6 for a range and 2.7 for a whole object, and half a second to import and to open; s3fs remains for file
objects. A `path` is "bucket/key". Errors are botocore's; retries and their translation are the caller's.

Reads go past botocore's client, through the parts that it is made of: its credentials, its signer, its HTTP session.
Making a client parses megabytes of JSON (70 ms), and a request through it takes a millisecond; the first batch of a
run is all such requests. Where an address needs more rules than the plain ones, the client reads as well.
"""

import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

PART_BYTES = 64 << 20  # S3 takes at most 10,000 parts: objects up to 640 GB
PARTS_AT_ONCE = 4

# One retry loop, ours: s3fs and botocore would multiply it by five each.
CONFIG = {
    "connect_timeout": 10,
    "read_timeout": 60,
    "retries": {"total_max_attempts": 1},
    "max_pool_connections": 64,
    # Without it, R2 and older S3-compatible servers refuse the newest checksum trailers.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}

_making = threading.Lock()


def put(
    path: str, data: bytes | bytearray | memoryview, exclusive: bool, retrying: Callable[[Callable[[], Any]], Any]
) -> None:
    """Store an object whole, with If-None-Match if `exclusive`; a large one in parts, each sent by `retrying`."""
    target = _target(path)
    condition = {"IfNoneMatch": "*"} if exclusive else {}
    client = _client(_variables())
    view = memoryview(data)
    if view.nbytes < 2 * PART_BYTES:
        body = bytes(data) if isinstance(data, memoryview) else data
        client.put_object(**target, Body=body, **condition)
        return
    upload = {**target, "UploadId": client.create_multipart_upload(**target)["UploadId"]}

    def put_part(begin: int) -> dict[str, str | int]:
        number = begin // PART_BYTES + 1
        # botocore sends bytes only: the buffer is copied a part at a time, and a part that fails is sent again.
        body = bytes(view[begin : begin + PART_BYTES])
        sent = retrying(lambda: client.upload_part(**upload, PartNumber=number, Body=body))
        return {"PartNumber": number, "ETag": sent["ETag"]}

    try:
        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            parts = list(pool.map(put_part, range(0, view.nbytes, PART_BYTES)))
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **condition)
    except BaseException:
        with contextlib.suppress(Exception):  # what is left costs storage until the bucket's own clean-up
            client.abort_multipart_upload(**upload)
        raise


def get(path: str, byte_range: str | None = None) -> bytes:
    """The object, or the bytes that `byte_range` (an HTTP Range) names."""
    return _open(path, byte_range).read()


def chunks(path: str, size: int) -> Iterator[bytes]:
    """The object in pieces of at most `size` bytes."""
    body = _open(path)
    while chunk := body.read(size):
        yield chunk


def size(path: str) -> int:
    """Bytes of an object."""
    return _client(_variables()).head_object(**_target(path))["ContentLength"]


def objects(prefix: str) -> Iterator[dict[str, Any]]:
    """All objects whose path begins so: Key, Size, LastModified."""
    for page in _pages(prefix):
        yield from page.get("Contents", ())


def names(folder: str) -> Iterator[str]:
    """Names one level below "bucket/key": of objects, and of folders."""
    prefix = folder.rstrip("/") + "/"
    start = len(_target(prefix)["Key"])
    for page in _pages(prefix, Delimiter="/"):
        yield from (each["Prefix"][start:-1] for each in page.get("CommonPrefixes", ()))
        yield from (each["Key"][start:] for each in page.get("Contents", ()) if each["Key"][start:])


def delete(path: str) -> None:
    """Remove an object; without complaint if there is none."""
    _client(_variables()).delete_object(**_target(path))


def _open(path: str, byte_range: str | None = None):
    """The body of an object, to `read`."""
    variables = _variables()
    headers = {"Range": byte_range} if byte_range else {}
    reader = _reader(variables)
    body = reader.open(path, headers) if reader else None
    return _client(variables).get_object(**_target(path), **headers)["Body"] if body is None else body


def _pages(prefix: str, **options: str) -> Iterator[dict[str, Any]]:
    bucket, _, key = prefix.partition("/")
    return iter(_client(_variables()).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key, **options))


def _target(path: str) -> dict[str, str]:
    bucket, _, key = path.partition("/")
    return {"Bucket": bucket, "Key": key}


def _variables() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


def _client(environment: tuple[tuple[str, str], ...]):
    """A client for these AWS_ variables; safe to share between threads, costly to make."""
    with _making:  # or the first threads would each make their own
        return _made(environment)


@functools.lru_cache(maxsize=4)
def _made(environment: tuple[tuple[str, str], ...]):
    import botocore.config
    import botocore.session

    # Signing the body means hashing it once more; over https botocore does not sign it by default either.
    options = botocore.config.Config(**CONFIG, s3={"payload_signing_enabled": False})
    return botocore.session.Session().create_client("s3", config=options)


class _Reader:
    """GETs by botocore's signer and HTTP session; safe to share between threads."""

    def __init__(self, session, credentials, region: str, endpoint: str | None):
        import botocore.httpsession
        import botocore.utils

        self._credentials = credentials
        self._region = region
        self._endpoint = endpoint
        self._elsewhere: set[str] = set()  # buckets that the client has to find
        self._http = botocore.httpsession.URLLib3Session(
            # The variables that botocore's client obeys too.
            verify=session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE", True),
            proxies=botocore.utils.get_environ_proxies(endpoint or f"https://s3.{region}.amazonaws.com"),
            timeout=(CONFIG["connect_timeout"], CONFIG["read_timeout"]),
            max_pool_connections=CONFIG["max_pool_connections"],
        )

    def open(self, path: str, headers: dict[str, str]):
        """The body; None if the client must ask. Raises botocore's errors."""
        import botocore.auth
        import botocore.awsrequest
        import botocore.exceptions

        bucket, _, key = path.partition("/")
        if bucket in self._elsewhere or not _PLAIN_BUCKET.match(bucket):
            return None
        host = f"{self._endpoint}/{bucket}" if self._endpoint else f"https://{bucket}.s3.{self._region}.amazonaws.com"
        url = f"{host}/{quote(key, safe='/~')}"
        request = botocore.awsrequest.AWSRequest("GET", url, headers=headers, stream_output=True)
        # Frozen, because temporary credentials may be renewed by another thread in the middle.
        frozen = self._credentials.get_frozen_credentials()
        botocore.auth.S3SigV4Auth(frozen, "s3", self._region).add_auth(request)
        answer = self._http.send(request.prepare())
        if answer.status_code in (200, 206):
            return answer.raw
        about = _error_of(answer.content)
        if answer.status_code in (301, 307, 400):  # another region, another signature: the client knows the rules
            self._elsewhere.add(bucket)
            return None
        metadata = {"HTTPStatusCode": answer.status_code}
        raise botocore.exceptions.ClientError({"Error": about, "ResponseMetadata": metadata}, "GetObject")


# No dots (certificates do not cover them), no ARNs, no directory buckets.
_PLAIN_BUCKET = re.compile(r"^(?!.*--x-s3$)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$")
# Settings that change addresses in ways that only the client knows.
_RULES = ("AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")


def _reader(environment: tuple[tuple[str, str], ...]) -> _Reader | None:
    """A reader for these AWS_ variables; None where the client has to read."""
    with _making:
        return _made_reader(environment)


@functools.lru_cache(maxsize=4)
def _made_reader(environment: tuple[tuple[str, str], ...]) -> _Reader | None:
    import botocore.session

    session = botocore.session.Session()
    credentials = session.get_credentials()
    variables = dict(environment)
    profile = session.get_scoped_config()
    if credentials is None or any(name in variables for name in _RULES) or {"services", "s3"} & profile.keys():
        return None
    endpoint = variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL") or profile.get("endpoint_url")
    region = session.get_config_variable("region")
    if endpoint:
        return _Reader(session, credentials, region or "us-east-1", endpoint.rstrip("/"))
    # Other partitions (China, government) have other domains.
    plain = region and re.match(r"^[a-z]{2}-[a-z]+-\d+$", region) and not region.startswith("cn-")
    return _Reader(session, credentials, region, None) if plain else None


def _error_of(content: bytes) -> dict[str, str]:
    """Code and message of an S3 error."""
    try:
        root = ElementTree.fromstring(content)
        return {"Code": root.findtext("Code") or "", "Message": root.findtext("Message") or ""}
    except ElementTree.ParseError:
        return {"Code": "", "Message": content[:200].decode(errors="replace")}
