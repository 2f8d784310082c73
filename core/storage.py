"""Objects by URI: local paths, memory://, s3:// (AWS, Cloudflare R2, any endpoint), gs:// and hf:// (read only).

One small set of functions over fsspec. Objects are whole and immutable to a reader: a write is visible only
when it is complete. Transient faults are retried with exponential backoff and jitter; anything else fails at
once with the URI and the remedy. Credentials come from the environment alone (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, HF_TOKEN, ...) and never appear in a message.

    storage.write_bytes("s3://bucket/a.json", b"{}")
    storage.read_range("s3://bucket/shard.bin", 0, 1024)
    [o.uri for o in storage.list_objects("s3://bucket/run/checkpoints")]
"""

import functools
import hashlib
import logging
import os
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import fsspec
from fsspec.utils import glob_translate

from core import faults, files, hub, s3, urls
from core.errors import ObjectDamaged, ObjectNotFound, StorageError

log = logging.getLogger(__name__)
T = TypeVar("T")

READ_ONLY_SCHEMES = ("hf",)
COPY_CHUNK_BYTES = 8 << 20
# One connection to S3 carries 80 to 100 MB/s.
READ_PART_BYTES = 16 << 20
READ_PARTS_AT_ONCE = 8

# About 45 s of patience in all: longer than S3's SlowDown episodes, shorter than a preemption notice.
ATTEMPTS = 7
BACKOFF_SECONDS = 0.25
BACKOFF_CAP_SECONDS = 15.0

_s3_options_lock = threading.Lock()


@dataclass(frozen=True)
class ObjectInfo:
    """One stored object: its URI, its size in bytes and, where the store tells, its modification time (unix s)."""

    uri: str
    size: int
    modified: float | None = None

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]


def scheme_of(uri: str) -> str:
    """`s3` for s3://bucket/key, `file` for a plain path. Raises StorageError for another spelling (`core.urls`)."""
    if problem := urls.mistake(uri):
        raise StorageError(f"{uri}: {problem}")
    scheme, separator, _ = uri.partition("://")
    return scheme if separator and scheme in urls.SCHEMES else "file"


def is_local(uri: str) -> bool:
    return scheme_of(uri) == "file"


def local_path(uri: str) -> Path:
    """The path behind a local URI (file:// or plain)."""
    return Path(uri.removeprefix("file://")).expanduser()


def join(uri: str, *parts: str) -> str:
    """Append path parts to a URI, with single slashes between them."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises ObjectNotFound, StorageError."""

    def read() -> bytes:
        if is_local(uri):
            return local_path(uri).read_bytes()
        return s3.get(_key(uri)) if scheme_of(uri) == "s3" else _fs(uri).cat_file(_key(uri))

    return _retrying("read", uri, read)


