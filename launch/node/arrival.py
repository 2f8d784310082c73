"""Records in the bucket that this machine is paid for, before the node has an image with the project's programs.

    python3 -m launch.node.arrival begin 20261130T120000Z-setup-1a2b3c4d
    python3 -m launch.node.arrival end 20261130T120000Z-setup-1a2b3c4d        its set-up has failed

launch/node/container.sh calls this module on the first node. The cap counts this record unless a program of this
project has run on the machine (core/run/paid.py). This works only for buckets on S3. The module runs outside of the
container with the node's Python, so it uses only the standard library of Python 3.8.
"""

import json
import os
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

from core import bucket
from core.errors import ConfigError
from launch.node import switch

# The same names as in core/stores/aws.py. The node's Python may not be able to import that file.
ENDPOINTS = ("BUCKET_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
REGIONS = ("BUCKET_REGION", "AWS_REGION", "AWS_DEFAULT_REGION")
KEYS = {
    "AccessKeyId": "BUCKET_ACCESS_KEY_ID",
    "SecretAccessKey": "BUCKET_SECRET_ACCESS_KEY",
    "Token": "BUCKET_SESSION_TOKEN",
}


def main(arguments):
    if len(arguments) != 2 or arguments[0] not in ("begin", "end"):
        return "usage: python3 -m launch.node.arrival begin|end ATTEMPT"
    what, attempt = arguments
    price = os.environ.get("USD_PER_HOUR") or os.environ.get("USD_PER_HOUR_AT_MOST")
    try:
        url = bucket.url(os.environ, "RUN")
    except ConfigError as error:
        return f"error: {error}"
    if not price or not url.startswith("s3://"):
        return 0
    document = {"time": time.time()}
    if what == "begin":
        started_at = float(os.environ.get("SEGMENT_STARTED_AT") or time.time())
        document.update(started_at=started_at, usd_per_hour=float(price), host=socket.gethostname(), setup=True)
    try:
        put(f"{url}/machines/{attempt}/{'start' if what == 'begin' else 'end'}.json", json.dumps(document) + "\n")
    except Exception as error:  # the network, keys or permissions may cause any error
        return f"{url} did not take this machine's record, so that its set-up does not count under the cap: {error}"
    return 0


def put(url, body):
    """Write one object. Raises OSError if the request fails."""
    name, _, key = url[len("s3://") :].partition("/")
    endpoint = first(ENDPOINTS)
    region = first(REGIONS) or "us-east-1"
    keys = {theirs: os.environ.get(ours, "") for theirs, ours in KEYS.items()}
    if not keys["SecretAccessKey"]:
        keys = switch.role_keys()
    try:
        _put(endpoint, region, name, key, body, keys)
    except urllib.error.HTTPError as error:
        home = error.headers.get("x-amz-bucket-region")
        if not home or home == region:
            raise
        _put(endpoint, home, name, key, body, keys)


def _put(endpoint, region, name, key, body, keys):
    server = (endpoint or f"https://s3.{region}.amazonaws.com").rstrip("/")
    url = f"{server}/{urllib.parse.quote(f'{name}/{key}', safe='/-_.~')}"
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    headers = switch.signed(url, region, body, keys, now, "PUT", "s3")
    switch.text_of(urllib.request.Request(url, body.encode(), headers, method="PUT"), switch.REQUEST_SECONDS)


def first(names):
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
