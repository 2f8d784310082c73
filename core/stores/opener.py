"""Opens the store behind a URI, once per process, bucket and set of credentials.

    store, key = opener.open_store("s3://bucket/runs/first/run.json")    # key is runs/first/run.json

No other module chooses a store by the scheme of a URI.
"""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core import urls
from core.errors import StorageError
from core.stores import credentials
from core.stores.base import Store, Terms
from core.stores.hub import HubStore
from core.stores.local import LocalStore

# These variables determine the server and the credentials of a store. If one of them changes, the store is opened
# again.
_BUNDLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
_VARIABLES = ("BUCKET_", "AWS_", "GOOGLE_", "AZURE_", "HOME", *_BUNDLES)
_KEPT = 16

_lock = threading.Lock()
_opened: dict[tuple, Store] = {}


def scheme_of(uri: str) -> str:
    """The scheme of a URI: `s3` for s3://bucket/key, `file` for a plain path.

    Raises StorageError for a misspelt URI (`core.urls`).
    """
    if problem := urls.mistake(uri):
        raise StorageError(f"{uri}: {problem}")
    scheme, separator, _ = uri.partition("://")
    return scheme if separator and scheme in urls.SCHEMES else "file"


def open_store(uri: str) -> tuple[Store, str]:
    """The store that holds `uri`, and the object's key in it. Raises StorageError, ConfigError."""
    depth, make = _STORES[scheme_of(uri)]
    if depth is None:
        return make(), uri
    parts = uri.split("://", 1)[1].lstrip("/" if not depth else "").split("/")
    bucket, key = "/".join(parts[:depth]), "/".join(parts[depth:])
    # `os.environ.items()` would look up the value of every variable, which took a fifth of a small request.
    variables = tuple((name, os.environ[name]) for name in os.environ if name.startswith(_VARIABLES))
    known = (make, bucket, variables)
    with _lock:  # without the lock, each of the first threads would open a store
        store = _opened.get(known)
        if store is None:
            if len(_opened) >= _KEPT:
                _opened.pop(next(iter(_opened)))
            store = _opened[known] = make(bucket, {name: value for name, value in variables if value})
    return store, key


def _client_options(variables: Mapping[str, str], endpoint: str | None) -> dict[str, Any]:
    if endpoint and endpoint.startswith("http://"):
        return {"allow_http": True}
    name = next((name for name in _BUNDLES if variables.get(name)), None)
    if not name:
        return {}
    try:
        return {"root_certificate": Path(variables[name]).read_bytes()}
    except OSError as error:
        raise StorageError(f"{name} is {variables[name]!r}, which cannot be read ({error.strerror})") from None


def _s3(bucket: str, variables: Mapping[str, str]) -> Store:
    from obstore.store import S3Store

    from core.stores import aws
    from core.stores.remote import RemoteStore

    profile = {} if variables.get("BUCKET_ACCESS_KEY_ID") else credentials.profile_settings(variables)
    place = aws.place_of(bucket, variables, profile)

    def make(client: dict[str, Any], retry: dict[str, Any]) -> Any:
        options = _client_options(variables, place.endpoint) | client
        provider = credentials.for_s3(variables)
        extra = {"credential_provider": provider} if provider else {}
        return S3Store(bucket, config=place.settings(variables), client_options=options, retry_config=retry, **extra)

    return RemoteStore(place.terms(bucket), make, place.renew)


def _google(bucket: str, variables: Mapping[str, str]) -> Store:
    from obstore.store import GCSStore

    from core.stores.remote import RemoteStore

    endpoint = variables.get("BUCKET_ENDPOINT_URL")
    settings = credentials.for_google(variables) | ({"base_url": endpoint} if endpoint else {})
    terms = Terms(
        "google",
        bucket,
        f"the endpoint ({endpoint or 'Google Cloud Storage'})",
        f"create it (`gcloud storage buckets create gs://{bucket}`)",
        "BUCKET_GOOGLE_KEY, or run `gcloud auth application-default login`",
    )

    def make(client: dict[str, Any], retry: dict[str, Any]) -> Any:
        options = _client_options(variables, endpoint) | client
        return GCSStore(bucket, config=settings, client_options=options, retry_config=retry)

    return RemoteStore(terms, make)


def _azure(place: str, variables: Mapping[str, str]) -> Store:
    from obstore.store import AzureStore

    from core.stores.remote import RemoteStore

    account, _, container = place.partition("/")
    endpoint = variables.get("BUCKET_ENDPOINT_URL")
    settings = {"account_name": account, "container_name": container} | credentials.for_azure(variables)
    settings |= {"endpoint": endpoint} if endpoint else {}
    terms = Terms(
        "azure",
        place,
        f"the endpoint ({endpoint or f'{account}.blob.core.windows.net'})",
        f"create it (`az storage container create --account-name {account} --name {container}`)",
        "BUCKET_AZURE_KEY, or run `az login`",
    )

    def make(client: dict[str, Any], retry: dict[str, Any]) -> Any:
        options = _client_options(variables, endpoint) | client
        return AzureStore(config=settings, client_options=options, retry_config=retry)

    return RemoteStore(terms, make)


def _memory(bucket: str, variables: Mapping[str, str]) -> Store:
    from core.stores.remote import in_memory

    return in_memory()


# For each scheme: the number of path parts that name the bucket, and the store's constructor. If the number is None,
# the keys are whole URIs.
_STORES: dict[str, tuple[int | None, Callable[..., Store]]] = {
    "file": (None, LocalStore),
    "hf": (None, HubStore),
    "memory": (0, _memory),
    "s3": (1, _s3),
    "gs": (1, _google),
    "az": (2, _azure),
}
