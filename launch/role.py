"""Makes the IAM role of the nodes on AWS, and configures SkyPilot to use it, so that these nodes need no key.

    BUCKET=my-bucket python -m launch.role        (make role)
    python -m launch.role --undo                  (make role UNDO=1)

SWITCH_MINUTES is the time without a sign of life after which a node on AWS ends itself.

The role may read and write BUCKET/runs and BUCKET/data, list names in BUCKET, and end machines with this project's
label (launch/node-policy.json). The right to list has no condition, because S3 would otherwise answer 403 for objects
that do not exist.

SkyPilot reads `.sky.yaml` in the folder in which `sky` is started. `.sky.yaml` names the role for all clusters except
the controller of managed jobs, which rents machines with your login. `.sky.yaml` also makes cloud-init start
launch/node/switch.py at a node's first boot, before SkyPilot's set-up. This program needs your login to AWS, with IAM
rights.
"""

import base64
import contextlib
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from clouds.aws import Aws
from clouds.base import LABEL
from core import bucket, environment, storage
from core.console import run_entry
from core.environment import positive
from core.errors import ConfigError, one_line
from core.stores import aws

ROLE = "pretrain-launcher-node"  # the name of the role and of its instance profile
CLOUD = Aws.name
DEFAULT_SERVICE = aws.service_of(None)  # the store of s3:// URLs if no endpoint is set
POLICY = Path(__file__).parent / "node-policy.json"
SKY_CONFIG = Path(".sky.yaml")
HEAD = "# Written by `make role`, removed by `make role UNDO=1`. SkyPilot reads it where `sky` is started.\n"
# SkyPilot uses the first pattern that fits a cluster's name.
IDENTITY = [{"sky-jobs-controller-*": "LOCAL_CREDENTIALS"}, {"*": ROLE}]
SWITCH = Path(__file__).parent / "node/switch.py"
# cloud-init runs all files of this folder at each boot.
SWITCH_ON_NODE = "/var/lib/cloud/scripts/per-boot/pretrain-launcher-switch"
SWITCH_MINUTES = re.compile(r"^MINUTES = (\S+)", re.M)
TRUST = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}],
}


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--undo"]):
        raise ConfigError("usage: python -m launch.role [--undo] (make role BUCKET=…, make role UNDO=1)")
    environment.adopt()
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        iam = boto3.session.Session().client("iam")
        if arguments:
            undo(iam)
        else:
            make(iam, bucket.root(os.environ), minutes=positive(os.environ, "SWITCH_MINUTES"))
    except (BotoCoreError, ClientError) as error:
        raise ConfigError(f"AWS refused to change the role {ROLE}: {one_line(error)}") from error
    return 0


def node_role(config: Path = SKY_CONFIG) -> str | None:
    """The instance profile that `.sky.yaml` gives to nodes on AWS. None if it gives none. Raises ConfigError."""
    identity = ((_read(config) or {}).get(CLOUD) or {}).get("remote_identity")
    if not isinstance(identity, list):
        return None
    return next((pair["*"] for pair in identity if isinstance(pair, dict) and "*" in pair), None)


def switch_minutes(config: Path = SKY_CONFIG) -> float | None:
    """The minutes without a sign of life after which a node ends itself, or None if `.sky.yaml` starts no switch."""
    for command in ((_read(config) or {}).get(CLOUD) or {}).get("post_provision_runcmd") or ():
        found = re.fullmatch(rf"echo (\S+) \| base64 -d \| gunzip > {SWITCH_ON_NODE}", str(command))
        if found and (minutes := SWITCH_MINUTES.search(gzip.decompress(base64.b64decode(found[1])).decode())):
            return float(minutes[1])
    return None


def start_switch(minutes: float | None = None) -> list[str]:
    """Commands of cloud-init that put the switch on a node and start it.

    SkyPilot accepts a command only if it is one line without `: `.
    """
    text = SWITCH.read_text(encoding="utf-8")
    if minutes:
        text = SWITCH_MINUTES.sub(f"MINUTES = {minutes!r}", text)
    # EC2 limits user data to 16 KB. The packed text has no timestamp, so the same text always gives the same bytes.
    packed = base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()
    return [
        f"mkdir -p {Path(SWITCH_ON_NODE).parent}",
        f"echo {packed} | base64 -d | gunzip > {SWITCH_ON_NODE}",
        f"chmod 755 {SWITCH_ON_NODE}",
        SWITCH_ON_NODE,
    ]


