"""Errors of storage libraries: which of them are worth another try, and what they mean to the user."""

import os
import re
from collections.abc import Iterator

from core.errors import ObjectExists, ObjectNotFound, StorageError

# The Hub counts requests in windows of five minutes.
MAX_WAIT_SECONDS = 300.0


class ShortRead(OSError):
    """Fewer bytes than asked for: a truncated body, or an object that is shorter than thought."""


_TRANSIENT_CODES = set(
    "500 502 503 504 429 SlowDown InternalError ServiceUnavailable RequestTimeout Throttling ThrottlingException "
    "TooManyRequests IncompleteBody OperationAborted ConditionalRequestConflict".split()
)
# By name, so that no HTTP library has to be imported to know its errors.
_TRANSIENT_NAMES = set(
    "EndpointConnectionError ConnectTimeoutError ReadTimeoutError ConnectionClosedError ResponseStreamingError "
    "HTTPClientError IncompleteReadError IncompleteRead ClientPayloadError ServerDisconnectedError "
    "ClientConnectorError ClientOSError ClientConnectionError Timeout ChunkedEncodingError ReadTimeout "
    "ConnectTimeout ReadError RemoteProtocolError ConnectError FSTimeoutError".split()
)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _status(error: BaseException) -> tuple[str, ...]:
    """Error code and HTTP status of a library error, as strings; empty when it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = str(response.get("Error", {}).get("Code", ""))
        return code, str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    status = getattr(response, "status_code", None) or getattr(error, "status", None)
    return (str(status),) if isinstance(status, int) else ()


def is_transient(error: BaseException) -> bool:
    """Whether trying again can help: resets, time-outs, 429, 5xx, short bodies; not 403, 404 or a full disk."""
    if isinstance(
        error, FileNotFoundError | FileExistsError | PermissionError | IsADirectoryError | NotADirectoryError
    ):
        return False
    for link in _chain(error):
        codes = _status(link)
        if codes:
            return any(code in _TRANSIENT_CODES for code in codes)
        if isinstance(link, ShortRead | ConnectionError | TimeoutError):
            return True
        if any(kind.__name__ in _TRANSIENT_NAMES for kind in type(link).__mro__):
            return True
    return False


def is_conflict(error: BaseException) -> bool:
    if isinstance(error, FileExistsError):
        return True
    return any(code in ("PreconditionFailed", "412") for link in _chain(error) for code in _status(link))


def retry_after_seconds(error: BaseException) -> float:
    """Seconds that the server asked us to wait, at most MAX_WAIT_SECONDS; 0 when it did not."""
    for link in _chain(error):
        headers = getattr(getattr(link, "response", None), "headers", None)
        if headers and str(headers.get("Retry-After", "")).isdigit():
            return min(float(headers["Retry-After"]), MAX_WAIT_SECONDS)
        # The Hugging Face Hub's form: `"api";r=0;t=55`, nothing left for 55 seconds.
        window = re.search(r"\br=0;\s*t=(\d+)", str(headers.get("RateLimit", ""))) if headers else None
        if window:
            return min(float(window.group(1)), MAX_WAIT_SECONDS)
    return 0.0


def endpoint_of(uri: str) -> str:
    if uri.startswith("s3://"):
        return f"the endpoint ({os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL') or 'AWS'})"
    return "the server"


def brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # Signed URLs carry credentials in their query.
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?…", text)
    return text if len(text) <= 160 else text[:157] + "..."


def translated(verb: str, uri: str, error: Exception) -> Exception:
    codes = {code for link in _chain(error) for code in _status(link)}
    names = {type(link).__name__ for link in _chain(error)}
    text = " ".join(str(link) for link in _chain(error))
    bucket = uri.split("://", 1)[-1].split("/", 1)[0]
    if is_conflict(error):
        return ObjectExists(f"{uri}: exists already; nothing was overwritten")
    if "NoCredentialsError" in names or "PartialCredentialsError" in names or "Unable to locate credentials" in text:
        return StorageError(
            f"{uri}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (see .env.example)"
        )
    if codes & {"NoSuchBucket"} or ("bucket does not exist" in text.lower()):
        return StorageError(
            f"{uri}: bucket {bucket!r} does not exist; create it (`aws s3 mb s3://{bucket}`) or correct the URL"
        )
    if codes & {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}:
        return StorageError(
            f"{uri}: the credentials were refused ({brief(error)}); "
            "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
        )
    if isinstance(error, PermissionError) or codes & {"AccessDenied", "403", "401", "Forbidden"}:
        what = "that the key may read and write this bucket"
        if "://" not in uri:
            what = "file permissions"
        elif uri.startswith("hf://"):
            what = "the name of the repository, and HF_TOKEN if it is private or gated"
        return StorageError(f"{uri}: may not {verb} ({brief(error)}); check {what}")
    if isinstance(error, FileNotFoundError) or codes & {"NoSuchKey", "404"}:
        return ObjectNotFound(f"{uri}: not found; check the URL")
    if isinstance(error, OSError) and error.errno == 28:
        return StorageError(f"{uri}: could not {verb}: the disk is full; free space or choose another folder")
    return StorageError(f"{uri}: could not {verb}: {brief(error)}; check the URL and {endpoint_of(uri)}")
