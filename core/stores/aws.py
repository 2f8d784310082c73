"""Finds endpoint, region and address style of an S3 bucket from the variables BUCKET_* and AWS_*."""

import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from core import web
from core.stores import faults
from core.stores.base import Terms

log = logging.getLogger(__name__)
DEFAULT_REGION = "us-east-1"
# The first of these variables that is set gives the endpoint.
ENDPOINTS = ("BUCKET_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
SERVICES = ("aws", "r2", "s3-like")
REGIONS = ("BUCKET_REGION", "AWS_REGION", "AWS_DEFAULT_REGION")
LOOK_UP_SECONDS = 10.0


def endpoint_of(variables: Mapping[str, str], profile: Mapping[str, str] = {}) -> str | None:
    """The URL of the S3 server, or None for AWS's default."""
    for name in ENDPOINTS:
        if variables.get(name):
            return variables[name].rstrip("/")
    return profile.get("endpoint_url")


def service_of(endpoint: str | None) -> str:
    """The service at an endpoint: aws, r2 (Cloudflare), or s3-like for any other server."""
    host = urlsplit(endpoint or "").hostname or ""
    if not endpoint or host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return "aws"
    return "r2" if host.endswith(".r2.cloudflarestorage.com") else "s3-like"


def place_of(bucket: str, variables: Mapping[str, str], profile: Mapping[str, str]) -> "Place":
    named = next((variables[name] for name in REGIONS if variables.get(name)), None)
    return Place(bucket, endpoint_of(variables, profile), named or profile.get("region"))


class Place:
    """Endpoint and region of one bucket. `region` changes if the server says that the bucket is in another one."""

    def __init__(self, bucket: str, endpoint: str | None, region: str | None):
        self.bucket = bucket
        self.endpoint = endpoint
        self.region = region or DEFAULT_REGION

    def settings(self, variables: Mapping[str, str]) -> dict[str, Any]:
        """obstore's configuration, which takes precedence over the environment."""
        found: dict[str, Any] = {
            "region": self.region,
            "conditional_put": "etag",
            # To sign the body, it would have to be read once more. AWS's tools do not sign it over https either.
            "unsigned_payload": True,
            # Some servers do not accept lists of keys; this project deletes one object at a time.
            "disable_bulk_delete": True,
        }
        endpoint = self.endpoint or _special_endpoint(self.region, variables)
        if endpoint:
            # The endpoint may contain the bucket: https://bucket.s3.example.com
            named = (urlsplit(endpoint).hostname or "").startswith(f"{self.bucket}.")
            found |= {"endpoint": endpoint, "aws_endpoint_url_s3": endpoint}
            found |= {"virtual_hosted_style_request": True} if named else {}
        if metadata := variables.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
            found["metadata_endpoint"] = metadata.rstrip("/")
        return found

    def terms(self, bucket: str) -> Terms:
        endpoint = f" --endpoint-url {self.endpoint}" if self.endpoint else ""
        return Terms(
            service_of(self.endpoint),
            bucket,
            f"the endpoint ({self.endpoint or 'AWS'})",
            f"create it (`aws{endpoint} s3 mb s3://{bucket}`)",
            "BUCKET_ACCESS_KEY_ID and BUCKET_SECRET_ACCESS_KEY, BUCKET_SESSION_TOKEN if the keys are temporary",
        )

    def renew(self, marks: frozenset[str]) -> bool:
        """Change `region` if an error shows that the bucket is in another one. Returns whether it was changed."""
        if not marks & faults.ELSEWHERE:
            return False
        named = (mark.removeprefix("region:") for mark in marks if mark.startswith("region:"))
        found = next(named, None) or self.home()
        if not found or found == self.region:
            return False
        log.info("s3://%s is in %s, not in %s", self.bucket, found, self.region)
        self.region = found
        return True

    def home(self) -> str | None:
        """The bucket's region. The server returns it without credentials. None if the server does not answer."""
        import urllib.error  # imported here, because most programs never need this module
        import urllib.request

        address = f"{self.endpoint or 'https://s3.amazonaws.com'}/{quote(self.bucket)}"
        request = urllib.request.Request(address, method="HEAD")
        try:
            return web.fetch(request, LOOK_UP_SECONDS)[0]["x-amz-bucket-region"]
        except urllib.error.HTTPError as error:  # the region is in the headers of a refusal or a redirect, too
            return error.headers["x-amz-bucket-region"]
        except (OSError, ValueError):
            return None


def _special_endpoint(region: str, variables: Mapping[str, str]) -> str | None:
    """AWS's endpoint for FIPS, dual stack or China, or None for the usual one."""

    def is_set(name: str) -> bool:
        return variables.get(name, "").lower() == "true"

    china = region.startswith("cn-")
    fips, dual = is_set("AWS_USE_FIPS_ENDPOINT"), is_set("AWS_USE_DUALSTACK_ENDPOINT")
    if not (china or fips or dual):
        return None
    host = f"https://s3{'-fips' if fips else ''}{'.dualstack' if dual else ''}.{region}.amazonaws.com"
    return host + (".cn" if china else "")
