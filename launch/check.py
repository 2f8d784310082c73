"""Looks for what would make a launch fail or cost more than expected, before anything costs money.

    BUCKET=my-bucket python -m launch.check sky/pretrain-8xa100.yaml

One line per check: `ok`, `!` (works, but look), `x` (would fail, with the remedy), `?` (could not be asked).
Exits 1 if there is an `x`. Writes one small object into the bucket and deletes it.
"""

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from core import bucket, environment, secrets, storage
from core.console import run_entry
from core.errors import ConfigError, LauncherError, ObjectExists, one_line
from core.stores import aws
from launch import registry, work
from launch.down import lambda_get
from launch.skypilot import find_sky
from launch.task import candidates, read_task, revision, settings_of, sky_command
from launch.work import Finding, accelerator, data_bytes

# Service Quotas codes of EC2: vCPUs of running instances by family, on demand and spot.
QUOTAS = {
    "p": ("L-417A185B", "L-7212CCBC"),
    "g": ("L-DB2E81BA", "L-3819A6DF"),
    "standard": ("L-1216C47A", "L-34B43A08"),
}
# Instance type and vCPUs of what the tasks ask for by accelerator.
AWS_TYPES = {
    "A100:8": ("p4d.24xlarge", 96),
    "A100-80GB:8": ("p4de.24xlarge", 96),
    "H100:8": ("p5.48xlarge", 192),
    "A10G:1": ("g5.xlarge", 4),
    "L4:1": ("g6.xlarge", 4),
}
# AWS's list price for the first terabytes to the internet, and between its regions in the US (EC2 pricing page).
INTERNET_USD_PER_GB = 0.09
INTER_REGION_USD_PER_GB = 0.02

KEY_PAIRS = (
    ("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"),
    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
)
ONE_KEY = {"google": "BUCKET_GOOGLE_KEY", "azure": "BUCKET_AZURE_KEY"}


Check = Callable[[dict[str, Any], Mapping[str, str]], Iterator[Finding]]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        raise ConfigError("usage: python -m launch.check sky/TASK.yaml")
    environment.adopt()
    task = read_task(arguments[0])
    settings = settings_of(task, os.environ)
    print(f"{arguments[0]}:")
    failed = 0
    for finding in all_findings(CHECKS, task, settings):
        print(finding, flush=True)
        failed += finding.mark == "x"
    if failed:
        print(f"{failed} to fix before this task can run")
        return 1
    command = pricing_command(arguments[0], task, os.environ)
    print(f"$ sky {' '.join(command[1:])}", flush=True)
    return subprocess.call(command)


def pricing_command(path: str, task: dict[str, Any], given: Mapping[str, str]) -> list[str]:
    """The command that prints SkyPilot's price table.

    `sky jobs launch` has no --dryrun; `sky launch` prices the same machines.
    """
    resources = {key: value for key, value in task["resources"].items() if key != "job_recovery"}
    return sky_command(path, {**task, "resources": resources}, given, revision(), ["--dryrun"])