def read_range(uri: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of an object; exactly end - start of them, or StorageError."""
    if not 0 <= start <= end:
        raise ValueError(f"bad byte range [{start}, {end})")
    if start == end:
        return b""

    def read() -> bytes:
        if is_local(uri):
            with local_path(uri).open("rb") as file:
                file.seek(start)
                data = file.read(end - start)
        elif scheme_of(uri) == "hf":
            data = hub.read_range(uri, start, end)
        elif scheme_of(uri) == "s3":
            data = s3.get(_key(uri), f"bytes={start}-{end - 1}")
        else:
            data = _fs(uri).cat_file(_key(uri), start=start, end=end)
        if len(data) != end - start:
            raise faults.ShortRead(f"got {len(data)} of {end - start} bytes")
        return data

    return _retrying("read", uri, read)


def read_into(uri: str, buffer: memoryview) -> Iterator[memoryview]:
    """Fill `buffer` with the first bytes of an object, by ranges side by side; yields it part by part, in order."""
    parts = [buffer[start : start + READ_PART_BYTES] for start in range(0, len(buffer), READ_PART_BYTES)]

    def fill(number: int) -> None:
        start = number * READ_PART_BYTES
        parts[number][:] = read_range(uri, start, start + len(parts[number]))

    with ThreadPoolExecutor(READ_PARTS_AT_ONCE, thread_name_prefix="part reader") as pool:
        for part, _ in zip(parts, pool.map(fill, range(len(parts))), strict=True):
            yield part


def download(
    uri: str, path: str | os.PathLike, expected_sha256: str | None = None, *, survives_crash: bool = True
) -> int:
    """Copy an object into a local file, which appears only when complete. Returns its bytes.

    Without `survives_crash` the file is not flushed to the disk, so that after a power cut its name may stand for
    less than its content. Raises ObjectDamaged when `expected_sha256` is given and the content differs.
    """
    path = Path(path)

    def copy() -> int:
        digest = hashlib.sha256()
        size = 0
        with files.replacing(path, flush=survives_crash) as target:
            for chunk in _chunks(uri):
                target.write(chunk)
                size += len(chunk)
                if expected_sha256:
                    digest.update(chunk)
            if expected_sha256 and digest.hexdigest() != expected_sha256:
                raise ObjectDamaged(
                    f"{uri}: checksum is {digest.hexdigest()[:12]}…, expected {expected_sha256[:12]}…; "
                    "the object is damaged: write it again from its source"
                )
        return size

    return _retrying("download", uri, copy)


def write_bytes(uri: str, data: bytes | bytearray | memoryview, *, exclusive: bool = False) -> None:
    """Store an object whole: readers see the old one or the new one, never a part.

    With `exclusive`, raises ObjectExists if there is one already (If-None-Match on S3, a hard link locally);
    of several racing writers exactly one wins.
    """
    _writable(uri)

    def write() -> None:
        if is_local(uri):
            with files.replacing(local_path(uri), exclusive=exclusive) as file:
                file.write(data)
            return
        if scheme_of(uri) == "s3":
            s3.put(_key(uri), data, exclusive, functools.partial(_retrying, "write", uri))
            return
        fs = _fs(uri)
        if exclusive and fs.exists(_key(uri)):
            raise FileExistsError(uri)
        fs.pipe_file(_key(uri), data)

    attempt = 0

    def write_once_more() -> None:
        # An exclusive PUT whose answer was lost has happened: the retry then meets its own object.
        nonlocal attempt
        attempt += 1
        try:
            write()
        except Exception as error:
            if exclusive and attempt > 1 and faults.is_conflict(error) and read_bytes(uri) == bytes(data):
                return
            raise

    _retrying("write", uri, write_once_more)


def write_file(uri: str, path: str | os.PathLike) -> int:
    """Store a local file as an object, whole or not at all. Returns its bytes."""
    _writable(uri)
    path = Path(path)

    def write() -> int:
        size = path.stat().st_size
        if is_local(uri):
            with files.replacing(local_path(uri)) as target, path.open("rb") as source:
                shutil.copyfileobj(source, target, COPY_CHUNK_BYTES)
        else:
            _fs(uri).put_file(str(path), _key(uri))
        return size

    return _retrying("write", uri, write)


def open_read(uri: str) -> BinaryIO:
    """A seekable binary file over an object, for readers that want one (parquet)."""
    return _retrying(
        "open", uri, lambda: local_path(uri).open("rb") if is_local(uri) else _fs(uri).open(_key(uri), "rb")
    )


def size_of(uri: str) -> int:
    """Size in bytes. Raises ObjectNotFound, for a folder too."""

    def size() -> int:
        if is_local(uri):
            path = local_path(uri)
            if path.is_dir():
                raise FileNotFoundError(uri)
            return path.stat().st_size
        if scheme_of(uri) == "s3":
            return s3.size(_key(uri))
        info = _fs(uri).info(_key(uri))
        if info["type"] != "file":
            raise FileNotFoundError(uri)
        return int(info["size"])

    return _retrying("stat", uri, size)


def exists(uri: str) -> bool:
    """Whether there is an object at this URI (a folder is none)."""
    try:
        size_of(uri)
    except ObjectNotFound:
        return False
    return True


def list_objects(prefix: str) -> list[ObjectInfo]:
    """All objects below a folder, at any depth, sorted by URI. An absent folder lists as empty.

    A missing bucket is not an absent folder: it raises StorageError, and so does a local link to nothing in its place.
    Local links are followed, each folder once (`core.files.below`).
    """

    def find() -> list[ObjectInfo]:
        if is_local(prefix):
            root = local_path(prefix)
            return [
                ObjectInfo(join(prefix, str(path.relative_to(root))), stat.st_size, stat.st_mtime)
                for path, stat in files.below(root)
            ]
        if scheme_of(prefix) == "s3":
            return _list_s3(prefix.rstrip("/") + "/")
        fs = _fs(prefix)
        scheme = prefix.split("://", 1)[0]
        found = fs.find(_key(prefix.rstrip("/") + "/"), detail=True)
        if not found:
            _check_bucket(prefix)
        return [
            ObjectInfo(f"{scheme}://{key.lstrip('/')}", int(info["size"]), _modified(info))
            for key, info in found.items()
            if info["type"] == "file"
        ]

    return sorted(_retrying("list", prefix, find), key=lambda info: info.uri)


def list_names(prefix: str) -> list[str]:
    """Names one level below a folder: objects and sub-folders, sorted. An absent folder lists as empty."""

    def names() -> list[str]:
        if is_local(prefix):
            return files.names(local_path(prefix))
        if scheme_of(prefix) == "s3":
            return list(s3.names(_key(prefix)))
        fs = _fs(prefix)
        try:
            entries = fs.ls(_key(prefix), detail=False)
        except FileNotFoundError:
            _check_bucket(prefix)
            return []
        return [entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries]

    return sorted(_retrying("list", prefix, names))


def expand(pattern: str) -> list[str]:
    """URIs that match a glob pattern (`*`, `?`, `[...]`, `**`), sorted; a pattern without them is itself."""
    return [info.uri for info in expand_objects(pattern)] if is_pattern(pattern) else [pattern]


def expand_objects(pattern: str) -> list[ObjectInfo]:
    """As `expand`, with sizes, by as few requests as the store allows. Raises ObjectNotFound without wildcards."""
    if not is_pattern(pattern):
        return [ObjectInfo(pattern, size_of(pattern), None)]
    if is_local(pattern):
        found = _retrying("list", pattern, lambda: files.matching(local_path(pattern)))
        return sorted((ObjectInfo(str(path), stat.st_size, None) for path, stat in found), key=lambda info: info.uri)
    if scheme_of(pattern) == "s3":
        matches = re.compile(glob_translate(pattern)).match
        literal = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        found = _retrying("list", pattern, lambda: _list_s3(literal))
        return sorted((info for info in found if matches(info.uri)), key=lambda info: info.uri)
    scheme = pattern.split("://", 1)[0]
    infos = _retrying("list", pattern, lambda: _fs(pattern).glob(_key(pattern), detail=True))
    return sorted(
        (
            ObjectInfo(f"{scheme}://{key.lstrip('/')}", int(info["size"]), _modified(info))
            for key, info in infos.items()
            if info["type"] == "file"
        ),
        key=lambda info: info.uri,
    )


def pinned(uri: str) -> str:
    """An hf:// URI at the commit that its branch or tag stands for now; any other URI as it is."""
    if scheme_of(uri) != "hf":
        return uri
    return hub.parse(uri).at(_retrying("read", uri, lambda: hub.commit_of(uri)))


def link_to_nothing(uri: str) -> str | None:
    """Where a local link points to if nothing is there; None for any other object, and for one that is not there."""
    if not is_local(uri):
        return None
    path = local_path(uri)
    return os.readlink(path) if files.link_to_nothing(path) == path else None


def is_pattern(uri: str) -> bool:
    return bool(re.search(r"[*?\[]", uri))


def delete(uri: str) -> None:
    """Remove one object; it may be gone already."""
    _writable(uri)

    def remove() -> None:
        try:
            if is_local(uri):
                local_path(uri).unlink()
            elif scheme_of(uri) == "s3":
                s3.delete(_key(uri))
            else:
                _fs(uri).rm_file(_key(uri))
        except FileNotFoundError:
            pass

    _retrying("delete", uri, remove)


# --- the file systems ------------------------------------------------------------------------------------------


def _fs(uri: str) -> fsspec.AbstractFileSystem:
    scheme = scheme_of(uri)
    if scheme == "s3":
        return _s3()
    try:
        options = {"use_listings_cache": False} if scheme == "hf" else {}
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = {"gs": "gcsfs", "hf": "huggingface-hub"}.get(scheme, scheme)
        raise StorageError(f"{uri}: {scheme}:// needs the package {package}; run `pip install {package}`") from error


def _s3() -> fsspec.AbstractFileSystem:
    import s3fs

    with _s3_options_lock:
        # Listings are never cached, because other machines write to the same prefix.
        fs = s3fs.S3FileSystem(use_listings_cache=False, config_kwargs=s3.CONFIG)
        fs.retries = 1
        return fs


def _list_s3(prefix: str) -> list[ObjectInfo]:
    """Objects whose URI begins so. A key that ends in a slash is a folder that some tool has marked."""
    bucket = _key(prefix).split("/", 1)[0]
    return [
        ObjectInfo(f"s3://{bucket}/{each['Key']}", each["Size"], each["LastModified"].timestamp())
        for each in s3.objects(_key(prefix))
        if not each["Key"].endswith("/")
    ]


def _chunks(uri: str) -> Iterator[bytes]:
    """The content of an object, piece by piece."""
    if scheme_of(uri) == "s3":
        yield from s3.chunks(_key(uri), COPY_CHUNK_BYTES)
        return
    with open_read(uri) as source:
        while chunk := source.read(COPY_CHUNK_BYTES):
            yield chunk


def _key(uri: str) -> str:
    """The path that fsspec wants, without the scheme."""
    return uri.split("://", 1)[1] if scheme_of(uri) != "memory" else "/" + uri.split("://", 1)[1].lstrip("/")


def _writable(uri: str) -> None:
    if scheme_of(uri) in READ_ONLY_SCHEMES:
        raise StorageError(f"{uri}: {scheme_of(uri)}:// is read only here; write to a local path, s3:// or gs://")


def _check_bucket(uri: str) -> None:
    """Raise FileNotFoundError if the bucket itself is missing (an empty prefix is fine)."""
    if scheme_of(uri) == "gs":
        bucket = _key(uri).split("/", 1)[0]
        # Listing (not HEAD) also works for keys that may only list: least privilege.
        _fs(uri).ls(bucket, detail=False, refresh=True)


def _modified(info: dict) -> float | None:
    stamp = info.get("LastModified") or info.get("mtime") or info.get("created") or info.get("updated")
    return stamp.timestamp() if hasattr(stamp, "timestamp") else None


# --- retries ---------------------------------------------------------------------------------------------------


def _retrying(verb: str, uri: str, call: Callable[[], T]) -> T:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except StorageError:
            raise
        except Exception as error:
            if not faults.is_transient(error):
                raise faults.translated(verb, uri, error) from error
            if attempt == ATTEMPTS:
                raise StorageError(
                    f"{uri}: could not {verb} after {ATTEMPTS} attempts ({faults.brief(error)}); "
                    f"check the network and {faults.endpoint_of(uri)}, then run the same command again"
                ) from error
            pause = min(BACKOFF_CAP_SECONDS, BACKOFF_SECONDS * 2 ** (attempt - 1)) * random.uniform(0.7, 1.3)
            pause = max(pause, faults.retry_after_seconds(error))
            log.warning(
                "%s: %s failed (%s), attempt %d of %d, again in %.1f s",
                uri,
                verb,
                faults.brief(error),
                attempt,
                ATTEMPTS,
                pause,
            )
            time.sleep(pause)
    raise AssertionError("unreachable")
