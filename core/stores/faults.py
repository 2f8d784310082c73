"""Classifies errors of storage libraries: which ones to retry, and which message the user gets.

An error is classified by its marks: the names of its types, the server's error code, the HTTP status, and the kind of
connection failure that the library reports.
"""

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass

from core.errors import DiskFull, LauncherError, ObjectExists, ObjectNotFound, StorageError
from core.stores.base import Terms

# Longest pause in seconds that a server can ask for. The Hugging Face Hub counts requests in windows of five minutes.
MAX_WAIT_SECONDS = 300.0
# Shortest pause in seconds after a 429 or 503. obstore does not show how long the server asks to wait (Retry-After).
THROTTLED_SECONDS = 1.0


class ShortRead(OSError):
    """Fewer bytes than requested: a truncated body, or an object that is shorter than expected."""


class NoListing(Exception):
    """The server refuses both an object and the listing of its name; `__cause__` is the first refusal."""


class NoConditions(Exception):
    """The server does not support conditional writes; `__cause__` is its answer."""


class GaveUp(Exception):
    """A store has exhausted its own retries; `__cause__` is the last error."""

    def __init__(self, attempts: int):
        super().__init__()
        self.attempts = attempts


THROTTLED = frozenset(
    "429 503 SlowDown ServiceUnavailable Throttling ThrottlingException TooManyRequests ServerBusy".split()
)
TRANSIENT = THROTTLED | frozenset(
    # Codes of servers. NoSuchUpload means that the upload was completed but its answer was lost, or that the server
    # removed the upload.
    "500 502 504 408 InternalError RequestTimeout IncompleteBody OperationAborted ConditionalRequestConflict "
    "OperationTimedOut NoSuchUpload InvalidBlockList "
    # Types of errors, by name, so that no HTTP library has to be imported.
    "ShortRead ConnectionError TimeoutError Timeout ConnectTimeout ReadTimeout ReadError RemoteProtocolError "
    "ConnectError ChunkedEncodingError "
    # obstore's kinds of connection failures.
    "http:Connect http:Interrupted http:Timeout http:Request http:Decode".split()
)
_FINAL_TYPES = frozenset("FileExistsError PermissionError IsADirectoryError NotADirectoryError GaveUp".split())
REFUSED_KEYS = frozenset(
    "InvalidAccessKeyId SignatureDoesNotMatch InvalidToken AuthenticationFailed InvalidSecurity".split()
)
EXPIRED = frozenset("ExpiredToken InvalidToken TokenRefreshRequired UnauthenticatedError".split())
ELSEWHERE = frozenset("301 307 PermanentRedirect TemporaryRedirect AuthorizationHeaderMalformed redirect".split())


@dataclass(frozen=True)
class _Row:
    """A kind of error: the marks by which it is recognised, the exception to raise, and the text of its message."""

    marks: frozenset[str]
    kind: type[StorageError]
    text: str


def _row(marks: str, text: str, kind: type[StorageError] = StorageError) -> _Row:
    return _Row(frozenset(marks.split()), kind, text)


# The first matching row is used. A server's code says more than a library's type, so rows with codes come first.
_TABLE = (
    _row("NoSuchBucket ContainerNotFound", "bucket {bucket!r} does not exist; {create} or correct the URL"),
    _row(
        "RequestTimeTooSkewed",
        "could not {verb}: the clock of this machine is wrong ({said}); set it (`sudo timedatectl set-ntp true`)",
    ),
    _row("credentials", "no credentials; set {keys} (see .env.example){hint}"),
    _row(
        "certificate",
        "could not {verb}: the certificate of {endpoint} is not trusted ({said}); "
        "set REQUESTS_CA_BUNDLE to a file with the certificate of its authority",
    ),
    _Row(
        ELSEWHERE, StorageError, "could not {verb}: bucket {bucket!r} is in another region ({said}); set BUCKET_REGION"
    ),
    _row(
        "AlreadyExistsError FileExistsError PreconditionError 412 BlobAlreadyExists",
        "exists already; nothing was overwritten",
        ObjectExists,
    ),
    _row(
        "ExpiredToken TokenRefreshRequired",
        "the credentials were refused ({said}): they have expired; get new ones and set {keys}",
    ),
    _row(
        "NoListing",
        "may not {verb} ({said}), nor list bucket {bucket!r}; without the right s3:ListBucket the server gives this "
        "answer also for objects that do not exist: allow it (launch/bucket-policy.json), and check {access}",
    ),
    _row(
        "NoConditions",
        "could not {verb} ({said}): {endpoint} does not take conditional writes (If-None-Match), which keep two "
        "machines from creating the same object; use a newer release of that server, or another store",
    ),
    _row(
        "SecondLevelDomainForbidden",
        "could not {verb} ({said}); write the bucket into the endpoint: BUCKET_ENDPOINT_URL=https://{bucket}.HOST",
    ),
    _row(
        "no-ranges",
        "could not {verb}: {endpoint} ignores byte ranges (it answers 200 to Range); use a server or proxy that "
        "supports them",
    ),
    _Row(REFUSED_KEYS, StorageError, "the credentials were refused ({said}); check {keys}"),
    _row(
        "PermissionDeniedError UnauthenticatedError PermissionError AccessDenied 403 401",
        "may not {verb} ({said}); check {access}",
    ),
    _row("FileNotFoundError NoSuchKey BlobNotFound 404", "not found; check the URL", ObjectNotFound),
    _row("disk-full", "could not {verb}: the disk is full; free space or choose another folder", DiskFull),
    _row("path", "could not {verb}: object stores do not accept this name ({said}); rename it"),
)


