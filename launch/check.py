"""Finds problems that would make a launch fail or cost more than expected, before anything costs money.

    BUCKET=my-bucket python -m launch.check sky/pretrain-8xa100.yaml [--gpus NAME:COUNT] [--num-nodes NUMBER]

Prints one line per finding: `ok`, `!` (works, but look), `x` (would fail, with the remedy), `?` (could not be checked).
Exits with 1 if there is an `x`. Writes one small object into the bucket and deletes it.
"""

import dataclasses
import os
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from clouds import skypilot
from clouds.base import Cloud, Finding
from clouds.providers import CLOUDS
from core import bucket, environment, secrets, storage
from core.console import run_entry
from core.data import manifest
from core.environment import positive
from core.errors import ConfigError, LauncherError, one_line
from core.gpus import has_fp8
from core.run.folder import RunFolder, read_description
from core.run.machine import checkout_revision
from core.run.reader import spent_usd_at_most
from core.settings import loader, memory
from core.settings.model import ModelConfig, public_model
from core.settings.run import RunConfig
from core.settings.spot import too_few_checkpoints
from core.settings.training import PretrainConfig, TrainingConfig, check_batch
from core.settings.tuning import FinetuneConfig
from core.stores import aws, credentials
from core.task import MachineRequest, TaskSpec, machine_choice, read_task
from launch import gone, managed, registry
from launch.identity import check_identity, check_switch
from launch.inputs import BESIDE, check_data
from launch.node import network, supervise

KEY_PAIR = ("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY")
ONE_KEY = {"google": "BUCKET_GOOGLE_KEY", "azure": "BUCKET_AZURE_KEY"}
# A check takes a task and its settings. The settings are the environment and the task's envs; the envs have precedence.
Check = Callable[[TaskSpec, Mapping[str, str]], Iterable[Finding]]


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError("usage: python -m launch.check sky/TASK.yaml [--gpus NAME:COUNT] [--num-nodes NUMBER]")
    path, *options = arguments
    environment.adopt()
    task = read_task(managed.chosen(path, os.environ), os.environ, machine_choice(options))
    print(f"{path}:")
    failed = 0
    for finding in all_findings(CHECKS, task, {**os.environ, **task.envs}):
        print(finding, flush=True)
        failed += finding.mark == "x"
    if failed:
        print(f"{failed} marked x, which must be fixed before this task can run")
        return 1
    command = pricing_command(task, os.environ, options)
    print(f"$ sky {secrets.scrub(shlex.join(command[1:]))}", flush=True)
    return subprocess.call(command)


def pricing_command(task: TaskSpec, given: Mapping[str, str], options: list[str]) -> list[str]:
    """The command that prints SkyPilot's price table.

    `sky jobs launch` has no --dryrun; `sky launch` prices the same machines.
    """
    unmanaged = dataclasses.replace(task, managed=False)
    return skypilot.launch_command(unmanaged, given, checkout_revision(), [*options, "--dryrun"])


