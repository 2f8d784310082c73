"""Asks a container registry for the platforms of an image (OCI distribution API), without docker.

platforms("ghcr.io/me/pretrain-launcher:1.0-train")    {"linux/amd64", "linux/arm64"}
"""

import json
import re
import urllib.error
import urllib.parse
import urllib.request

from core import web
from core.errors import ConfigError

ACCEPTED = ", ".join(
    f"application/vnd.{kind}+json"
    for kind in (
        "oci.image.index.v1",
        "oci.image.manifest.v1",
        "docker.distribution.manifest.list.v2",
        "docker.distribution.manifest.v2",
    )
)
SECONDS = 20.0


def platforms(reference: str) -> set[str]:
    """Platforms of a public image, such as linux/amd64. Raises ConfigError if the registry does not show the image."""
    host, repository, tag = split(reference)
    base = f"{'http' if host.startswith(('127.0.0.1', 'localhost')) else 'https'}://{host}/v2/{repository}"
    try:
        document = _get(f"{base}/manifests/{tag}")
        if "manifests" in document:
            entries = [entry["platform"] for entry in document["manifests"]]
        else:
            entries = [_get(f"{base}/blobs/{document['config']['digest']}")]
    except urllib.error.HTTPError as error:
        raise ConfigError(
            f"IMAGE: {reference} cannot be read from {host} (HTTP {error.code}); push it with `make image`, make it "
            "public, or leave IMAGE empty to build on the node"
        ) from error
    except OSError as error:
        raise ConfigError(f"IMAGE: {host} does not answer ({error}); check the name {reference}") from error
    return {f"{entry['os']}/{entry['architecture']}" for entry in entries if entry["os"] != "unknown"}


def split(reference: str) -> tuple[str, str, str]:
    """The host of the registry, the repository, and the tag or digest. Missing parts have Docker Hub's defaults."""
    name, _, digest = reference.partition("@")
    head, slash, tail = name.rpartition("/")
    tail, _, tag = tail.partition(":")
    host, _, rest = f"{head}{slash}{tail}".partition("/")
    if not rest or not re.search(r"[.:]|^localhost$", host):
        host, rest = "registry-1.docker.io", name.partition(":")[0] if slash else f"library/{tail}"
    return host, rest, digest or tag or "latest"


def _get(url: str) -> dict:
    request = urllib.request.Request(url, headers={"Accept": ACCEPTED})
    try:
        return json.loads(web.fetch(request, SECONDS)[1])
    except urllib.error.HTTPError as error:
        challenge = error.headers.get("WWW-Authenticate", "")
        if error.code != 401 or not challenge.startswith("Bearer "):
            raise
        # Even a public image needs a token, which the registry gives without credentials.
        fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        query = urllib.parse.urlencode({k: fields[k] for k in ("service", "scope") if k in fields})
        token = json.loads(web.fetch(f"{fields['realm']}?{query}", SECONDS)[1])["token"]
        request.add_header("Authorization", f"Bearer {token}")
        return json.loads(web.fetch(request, SECONDS)[1])