def marks_of(error: BaseException) -> frozenset[str]:
    """Names of the types of an error and of its causes, and the codes in their messages."""
    found: set[str] = set()
    for link in _chain(error):
        found |= {kind.__name__ for kind in type(link).__mro__} | _codes(link)
    return frozenset(found)


def is_transient(marks: frozenset[str]) -> bool:
    """Whether a retry can succeed. It can after a reset, a time-out, 429, 5xx or a short body.

    It cannot after 403 or 404.
    """
    if marks & _FINAL_TYPES or marks & {"credentials", "certificate"}:
        return False
    if "FileNotFoundError" in marks:
        return "NoSuchUpload" in marks
    return bool(marks & TRANSIENT)


def is_conflict(marks: frozenset[str]) -> bool:
    return _fitting(marks) is not None and _fitting(marks).kind is ObjectExists


def wait_seconds(error: BaseException, marks: frozenset[str]) -> float:
    """The least number of seconds to wait before a retry, as the server asks, but at most MAX_WAIT_SECONDS."""
    for link in _chain(error):
        headers = getattr(getattr(link, "response", None), "headers", None)
        if headers and str(headers.get("Retry-After", "")).isdecimal():
            return min(float(headers["Retry-After"]), MAX_WAIT_SECONDS)
        # The Hugging Face Hub's format: `"api";r=0;t=55` means that no requests are left for 55 seconds.
        window = re.search(r"\br=0;\s*t=(\d+)", str(headers.get("RateLimit", ""))) if headers else None
        if window:
            return min(float(window.group(1)), MAX_WAIT_SECONDS)
    return THROTTLED_SECONDS if marks & THROTTLED else 0.0


def brief(error: BaseException) -> str:
    """An error as one line: status, code and message of a server's answer, without the request's signature."""
    text = str(error).partition("Debug source:")[0]
    answer = re.search(r"status code: (?P<status>[^:<]+)", text)
    if answer:
        parts = [re.search(rf"<{name}>([^<]*)</{name}>", text) for name in ("Code", "Message")]
        text = " ".join([answer["status"].strip(), *(part[1] for part in parts if part)])
    elif reason := _CERTIFICATE.search(str(error)):
        text = reason[1]
    elif kind := re.search(r"kind: (Connect|Timeout|Interrupted)\b", str(error)):
        cause = re.search(r'message: "([^"]*)"', str(error))
        words = {"Connect": "no connection", "Timeout": "no answer in time", "Interrupted": "the connection broke"}
        text = words[kind[1]] + (f": {cause[1]}" if cause else "")
    text = " ".join(text.split()) or type(error).__name__
    # Signed URLs carry credentials in their query.
    text = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1?…", text)
    return text if len(text) <= 160 else text[:157] + "..."


def translated(verb: str, uri: str, error: Exception, marks: frozenset[str], terms: Terms) -> LauncherError:
    row = _fitting(marks)
    said = brief(error.__cause__ if isinstance(error, NoListing | NoConditions) else error)
    if row is None:
        return StorageError(f"{uri}: could not {verb}: {said}; check the URL and {terms.endpoint}")
    hint = "" if "credentials" not in marks else _hint(error)
    words = {"verb": verb, "said": said, "hint": hint, **vars(terms)}
    return row.kind(f"{uri}: {row.text.format(**words)}")


def _fitting(marks: frozenset[str]) -> _Row | None:
    return next((row for row in _TABLE if row.marks & marks), None)


def _hint(error: BaseException) -> str:
    """The reason why core/stores/credentials.py found no keys, taken from obstore's error message."""
    found = next(filter(None, (_PROVIDER.search(str(link)) for link in _chain(error))), None)
    said = found["said"].strip() if found else ""
    return f"; {said}" if said else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


# Metadata services. Libraries ask them for credentials if they find no credentials elsewhere.
_METADATA = re.compile(r"https?://(169\.254\.169\.254|169\.254\.170\.\d+|metadata\.google\.internal|\[fd00:ec2::254\])")
# The innermost reason in an error of rustls, the TLS library of obstore.
_CERTIFICATE = re.compile(r"InvalidCertificate\([\s(]*(?:Other\(\s*OtherError\(\s*)?(\w+)")
# The region that the server expects, in the body of its refusal.
_REGION = re.compile(r"<Region>([\w-]+)</Region>|expecting (?:'|&apos;|&#39;)([\w-]+)")
_PROVIDER = re.compile(r"External \w+ credential provider: (?:NoCredentials: ?)?(?P<said>[^\n]*)")


def _codes(error: BaseException) -> set[str]:
    text = str(error)
    found = set(re.findall(r"non-2xx status code: (\d+)", text)) | set(re.findall(r"<Code>(\w+)</Code>", text))
    found |= {f"http:{kind}" for kind in re.findall(r"kind: (Connect|Interrupted|Timeout|Request|Decode)\b", text)}
    status = getattr(getattr(error, "response", None), "status_code", None)
    found |= {str(status)} if isinstance(status, int) else set()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        found.add("disk-full")
    if _PROVIDER.search(text) or _METADATA.search(text):
        found.add("credentials")
    if isinstance(error, ValueError) and "Could not parse path" in text:
        found.add("path")
    if _CERTIFICATE.search(text):
        found.add("certificate")
    if "redirect without LOCATION" in text:
        found.add("redirect")
    if "non-partial response when range requested" in text:
        found.add("no-ranges")
    if region := _REGION.search(text):
        found.add(f"region:{region[1] or region[2]}")
    return found