def all_findings(checks: Iterable[Check], task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Findings of several checks, in order. If several checks find the same wrong setting, it is reported once."""
    said = set()
    for check in checks:
        for finding in findings(check, task, settings):
            text = finding.what.removeprefix("settings: ")
            if text not in said:
                yield finding
            said.add(text)


def findings(check: Check, task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """The findings of one check. If the check raises an error, the error becomes a finding."""
    name = check.__name__.removeprefix("check_").replace("_", " ")
    yield from _guarded(name, lambda: check(task, settings))


def _guarded(name: str, ask: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from ask()
    except LauncherError as error:
        yield Finding("x", secrets.scrub(str(error)))
    # If credentials, rights or the network are missing, a cloud's library may raise any error.
    except Exception as error:
        yield Finding("?", f"{name}: could not be asked ({secrets.scrub(one_line(error))[:160]})")


# --- settings, config and memory -------------------------------------------------------------------------------


def check_config(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Parses the settings as the node does, and checks memory and batch for each kind of GPU."""
    problems = setting_problems(settings)
    for problem in problems:
        yield Finding("x", f"settings: {problem}")
    if problems:
        return
    if float(settings.get("MAX_USD") or 1) == 0:
        yield Finding(
            "!",
            "settings: MAX_USD is 0, so nothing caps what this costs "
            "(shells and make turn $20 into 0: for twenty dollars write MAX_USD=20)",
        )
    if task.workload.problem and task.workload.stage:
        raise ConfigError(task.workload.problem)
    config = task.workload.config
    if not isinstance(config, TrainingConfig):
        return
    model = config.model if isinstance(config, PretrainConfig) else _start_model(config)
    check_batch(config, model.context)
    if any(each.spot for each in task.requests) and (problem := too_few_checkpoints(config)):
        yield Finding("x", f"config: {problem}")
    steps = f"{config.train.epochs:g} epochs" if config.train.epochs else f"{config.train.steps:,} steps"
    length = f"{steps} of {config.batch.tokens_per_step:,} tokens"
    yield Finding("ok", f"config: {task.envs.get('CONFIG') or task.path}, {length}")
    if settings.get("DEVICE") != "cpu":
        for gpu, count in dict.fromkeys((each.accelerator, each.accelerators) for each in task.requests):
            if gpu:
                ranks = int(settings.get("RANKS_PER_NODE") or count) * task.nodes
                yield from _fit(config, model, gpu, count, ranks)


def _fit(config: TrainingConfig, model: ModelConfig, gpu: str, count: int, ranks: int) -> Iterator[Finding]:
    """Checks a config on `ranks` GPUs of one kind."""
    sequences = max(1, config.batch.micro_batch_size) * model.context
    micro_batches = config.batch.tokens_per_step // sequences
    if micro_batches % ranks:
        yield Finding("x", f"config: {micro_batches} micro-batches do not divide over {ranks} ranks of {gpu}:{count}")
    elif config.train.precision == "fp8" and has_fp8(gpu) is False:
        yield Finding("x", f"config: train.precision is fp8, but {gpu} has no fp8 units; set bf16, or take H100")
    elif (found := memory.verdict(config, model, gpu, ranks)) is not None:
        fits, said = found
        yield Finding("ok" if fits else "x", f"memory: {said}")


def _start_model(tuned: FinetuneConfig) -> ModelConfig:
    """The model that a tuning starts from. For an unknown name, GPT-2 124M is assumed."""
    start = tuned.start.weights.partition("/checkpoints/")[0]
    if "://" in start:
        return loader.from_dict(ModelConfig, read_description(RunFolder(start))["config"]["model"], start)
    return public_model(start) or ModelConfig()


def setting_problems(settings: Mapping[str, str]) -> list[str]:
    """A sentence for each setting that the node would refuse."""
    found = []
    for name, parse in PARSERS.items():
        if settings.get(name):  # an empty variable means the default of the setting
            try:
                parse(settings)
            except ConfigError as error:
                found.append(str(error))
    return found


def _cap(settings: Mapping[str, str]) -> float:
    return loader.load(RunConfig, [], {"RUN_URL": "any", "MAX_USD": settings["MAX_USD"]}).max_usd


def _bound(name: str, settings: Mapping[str, str]) -> RunConfig:
    return loader.load(RunConfig, [], {"RUN_URL": "any", name: settings[name]})


def _one_of(name: str, *choices: str) -> Callable[[Mapping[str, str]], str]:
    def parse(settings: Mapping[str, str]) -> str:
        if settings[name] not in choices:
            raise ConfigError(f"{name} is {settings[name]!r}, must be {' or '.join(choices)}")
        return settings[name]

    return parse


def _endpoint(name: str) -> Callable[[Mapping[str, str]], str]:
    def parse(settings: Mapping[str, str]) -> str:
        url = settings[name]
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{name} is {url!r}, must begin with https:// or http://")
        return url

    return parse


# For each variable, a parser that raises ConfigError if the node would refuse the value.
PARSERS: dict[str, Callable[[Mapping[str, str]], object]] = {
    "BUCKET": bucket.root,
    "RUN": lambda settings: bucket.name(settings, "RUN"),
    "DATA": lambda settings: bucket.name(settings, "DATA"),
    "MAX_USD": _cap,
    "MAX_HOURS": partial(_bound, "MAX_HOURS"),
    "MAX_RESTART_USD": partial(_bound, "MAX_RESTART_USD"),
    "USD_PER_HOUR": lambda settings: positive(settings, "USD_PER_HOUR"),
    "RANKS_PER_NODE": network.ranks_per_node,
    "HANG_MINUTES": supervise.hang_minutes,
    "SWITCH_MINUTES": lambda settings: positive(settings, "SWITCH_MINUTES"),
    "DEVICE": _one_of("DEVICE", "cuda", "cpu"),
    "CUDA_COMPAT": _one_of("CUDA_COMPAT", "yes", "no"),
    "BUCKET_ENDPOINT_URL": _endpoint("BUCKET_ENDPOINT_URL"),
    "BUCKET_GOOGLE_KEY": credentials.for_google,
    "AWS_ENDPOINT_URL": _endpoint("AWS_ENDPOINT_URL"),
}


# --- bucket and data -------------------------------------------------------------------------------------------


def check_secrets(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Checks the keys of the bucket before the launch.

    A node would notice an empty key only after it had built the image.
    """
    named = settings.get("BUCKET")
    service = storage.terms_of(bucket.root(settings)).service if named else aws.service_of(None)
    keys = (ONE_KEY[service],) if service in ONE_KEY else KEY_PAIR
    if "SERVE_API_KEY" in task.secrets and not settings.get("SERVE_API_KEY"):
        yield Finding(
            "x", "secrets: SERVE_API_KEY is empty; set it in .env to a secret that clients of the server send"
        )
    if "OPENAI_API_KEY" in task.secrets and not settings.get("OPENAI_API_KEY"):
        yield Finding("!", "secrets: OPENAI_API_KEY is empty, so the endpoint must be one that needs no key")
    empty = [key for key in keys if not settings.get(key)]
    clouds = cloud_names(task)
    closed = [name for name in clouds if not CLOUDS.get(name, Cloud()).opens_buckets(service)]
    if empty and len(empty) < len(keys):
        yield Finding("x", f"secrets: {empty[0]} is empty, its partner is set; set both or none in .env")
    elif empty and closed:
        yield Finding(
            "x" if closed == clouds else "!",
            f"secrets: without {' and '.join(keys)} a node on {', '.join(closed)} could not reach the bucket; "
            "set them in .env to keys that launch/bucket-policy.json limits (your login to AWS never goes to a node)",
        )
    else:
        yield Finding("ok", "secrets: " + ("the node's own role" if empty else "keys for the bucket are set"))


def check_bucket(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Writes, reads and deletes an object, tries a conditional write, and prices the transfer of the data."""
    if "BUCKET" not in task.envs:
        return
    url = bucket.root(settings)
    probe = storage.join(url, f".check-{os.urandom(6).hex()}")
    storage.write_bytes(probe, b"launch.check\n", exclusive=True)
    storage.read_bytes(probe)
    refused = storage.refuses_second_write(probe)
    storage.delete(probe)
    if refused:
        yield Finding("ok", f"bucket: {url} can be written, read and deleted in")
    else:
        yield Finding(
            "x",
            f"bucket: {url} at {storage.terms_of(url).endpoint} ignores conditional writes (If-None-Match), "
            "so that two machines could take the same segment of a run; use another store",
        )
    size = _data_bytes(task)
    for cloud in CLOUDS.values():
        yield from cloud.transfer_findings(task, url, size)


def _data_bytes(task: TaskSpec) -> int:
    """The size of the training data in bytes. 0 if the data does not exist yet."""
    try:
        return sum(shard.bytes for shard in manifest.read(bucket.url(task.envs, "DATA")).splits["train"].shards)
    except LauncherError:
        return 0


def check_cap(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Compares the run's cost so far with MAX_USD, so that nothing is rented once the cap is spent."""
    if "MAX_USD" not in task.envs or setting_problems(settings):
        return
    max_usd, url = _cap(settings) if settings.get("MAX_USD") else 0.0, bucket.url(task.envs, "RUN")
    folder = getattr(RunFolder(url), BESIDE[task.workload.stage]) if task.workload.stage in BESIDE else url
    if max_usd:
        gone.record(url)
    usd = spent_usd_at_most(folder) if max_usd else 0.0
    if usd is None:
        yield Finding("!", f"cap: the cost of {folder} so far is not known, so a node will refuse MAX_USD")
    elif max_usd and usd >= max_usd:
        remedy = "set a larger MAX_USD, or another RUN"
        yield Finding("x", f"cap: {folder} has cost ${usd:.2f}, all of MAX_USD (${max_usd:g}); {remedy}")
    elif usd:
        yield Finding("ok", f"cap: {folder} has cost ${usd:.2f} of ${max_usd:g}")


# --- image and clouds ------------------------------------------------------------------------------------------


def check_image(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Checks that the images are published for the platforms (amd64, arm64) of the task's machines."""
    image = settings.get("IMAGE")
    if not image:
        yield Finding("ok", "image: built on the node (IMAGE is empty); `make image` publishes one")
        return
    for target in task.images:
        platforms = registry.platforms(f"{image}-{target}")
        missing = {_platform(request) for request in task.requests} - platforms
        if missing:
            yield Finding(
                "x", f"image: {image}-{target} exists, but not for {', '.join(sorted(missing))}; run `make image`"
            )
        else:
            yield Finding("ok", f"image: {image}-{target} exists for {', '.join(sorted(platforms))}")


def _platform(request: MachineRequest) -> str:
    offers = [offer for cloud in CLOUDS.values() for offer in cloud.offers()]
    arm_types = {offer.instance_type for offer in offers if offer.arch == "arm64"}
    is_arm = "GH200" in (request.accelerator or "") or request.instance_type in arm_types
    return "linux/arm64" if is_arm else "linux/amd64"


def cloud_names(task: TaskSpec) -> list[str]:
    """The clouds that a task requests. If a request names no cloud, all clouds are returned."""
    return sorted({name for request in task.requests for name in ([request.cloud] if request.cloud else CLOUDS)})


def check_clouds(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Checks credentials with `sky check`."""
    clouds = cloud_names(task)
    done = subprocess.run([skypilot.find_sky(), "check", *clouds], capture_output=True, text=True)
    lines = [line.lower() for line in done.stdout.splitlines()]
    working = [cloud for cloud in clouds if any(cloud in line and "enabled" in line for line in lines)]
    for cloud in clouds:
        if cloud in working:
            yield Finding("ok", f"credentials: SkyPilot can use {cloud}")
        else:
            yield Finding("!", f"credentials: SkyPilot cannot use {cloud} and leaves it out; see `sky check {cloud}`")
    if not working:
        yield Finding("x", "credentials: none of the task's clouds can be used; set up one (docs/launch.md)")


def check_quotas(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Asks each cloud for the account's quotas."""
    for name in cloud_names(task):
        yield from _guarded(f"quotas of {name}", partial(CLOUDS.get(name, Cloud()).quota_findings, task))


def check_capacity(task: TaskSpec, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Asks each cloud for machines that are available now."""
    for name in cloud_names(task):
        yield from _guarded(f"capacity of {name}", partial(CLOUDS.get(name, Cloud()).capacity_findings, task))


# A launch runs these checks too, because they need only the bucket and this checkout. The settings are checked first.
FREE_CHECKS: tuple[Check, ...] = (check_config, check_secrets, check_bucket, check_cap, check_data)
CHECKS: tuple[Check, ...] = (
    *FREE_CHECKS,
    check_identity,
    check_switch,
    check_image,
    check_clouds,
    check_quotas,
    check_capacity,
)


if __name__ == "__main__":
    run_entry(main)