def all_findings(checks: Iterable[Check], task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    """Findings of several checks, in order; a wrong setting that several of them meet comes once."""
    said = set()
    for check in checks:
        for finding in findings(check, task, settings):
            text = finding.what.removeprefix("settings: ")
            if text not in said:
                yield finding
            said.add(text)


def findings(check: Check, task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    """Findings of one check; an error is one as well."""
    try:
        yield from check(task, settings)
    except LauncherError as error:
        yield Finding("x", secrets.scrub(str(error)))
    except Exception as error:  # what a cloud's library raises without credentials, rights or network
        name = check.__name__.removeprefix("check_").replace("_", " ")
        said = secrets.scrub(one_line(error))[:160]
        yield Finding("?", f"{name}: could not be asked ({said})")


def check_clouds(task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    """Credentials, by SkyPilot's own check, for the clouds of the candidates."""
    clouds = sorted({_cloud(candidate) for candidate in candidates(task)})
    done = subprocess.run([find_sky(), "check", *clouds], capture_output=True, text=True)
    working = []
    for cloud in clouds:
        enabled = any(cloud in line.lower() and "enabled" in line.lower() for line in done.stdout.splitlines())
        working += [cloud] if enabled else []
        if enabled:
            yield Finding("ok", f"credentials: {cloud} lets SkyPilot in")
        else:
            yield Finding("!", f"credentials: {cloud} does not; see `sky check {cloud}` (its candidates are left out)")
    if not working:
        yield Finding("x", "credentials: none of the task's clouds can be used; set up one (docs/launch.md)")


def check_secrets(task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    """An empty key is found out on the node otherwise, after the image is built."""
    service = storage.terms_of(bucket.root(settings)).service if settings.get("BUCKET") else "aws"
    keys = _keys(service, settings)
    empty = [key for key in keys if not settings.get(key)]
    clouds = {_cloud(candidate) for candidate in candidates(task)}
    # A role of AWS opens no bucket of another service.
    elsewhere = sorted(clouds if service in ("r2", "s3-like", *ONE_KEY) else clouds - {"aws"})
    if empty and len(empty) < len(keys):
        yield Finding("x", f"secrets: {empty[0]} is empty, its partner is set; set both or none in .env")
    elif empty and elsewhere:
        yield Finding(
            "x" if elsewhere == sorted(clouds) else "!",
            f"secrets: without {' and '.join(keys)} a node on {', '.join(elsewhere)} could not reach the bucket; "
            "set them in .env to keys that launch/bucket-policy.json limits",
        )
    else:
        yield Finding("ok", "secrets: " + ("the node's own role" if empty else "keys for the bucket are set"))


def _keys(service: str, settings: Mapping[str, str]) -> tuple[str, ...]:
    """The variables that open the bucket from outside of its cloud."""
    if service in ONE_KEY:
        return (ONE_KEY[service],)
    return next((pair for pair in KEY_PAIRS if any(settings.get(name) for name in pair)), KEY_PAIRS[0])


def check_bucket(task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    if "BUCKET" not in task["envs"]:
        return
    url = bucket.root(settings)
    probe = storage.join(url, f".check-{os.urandom(6).hex()}")
    storage.write_bytes(probe, b"launch.check\n", exclusive=True)
    storage.read_bytes(probe)
    taken = _is_refused(probe)
    storage.delete(probe)
    if taken:
        yield Finding("ok", f"bucket: {url} can be written, read and deleted in")
    else:
        yield Finding(
            "x",
            f"bucket: {url} at {storage.terms_of(url).endpoint} ignores conditional writes (If-None-Match), "
            "so that two machines could take the same segment of a run; use another store",
        )
    yield from _region(task, settings, url)


def _is_refused(taken: str) -> bool:
    """Whether the store keeps a second writer from a name that is taken."""
    try:
        storage.write_bytes(taken, b"launch.check once more\n", exclusive=True)
    except ObjectExists:
        return True
    return False


def _region(task: dict[str, Any], settings: Mapping[str, str], url: str) -> Iterator[Finding]:
    """Machines elsewhere read the data over a link that is billed by the gigabyte."""
    terms = storage.terms_of(url)
    home = aws.Place(terms.bucket, None, None).home() if terms.service == "aws" else None
    if not home:
        return
    size = data_bytes(settings)
    for place in sorted({str(candidate.get("infra") or "") for candidate in candidates(task)}):
        cloud, _, region = place.partition("/")
        usd = INTERNET_USD_PER_GB if cloud != "aws" else INTER_REGION_USD_PER_GB if region != home else 0
        if usd and (region or cloud != "aws"):
            amount = f"${usd * size / 1e9:.2f} for this data" if size else f"${usd:.2f} per GB"
            yield Finding("!", f"bucket: it is in {home}; a machine at {place} reads it for {amount}")


def check_quotas(task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    """vCPU quotas of AWS. On demand and spot have separate ones; a new account has 0 for GPU machines."""
    asked = set()
    nodes = int(task.get("num_nodes") or 1)
    for candidate in candidates(task):
        cloud, _, region = str(candidate.get("infra") or "").partition("/")
        kind, vcpus = AWS_TYPES.get(str(candidate.get("accelerators")), (str(candidate.get("instance_type")), 8))
        if cloud != "aws" or (region, kind, bool(candidate.get("use_spot"))) in asked:
            continue
        asked.add((region, kind, bool(candidate.get("use_spot"))))
        import boto3

        family = kind[0] if kind[0] in "pg" else "standard"
        code = QUOTAS[family][bool(candidate.get("use_spot"))]
        client = boto3.client("service-quotas", region_name=region or settings.get("AWS_DEFAULT_REGION") or "us-east-1")
        limit = client.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]
        market = "spot" if candidate.get("use_spot") else "on demand"
        where = f"{region or client.meta.region_name}, {family} {market}: {limit:.0f} vCPUs"
        enough = limit >= vcpus * nodes
        yield Finding("ok" if enough else "!", f"quota: {where}" + ("" if enough else f", {nodes} x {kind} need more"))


def check_lambda_capacity(task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    wanted = [accelerator(c) for c in candidates(task) if _cloud(c) == "lambda" and accelerator(c)[0]]
    types = lambda_get("instance-types") if wanted else None
    for gpu, count in wanted if types is not None else ():
        prefix = f"gpu_{count}x_{gpu.lower().replace('-', '_')}"
        regions = sorted(
            region["name"]
            for name, entry in types.items()
            if name.startswith(prefix) and ("80gb" in name) == ("80GB" in gpu)
            for region in entry["regions_with_capacity_available"]
        )
        if regions:
            yield Finding("ok", f"capacity: lambda has {gpu}:{count} now in {', '.join(regions)}")
        else:
            yield Finding("!", f"capacity: lambda has no {gpu}:{count} now")


def check_image(task: dict[str, Any], settings: Mapping[str, str]) -> Iterator[Finding]:
    image = settings.get("IMAGE")
    if not image:
        yield Finding("ok", "image: built on the node (IMAGE is empty); `make image` publishes one")
        return
    for target in ("prep", "train"):
        if f"image {target}" in task.get("setup", ""):
            platforms = registry.platforms(f"{image}-{target}")
            missing = {_platform(candidate) for candidate in candidates(task)} - platforms
            if missing:
                yield Finding(
                    "x", f"image: {image}-{target} is there, but not for {', '.join(sorted(missing))}; `make image`"
                )
            else:
                yield Finding("ok", f"image: {image}-{target} is there for {', '.join(sorted(platforms))}")


# These ask only the bucket and this checkout; a launch runs them, too. Settings come first.
FREE_CHECKS: tuple[Check, ...] = (work.check_config, check_secrets, check_bucket, work.check_data)
CHECKS: tuple[Check, ...] = (
    *FREE_CHECKS,
    check_image,
    check_clouds,
    check_quotas,
    check_lambda_capacity,
)


def _cloud(candidate: Mapping[str, Any]) -> str:
    return str(candidate.get("infra") or "").partition("/")[0]


def _platform(candidate: Mapping[str, Any]) -> str:
    arm = "GH200" in str(candidate.get("accelerators")) or str(candidate.get("instance_type")).startswith("c7g.")
    return "linux/arm64" if arm else "linux/amd64"


if __name__ == "__main__":
    run_entry(main)
