"""Finds the credentials of a bucket: in the BUCKET_ variables, else in the places that the store's own tools use.

For S3, these places are the environment (AWS_ACCESS_KEY_ID, ...), a profile or SSO login of ~/.aws if boto3 is
installed, and the machine's role. The first one with keys is used. A profile is read again before its keys expire,
because other programs renew the keys. For Google and Azure, obstore itself looks for credentials: application default
credentials (GOOGLE_APPLICATION_CREDENTIALS), the login of the Azure CLI, the machine's identity.
"""

import datetime
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from core.errors import ConfigError

# Seconds after which a profile is read again, because another program may have renewed the keys in its file.
PROFILE_SECONDS = 600.0
NO_PROFILES = "profiles of ~/.aws need boto3 (`pip install boto3`)"
_AWS_FILES = {"AWS_CONFIG_FILE": "~/.aws/config", "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials"}
_AWS_ROLES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_AZURE = ("ACCOUNT_KEY", "ACCESS_KEY", "MASTER_KEY", "SAS_KEY", "SAS_TOKEN", "TOKEN", "CLIENT_ID")

Provider = Callable[[], dict[str, Any]]


class NoCredentials(Exception):
    """No credentials were found."""


def for_s3(variables: Mapping[str, str]) -> Provider | None:
    """Returns a function that returns keys, or None if obstore itself finds the keys of the machine's role.

    Raises ConfigError if only one of a key and its secret is set.
    """
    for key, secret, token in (
        ("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY", "BUCKET_SESSION_TOKEN"),
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    ):
        given = [name for name in (key, secret) if variables.get(name)]
        if len(given) == 1:
            missing = next(name for name in (key, secret) if name not in given)
            raise ConfigError(f"{missing} is empty, its partner is set; set both or none")
        if given:
            return _fixed(variables[key], variables[secret], variables.get(token) or None)
    if any(variables.get(name) for name in _AWS_ROLES):
        return None
    if has_profile(variables) and importlib.util.find_spec("boto3"):
        return _profile
    if variables.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true" or variables.get("AWS_PROFILE"):
        return _nothing(NO_PROFILES if has_profile(variables) else "")
    return None


def has_profile(variables: Mapping[str, str]) -> bool:
    files = [Path(variables.get(name) or default).expanduser() for name, default in _AWS_FILES.items()]
    return bool(variables.get("AWS_PROFILE")) or any(file.is_file() for file in files)


def profile_settings(variables: Mapping[str, str]) -> Mapping[str, str]:
    """`region` and `endpoint_url` of the AWS profile in use. The result is empty if there is no profile."""
    if not has_profile(variables) or not importlib.util.find_spec("boto3"):
        return {}
    import botocore.session

    session = botocore.session.Session()
    profile = session.get_scoped_config()
    found = {"region": session.get_config_variable("region"), "endpoint_url": profile.get("endpoint_url")}
    return {name: value for name, value in found.items() if value}


def for_google(variables: Mapping[str, str]) -> dict[str, str]:
    """obstore's settings for a Google bucket. Raises ConfigError."""
    key = variables.get("BUCKET_GOOGLE_KEY", "").strip()
    if not key:
        return {}
    document = _google_document(key)
    if document.get("type") == "authorized_user":
        if key.startswith("{"):
            raise ConfigError("BUCKET_GOOGLE_KEY holds a user's login; give its path, or the key of a service account")
        return {"application_credentials": str(Path(key).expanduser())}
    return {"service_account_key": json.dumps(document)}


def _google_document(key: str) -> dict[str, Any]:
    try:
        text = key if key.startswith("{") else Path(key).expanduser().read_text(encoding="utf-8")
        document = json.loads(text)
    except OSError as error:
        raise ConfigError(
            f"BUCKET_GOOGLE_KEY: the file cannot be read ({error.strerror}); give its path or its JSON"
        ) from None
    except ValueError:
        raise ConfigError("BUCKET_GOOGLE_KEY: is not valid JSON; download the service account's key again") from None
    if not isinstance(document, dict):
        raise ConfigError("BUCKET_GOOGLE_KEY: is not a key of Google's; download the service account's key again")
    return document


def for_azure(variables: Mapping[str, str]) -> dict[str, Any]:
    """obstore's settings for an Azure container: an account key or a shared access signature."""
    key = variables.get("BUCKET_AZURE_KEY", "").strip()
    if key:
        return {"sas_key": key.removeprefix("?")} if "sig=" in key else {"account_key": key}
    given = any(variables.get(f"AZURE_STORAGE_{name}") or variables.get(f"AZURE_{name}") for name in _AZURE)
    return {"use_azure_cli": True} if not given and shutil.which("az") else {}


def _fixed(key: str, secret: str, token: str | None) -> Provider:
    return lambda: {"access_key_id": key, "secret_access_key": secret, "token": token, "expires_at": None}


def _nothing(why: str) -> Provider:
    def provide() -> dict[str, Any]:
        raise NoCredentials(why)

    return provide


def _profile() -> dict[str, Any]:
    """The keys that boto3 finds. Each call makes a new session, because a session caches the keys of a file."""
    import boto3
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        provider = Boto3CredentialProvider(boto3.Session(), ttl=datetime.timedelta(seconds=PROFILE_SECONDS))
    except ValueError:
        raise NoCredentials("no profile of ~/.aws has keys") from None
    return provider()


def inline_google_key(environment: MutableMapping[str, str]) -> None:
    """Replace a path in BUCKET_GOOGLE_KEY by the file's content, for machines without the file. Raises ConfigError."""
    key = environment.get("BUCKET_GOOGLE_KEY", "").strip()
    if key and not key.startswith("{"):
        environment["BUCKET_GOOGLE_KEY"] = json.dumps(_google_document(key))
