#!/usr/bin/env python3
"""Ends this machine if no job of this project gives a sign of life for MINUTES (a dead man's switch). Runs as root.

    switch.py                     from cloud-init at each boot of a node on AWS, where `make role` puts this file
    switch.py --ours [MINUTES]    from launch/node/container.sh on any node

A change of the modification time of ALIVE is a sign of life. launch/node/container.sh gives signs of life while it
makes an image or starts a container. launch.node gives them while it supervises a program. Until the first sign, the
time counts from the boot. When the time is over, this program asks the cloud to terminate the machine, if the node's
role or key allows it. Otherwise the machine is powered off, which ends a spot machine and stops an on-demand machine.

cloud-init starts the switch on every machine that SkyPilot rents on AWS from the project's folder. The switch does not
end SkyPilot's controllers or machines of other projects. If `--ours` is given, this is not checked, because a job of
this project runs on the machine. The switch runs only on AWS and Lambda.

In a cluster of several nodes, one node may finish hours before another, and SkyPilot ends all of them together. So a
silent node waits while the head of its cluster answers, but at most OTHERS_SECONDS.

A copy of this file runs alone on a new machine, and therefore uses only the standard library of Python 3.8.
"""

import fcntl
import hashlib
import hmac
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import xml.etree.ElementTree

MINUTES = 30.0  # `make role` replaces this number
FOLDER = "/var/lib/pretrain-launcher"
ALIVE = FOLDER + "/alive"
HEAD = FOLDER + "/head"  # the address of the head of a cluster of several nodes
OTHERS_SECONDS = 6 * 3600.0
LABEL = ("project", "pretrain-launcher")
CONTROLLERS = ("sky-jobs-controller-", "sky-serve-controller-")
ROLE = "pretrain-launcher-node"
POLL_SECONDS = 10.0
REQUEST_SECONDS = 20.0
METADATA_SECONDS = 3.0
# Seconds to wait for the machine's end after the cloud has accepted the request.
GRACE_SECONDS = 60.0
TRIES = 3
PAUSE_SECONDS = 20.0
LAMBDA = "https://cloud.lambdalabs.com/api/v1/"
EC2_VERSION = "2016-11-15"


def main(arguments):
    if arguments[:1] not in ([], ["--ours"]) or len(arguments) > 2:
        return "usage: launch/node/switch.py [--ours [MINUTES]]"
    minutes = float(arguments[1]) if arguments[1:] else MINUTES
    adopt_environment("/etc/environment")
    if arguments and not (is_on_lambda() or is_on_aws()):
        return 0
    os.makedirs(FOLDER, exist_ok=True)
    os.chmod(FOLDER, 0o1777)
    lock = open(FOLDER + "/lock", "w")  # noqa: SIM115 - held until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return 0  # it runs already
    if not os.path.exists(ALIVE):
        open(ALIVE, "w").close()
    os.chmod(ALIVE, 0o666)  # jobs are not root
    if os.fork():
        return 0
    os.setsid()
    with open(FOLDER + "/switch.log", "a") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
    say(f"ends this machine after {minutes:g} minutes without a sign of life")
    wait_for_silence(minutes)
    if arguments or is_ours(minutes):
        end()
    return 0


def adopt_environment(path):
    """Set the variables of the file `path`, which cloud-init and sudo leave out.

    The machine's image may set a proxy or a certificate authority there. Requests to the cloud may fail without them.
    """
    try:
        with open(path) as file:
            pairs = [line.strip().partition("=") for line in file if "=" in line]
    except OSError:
        return
    for name, _, value in pairs:
        os.environ.setdefault(name, value.strip("\"'"))


def wait_for_silence(minutes):
    """Return once ALIVE has not changed for `minutes`.

    The time is measured by the monotonic clock, so a jump of the system's clock has no effect.
    """
    last, seen, silent = time.monotonic(), modified(), 0.0
    while silent < minutes * 60 or (silent < OTHERS_SECONDS and cluster_lives()):
        time.sleep(min(POLL_SECONDS, minutes * 6))
        if modified() != seen:
            last, seen = time.monotonic(), modified()
        silent = time.monotonic() - last


