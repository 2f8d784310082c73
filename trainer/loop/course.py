"""Opens the course of a run: the recorded changes, and a new extension (--extend) or branch (--from=RUN@STEP).

A branch is a separate run. Its first checkpoint is a copy of another run's checkpoint, so it continues with the
weights, the optimizer state and the data position of that run. The branch is recorded before anything else is stored.
If the copy is interrupted, the next start finishes it.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from core import storage, urls
from core.errors import CheckpointError, ConfigError, ObjectNotFound, RunError
from core.run import course
from core.run.course import Change
from core.run.folder import FIXED_IN_A_BRANCH, RunFolder, read_description
from core.settings import loader
from core.settings.training import OptimizerConfig
from trainer.checkpoint import layout
from trainer.optim.schedule import Schedule
from trainer.stages.stage import Stage

log = logging.getLogger("train")

TRUNK = "trunk"


def open_course(stage: Stage) -> list[Change]:
    """All changes of the run's course, including a new branch or extension. Rank 0 calls it before it opens the run.

    Raises ConfigError or RunError for an impossible change, before anything is written.
    """
    settings, folder = stage.settings, RunFolder(stage.settings.run.url)
    changes = course.read(folder)
    if settings.run.branch_from:
        changes = _branch(stage, folder, changes, settings.run.branch_from)
    if changes and changes[0].kind == "branch" and not layout.complete_steps(folder.url):
        _copy_checkpoint(stage, folder, changes[0].source)
    if settings.train.extend:
        changes = _extend(stage, folder, changes)
    return changes


# --- branches ---------------------------------------------------------------------------------------------------


def parse_source(given: str) -> tuple[RunFolder, str]:
    """RUN@STEP, RUN@trunk or RUN → the run's folder, and the step as text ("" if it is not given)."""
    run, at, step = given.rpartition("@")
    if at and (step.isdecimal() or step == TRUNK):
        return RunFolder(run), step
    return RunFolder(given), ""


def _branch(stage: Stage, folder: RunFolder, changes: list[Change], given: str) -> list[Change]:
    """Record a new branch. If the run already began as this branch, nothing is recorded.

    A run that began in any other way is refused.
    """
    source, wanted = parse_source(given)
    urls.check(source.url)
    if folder.url == source.url:
        raise ConfigError(f"--from={given}: is the run itself; give the branch another run.url, such as {source}-2")
    try:
        stored = read_description(source)
    except ObjectNotFound as error:
        raise ConfigError(f"--from={given}: there is no run at {source}; check the name") from error
    kept = changes[0].source if changes and changes[0].kind == "branch" else ""
    if kept:
        run, step = parse_source(kept)
        if run.url == _lasting(source).url and wanted in (step, "", TRUNK):
            return changes
        raise RunError(f"--from={given}: {folder} began from {kept}; use that, or give this branch another run.url")
    if changes or _has_begun(folder):
        raise RunError(f"--from={given}: {folder} holds a run that has begun; give the branch another run.url")
    _check_fixed(stage, given, stored["identity"])
    theirs = course.read(source)
    step = _step_of(source, given, wanted, theirs)
    change = Change("branch", step, source=f"{_lasting(source)}@{step}", **_climb_from(stage, step, stored, theirs))
    course.add(folder, 1, change)
    log.info("a branch of %s, at its step %d", source, step)
    return [change]


def _lasting(folder: RunFolder) -> RunFolder:
    return RunFolder(storage.lasting(folder.url))


def _has_begun(folder: RunFolder) -> bool:
    try:
        read_description(folder)
        return True
    except ObjectNotFound:
        return bool(layout.stored(folder.url))


def _step_of(source: RunFolder, given: str, wanted: str, changes: list[Change]) -> int:
    """The step to begin with: the named step, else the end of the newest trunk, else the newest checkpoint."""
    found = layout.complete_steps(source.url)
    trunk = next(reversed(course.trunks(changes)), None)
    if wanted == TRUNK and trunk is None:
        raise ConfigError(
            f"--from={given}: {source} has had no cooldown, so it has no trunk; name a step: {_steps(found)}"
        )
    newest = max(found, default=0) if trunk is None else trunk
    step = newest if wanted in ("", TRUNK) else int(wanted)
    if step not in found:
        raise ConfigError(f"--from={given}: {source} has no complete checkpoint of step {step}; {_steps(found)}")
    return step