def policy(url: str) -> dict[str, Any]:
    """The role's policy for a bucket, or for a folder in a bucket.

    Raises ConfigError unless the bucket is on S3 at AWS.
    """
    terms = storage.terms_of(url)
    if terms.service != DEFAULT_SERVICE:
        raise ConfigError(f"{url} is not a bucket at AWS, so no role opens it; a node needs the bucket's keys in .env")
    folder = url.partition(f"://{terms.bucket}")[2].strip("/")
    text = POLICY.read_text(encoding="utf-8").replace("BUCKET", terms.bucket)
    return json.loads(text.replace("FOLDER", f"{folder}/" if folder else ""))


def make(iam: Any, url: str, config: Path = SKY_CONFIG, minutes: float | None = None) -> None:
    """Create the role and its instance profile, or update an existing role's policy, and write `config`.

    A node ends itself after `minutes` without a sign of life; None means the default of launch/node/switch.py.
    """
    document = policy(url)
    _check_config(config)
    tags = [{"Key": LABEL[0], "Value": LABEL[1]}]
    if _has_role(iam):
        print(f"role {ROLE}: is there")
    else:
        iam.create_role(RoleName=ROLE, AssumeRolePolicyDocument=json.dumps(TRUST), Tags=tags)
        print(f"role {ROLE}: created")
    iam.put_role_policy(RoleName=ROLE, PolicyName=ROLE, PolicyDocument=json.dumps(document))
    print(f"role {ROLE}: may read and write runs and data in {url}, and end machines with {LABEL[0]}={LABEL[1]}")
    with contextlib.suppress(iam.exceptions.EntityAlreadyExistsException):
        iam.create_instance_profile(InstanceProfileName=ROLE, Tags=tags)
    if not iam.get_instance_profile(InstanceProfileName=ROLE)["InstanceProfile"]["Roles"]:
        iam.add_role_to_instance_profile(InstanceProfileName=ROLE, RoleName=ROLE)
    settings = {CLOUD: {"remote_identity": IDENTITY, "post_provision_runcmd": start_switch(minutes)}}
    config.write_text(HEAD + yaml.safe_dump(settings, sort_keys=False, width=1 << 16), encoding="utf-8")
    print(f"{config}: written; clusters that are up keep the identity that they have")
    print(f"a node on AWS ends itself after {switch_minutes(config):g} minutes without a sign of life of a job")


def undo(iam: Any, config: Path = SKY_CONFIG) -> None:
    """Remove everything that `make` has made and that still exists. Running machines lose the role."""
    if config.exists() and config.read_text(encoding="utf-8").startswith(HEAD):
        config.unlink()
        print(f"{config}: removed")
    if not _has_role(iam):
        print(f"role {ROLE}: is not there")
        return
    missing = iam.exceptions.NoSuchEntityException
    for remove in (
        lambda: iam.remove_role_from_instance_profile(InstanceProfileName=ROLE, RoleName=ROLE),
        lambda: iam.delete_instance_profile(InstanceProfileName=ROLE),
        lambda: iam.delete_role_policy(RoleName=ROLE, PolicyName=ROLE),
        lambda: iam.delete_role(RoleName=ROLE),
    ):
        with contextlib.suppress(missing):
            remove()
    print(f"role {ROLE}: removed")


def _has_role(iam: Any) -> bool:
    """Whether the role exists. Raises ConfigError for a role of that name without our label."""
    try:
        tags = iam.get_role(RoleName=ROLE)["Role"].get("Tags") or []
    except iam.exceptions.NoSuchEntityException:
        return False
    if {"Key": LABEL[0], "Value": LABEL[1]} not in tags:
        raise ConfigError(f"the role {ROLE} exists and is not ours: it has no tag {LABEL[0]}={LABEL[1]}; rename it")
    return True


def _check_config(config: Path) -> None:
    """Raises ConfigError if a project config exists that `make role` has not written."""
    if config.exists() and not config.read_text(encoding="utf-8").startswith(HEAD):
        lines = yaml.safe_dump({CLOUD: {"remote_identity": IDENTITY}}, sort_keys=False, default_flow_style=True).strip()
        raise ConfigError(
            f"{config}: exists and was not written by `make role`; move it away, or merge it with {lines}"
        )


def _read(config: Path) -> dict[str, Any] | None:
    try:
        found = yaml.safe_load(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{config}: cannot be read: {one_line(error)}") from None
    return found if isinstance(found, dict) else None


if __name__ == "__main__":
    run_entry(main)