def cluster_lives():
    """Whether this node belongs to a cluster of several nodes, and the cluster's head answers."""
    try:
        with open(HEAD) as file:
            address = file.read().strip()
        if address:
            socket.create_connection((address, 22), METADATA_SECONDS).close()
        return bool(address)
    except OSError:
        return False


def modified():
    try:
        return os.stat(ALIVE).st_mtime_ns
    except OSError:
        return 0


def is_ours(minutes):
    """Whether this is a machine on AWS for a job of this project.

    This is decided by its tags or, if they cannot be read, by its role. If neither is known after another `minutes`,
    the machine has lost its network and counts as this project's.
    """
    until = time.monotonic() + minutes * 60
    while True:
        for look in (by_tags, by_role):
            try:
                ours, said = look()
            except Exception as error:  # without network or permission, the request fails
                say(f"{look.__name__}: {error}")
            else:
                say(f"{said} {'is of this project' if ours else 'is left alone'}")
                return ours
        if time.monotonic() >= until:
            return True
        time.sleep(min(POLL_SECONDS, minutes * 6))


def by_tags():
    tags = own_tags()
    cluster = tags.get("ray-cluster-name", "")
    return tags.get(LABEL[0]) == LABEL[1] and not cluster.startswith(CONTROLLERS), f"cluster {cluster or '?'}"


def by_role():
    """Decides by the role, because `make role` gives it to nodes and not to controllers."""
    profile = json.loads(metadata("iam/info")).get("InstanceProfileArn", "")
    return profile.rpartition("/")[2] == ROLE, f"a machine with the role {profile or '?'}"


def end():
    """Terminate this machine. After TRIES failed attempts, power it off.

    Repeat all of this until the machine is gone.
    """
    tries = 0
    while True:
        for terminate in (terminate_on_aws, terminate_on_lambda):
            try:
                say(terminate())
            except Exception as error:  # on another cloud, or without network or permission, the request fails
                say(f"{terminate.__name__}: {error}")
            else:
                time.sleep(GRACE_SECONDS)
        tries += 1
        # The cloud may be busy now and answer the next time. Power-off comes last: an on-demand machine then keeps its
        # disk. A machine on Lambda is never powered off, because Lambda bills it until its API ends it, and a
        # powered-off machine cannot call the API.
        if tries >= TRIES and not is_on_lambda():
            say("powered off")
            subprocess.call(["shutdown", "-h", "now"])
        time.sleep(PAUSE_SECONDS)


# --- AWS -------------------------------------------------------------------------------------------------------


def metadata(path):
    """An item of the instance metadata service (IMDSv2)."""
    base = (os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or "http://169.254.169.254").rstrip("/") + "/latest/"
    wanted = {"X-aws-ec2-metadata-token-ttl-seconds": "300"}
    token = direct(urllib.request.Request(base + "api/token", headers=wanted, method="PUT"))
    return direct(urllib.request.Request(base + "meta-data/" + path, headers={"X-aws-ec2-metadata-token": token}))


def direct(request):
    """The answer to a request that uses no proxy, because the metadata service is local to the machine."""
    return text_of(request, METADATA_SECONDS, urllib.request.build_opener(urllib.request.ProxyHandler({})).open)


def text_of(request, seconds, open_url=urllib.request.urlopen):
    """The text of the answer. Raises OSError if it is not complete after `seconds`, and the errors of `open_url`.

    The limit of `open_url` applies to each read, so an answer of a byte a second would keep this machine forever.
    """
    found = {}

    def ask():
        try:
            with open_url(request, timeout=seconds) as answer:
                found["text"] = answer.read().decode()
        except Exception as error:
            found["error"] = error

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    if "text" in found:
        return found["text"]
    raise found.get("error") or OSError(f"no answer within {seconds:g} s")


def is_on_aws():
    try:
        return metadata("instance-id").startswith("i-")
    except Exception:  # outside of AWS there is no metadata service
        return False