def _steps(found: list[int]) -> str:
    return f"it has those of steps {', '.join(map(str, sorted(found)))}" if found else "it has none yet"


def _check_fixed(stage: Stage, given: str, theirs: Mapping[str, Any]) -> None:
    """Raises ConfigError if a setting differs that a branch must keep: model, optimizer or batch."""
    for key, value in stage.identity.items():
        if key.startswith(FIXED_IN_A_BRANCH) and key in theirs and theirs[key] != value:
            raise ConfigError(
                f"--from={given}: that run has {key}={theirs[key]!r}, this config has {key}={value!r}, and a branch "
                "keeps the model, the optimizer and the batch; use the same value"
            )


def _climb_from(stage: Stage, step: int, stored: Mapping[str, Any], theirs: list[Change]) -> dict[str, Any]:
    """The warm-up of the branch, if the schedule is wsd: a rate that a cooldown has lowered climbs back to the peak."""
    config = stage.settings.optimizer
    if config.schedule != "wsd" or step <= config.warmup_steps:
        return {}
    described = stored["config"]
    optimizer = loader.from_dict(OptimizerConfig, described["optimizer"], "run.json, optimizer")
    factor = Schedule(optimizer, described["train"]["steps"], theirs).factor(max(1, step))
    return {"factor": factor, "warmup": config.warmup_steps} if factor < 1 else {}


def _copy_checkpoint(stage: Stage, folder: RunFolder, origin: str) -> None:
    """Copy the checkpoint of another run. Raises CheckpointError if it is damaged or missing."""
    source, text = parse_source(origin)
    step = int(text)
    found = layout.stored(source.url)
    if layout.MARKER not in found.get(step, {}):
        raise CheckpointError(
            f"{source}: the checkpoint of step {step}, with which {folder} begins, is gone; restore it"
        )
    manifest = layout.read_manifest(source.url, step, found[step])
    for file in manifest.files:
        data = storage.read_bytes(storage.join(layout.folder_of(source.url, step), file.name))
        if layout.checksum(data) != file.xxh3_128:
            raise CheckpointError(
                f"{storage.join(layout.folder_of(source.url, step), file.name)}: checksum differs from its manifest's; "
                "begin the branch at another step"
            )
        storage.write_bytes(storage.join(layout.folder_of(folder.url, step), file.name), data)
    state = {**manifest.state, "config": stage.config, "data_fingerprint": stage.fingerprint, "origin": origin}
    # Segments count from 1. The number 0 means that no segment of this run has stored the checkpoint.
    layout.write_marker(folder.url, dataclasses.replace(manifest, segment=0, state=state))
    log.info("step %d of %s is copied", step, source)


# --- extensions -------------------------------------------------------------------------------------------------


def _extend(stage: Stage, folder: RunFolder, changes: list[Change]) -> list[Change]:
    """Record train.steps as the new length of the run.

    If the run already has this length, nothing is recorded.
    """
    settings = stage.settings
    try:
        stored = read_description(folder)
    except ObjectNotFound:
        return changes  # a new run has the length train.steps from its beginning
    schedule = Schedule(settings.optimizer, stored["identity"]["train.steps"], changes)
    lengths = [change.steps for change in changes if change.kind == "extend"]
    before, steps = next(reversed(lengths), schedule.first_steps), settings.train.steps
    if steps == before:
        return changes
    at = max(layout.complete_steps(folder.url), default=0)
    if steps <= max(at, before):
        raise ConfigError(
            f"--extend: train.steps is {steps}, but {folder} already has the length {before} and a checkpoint of step "
            f"{at}; give more steps than both"
        )
    change = Change("extend", at, steps, before=before, **_second_warmup(schedule, at))
    course.add(folder, len(changes) + 1, change)
    log.info("the run is extended from %d to %d steps, after step %d", before, steps, at)
    return [*changes, change]


def _second_warmup(schedule: Schedule, at: int) -> dict[str, Any]:
    """The warm-up after step `at`, in which the rate climbs back to its peak. In the trunk of wsd, there is none."""
    config = schedule.config
    factor = schedule.factor(at) if at else 1.0
    if config.schedule == "wsd" and (at <= config.warmup_steps or factor == 1.0):
        return {}
    return {"factor": factor, "warmup": config.warmup_steps}
