"""S3 objects by botocore's own client: whole, by range, in parts; and what there is.

core.storage is the way in; this is its transport. Measured 0.25 CPU-seconds per GB up and 0.4 down, where s3fs takes
3.3 up, 0.6 for a range and 2.7 for a whole object, and half a second to import and to open; s3fs remains for file
objects. A `path` is "bucket/key". Errors are botocore's; retries and their translation are the caller's.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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


def get(path: str, **options: str) -> bytes:
    """The object, or what `options` (Range) ask of it."""
    return _client(_variables()).get_object(**_target(path), **options)["Body"].read()


def chunks(path: str, size: int) -> Iterator[bytes]:
    """The object in pieces of at most `size` bytes."""
    yield from _client(_variables()).get_object(**_target(path))["Body"].iter_chunks(size)


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