def own_tags():
    tags = {}
    for item in xml.etree.ElementTree.fromstring(ec2("DescribeInstances")).iter():
        named = {child.tag.rpartition("}")[2]: child.text or "" for child in item}
        if set(named) == {"key", "value"}:
            tags[named["key"]] = named["value"]
    return tags


def terminate_on_aws():
    ec2("TerminateInstances")
    return "terminated by EC2"


def role_keys():
    """The temporary keys of this machine's role."""
    role = metadata("iam/security-credentials/").split()[0]
    return json.loads(metadata("iam/security-credentials/" + role))


def ec2(action):
    """EC2's answer to an action on this machine. The request is signed with the keys of the machine's role."""
    region, instance = metadata("placement/region"), metadata("instance-id")
    query = {"Action": action, "InstanceId.1": instance, "Version": EC2_VERSION}
    body = urllib.parse.urlencode(sorted(query.items()))
    url = endpoint() or f"https://ec2.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"
    headers = signed(url, region, body, role_keys(), time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
    return text_of(urllib.request.Request(url + "/", body.encode(), headers), REQUEST_SECONDS)


def endpoint():
    """The address of EC2 that the machine's image sets. "" means AWS's own address."""
    return (os.environ.get("AWS_ENDPOINT_URL_EC2") or os.environ.get("AWS_ENDPOINT_URL") or "").rstrip("/")


def signed(url, region, body, keys, now, method="POST", service="ec2"):
    """The headers of a request, signed with AWS's Signature Version 4, at `now`, such as 20261130T120000Z."""
    parts = urllib.parse.urlsplit(url)
    digest = hashlib.sha256(body.encode()).hexdigest()
    headers = {
        "content-type": "application/x-www-form-urlencoded; charset=utf-8",
        "host": parts.netloc,
        "x-amz-date": now,
    }
    if service == "s3":
        headers["content-type"], headers["x-amz-content-sha256"] = "application/json", digest
    if keys.get("Token"):
        headers["x-amz-security-token"] = keys["Token"]
    names = ";".join(sorted(headers))
    lines = [method, parts.path or "/", "", *(f"{name}:{headers[name]}" for name in sorted(headers)), "", names, digest]
    scope = f"{now[:8]}/{region}/{service}/aws4_request"
    text = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256("\n".join(lines).encode()).hexdigest()])
    key = ("AWS4" + keys["SecretAccessKey"]).encode()
    for part in [*scope.split("/"), text]:
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    credential = f"{keys['AccessKeyId']}/{scope}"
    said = f"Credential={credential}, SignedHeaders={names}, Signature={key.hex()}"
    headers["authorization"] = f"AWS4-HMAC-SHA256 {said}"
    return headers


# --- Lambda ----------------------------------------------------------------------------------------------------


def lambda_keys():
    """The file with the API key that SkyPilot copies to a node, so that the node can end itself."""
    return os.path.expanduser(f"~{os.environ.get('SUDO_USER', '')}/.lambda_cloud/lambda_keys")


def is_on_lambda():
    """Whether this machine is on Lambda: it has a key of Lambda's API, and it is not on AWS."""
    return os.path.exists(lambda_keys()) and not is_on_aws()


def terminate_on_lambda():
    here = set(subprocess.check_output(["hostname", "-I"]).decode().split())
    ids = [each["id"] for each in lambda_api("instances") if {each.get("ip"), each.get("private_ip")} & here]
    if len(ids) != 1:  # private addresses of two regions may be equal
        raise OSError(f"{len(ids)} of its machines have one of the addresses {' '.join(sorted(here))}")
    lambda_api("instance-operations/terminate", {"instance_ids": ids})
    return "terminated by Lambda"


def lambda_api(path, body=None):
    with open(lambda_keys()) as file:
        pairs = dict(line.strip().split(" = ", 1) for line in file if " = " in line)
    headers = {"Authorization": "Bearer " + pairs["api_key"], "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    return json.loads(text_of(urllib.request.Request(LAMBDA + path, data, headers), REQUEST_SECONDS))["data"]


def say(text):
    print(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
