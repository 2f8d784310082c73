"""Links in a local store: every listing follows them, each folder once, and none hides a checkpoint."""

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core import storage
from core.errors import CheckpointError, RunError, StorageError
from core.run.folder import RunFolder
from core.run.ledger import Ledger
from core.run.machine import Machine
from core.run.reader import read_run, spent_usd_at_most
from launch import runs
from tests import checkpoints
from tests.test_checkpoint import save, trained
from trainer.checkpoint import layout
from trainer.checkpoint.load import load_newest
from trainer.import_weights import write_first_checkpoint
from trainer.weights.folder import check_empty
from trainer.weights.open import look_up, open_weights


def put(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def listed(folder: Path) -> list[str]:
    return [info.uri.removeprefix(f"{folder}/") for info in storage.list_objects(str(folder))]


def expanded(folder: Path, pattern: str) -> list[str]:
    return [uri.removeprefix(f"{folder}/") for uri in storage.expand(f"{folder}/{pattern}")]


@contextlib.contextmanager
def as_one_who_obeys_permissions() -> Iterator[None]:
    """Root reads what it may not: this thread gives up the capabilities for that (CAP_DAC_OVERRIDE and READ_SEARCH)."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    held = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, held) == 0, os.strerror(ctypes.get_errno())
    fewer = (ctypes.c_uint32 * 6)(*held)
    fewer[0] &= ~0b110
    assert libc.capset(header, fewer) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0, os.strerror(ctypes.get_errno())


@contextlib.contextmanager
def unreadable(folder: Path) -> Iterator[None]:
    folder.chmod(0)
    try:
        with as_one_who_obeys_permissions():
            yield
    finally:
        folder.chmod(0o700)


# --- listings --------------------------------------------------------------------------------------------------


def test_listings_follow_links_and_read_each_folder_once(tmp_path: Path):
    run, disk = tmp_path / "run", tmp_path / "disk"
    put(run / "real/1", run / "top", disk / "a/2", disk / "a/deep/3", disk / "file")
    (run / "linked").symlink_to(disk / "a")
    (run / "again").symlink_to("real")  # the name without a link is kept
    (run / "linked-file").symlink_to(disk / "file")
    (run / "real/up").symlink_to("..")
    (disk / "a/loop").symlink_to(disk / "a")
    (disk / "a/home").symlink_to(run)
    assert listed(run) == ["linked-file", "linked/2", "linked/deep/3", "real/1", "top"]
    assert expanded(run, "**") == listed(run)
    assert expanded(run, "*/[0-9]") == ["linked/2", "real/1"]
    assert expanded(run, "**/[0-9]") == ["linked/2", "linked/deep/3", "real/1"]
    (tmp_path / "alias").symlink_to(run)
    assert listed(tmp_path / "alias") == listed(run)


def test_a_folder_keeps_the_name_with_the_fewest_links(tmp_path: Path):
    put(tmp_path / "disk/steps/step/1")
    run = tmp_path / "run"
    run.mkdir()
    (run / "all").symlink_to(tmp_path / "disk/steps")
    (run / "step").symlink_to(tmp_path / "disk/steps/step")
    assert listed(run) == ["step/1"]


def test_a_pattern_finds_a_folder_under_the_name_that_fits_it(tmp_path: Path):
    """Though the same folder has a name without links, at which the pattern does not reach its files."""
    put(tmp_path / "a/x.bin")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/link").symlink_to("../a")
    assert expanded(tmp_path, "*/*/x.bin") == ["b/link/x.bin"]
    assert expanded(tmp_path, "b*/**/x.bin") == ["b/link/x.bin"]


def test_a_link_to_nothing_is_not_an_absent_object(tmp_path: Path):
    put(tmp_path / "data/1.bin", tmp_path / "data/sub/2.bin")
    (tmp_path / "data/3.bin").symlink_to("/gone/3.bin")
    (tmp_path / "data/self").symlink_to("self")
    assert listed(tmp_path / "data") == ["1.bin", "3.bin", "self", "sub/2.bin"]
    assert storage.list_names(str(tmp_path / "data")) == ["1.bin", "3.bin", "self", "sub"]
    # What a pattern asks for is there, and reading it says what is wrong.
    assert expanded(tmp_path, "data/*.bin") == ["data/1.bin", "data/3.bin"]
    with pytest.raises(StorageError, match=r"3\.bin: not found"):
        storage.read_bytes(f"{tmp_path}/data/3.bin")
    # A folder may have been behind it, with files that fit.
    for pattern in ("data/*/*.bin", "data/**/2.bin"):
        with pytest.raises(StorageError, match=r"is a link to .*, which does not exist; mount or restore it"):
            expanded(tmp_path, pattern)


@pytest.mark.parametrize("below", ["", "/checkpoints", "/a/b"])
def test_a_folder_that_should_be_behind_a_link_is_no_empty_one(tmp_path: Path, below: str):
    (tmp_path / "run").symlink_to("/gone/run")
    for call in (
        storage.list_objects,
        storage.list_names,
        lambda uri: storage.expand(f"{uri}/*"),
        lambda uri: storage.write_bytes(f"{uri}/run.json", b"", exclusive=True),  # the name is not taken either
    ):
        with pytest.raises(StorageError, match=r"run: is a link to /gone/run, which does not exist; mount or"):
            call(f"{tmp_path}/run{below}")


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path):
    put(tmp_path / "data/1.bin", tmp_path / "data/closed/2.bin")
    with unreadable(tmp_path / "data/closed"):
        for call in (
            lambda: listed(tmp_path / "data"),
            lambda: storage.list_names(f"{tmp_path}/data/closed"),
            lambda: expanded(tmp_path, "data/*/*.bin"),
            lambda: expanded(tmp_path, "data/**/*.bin"),
        ):
            with pytest.raises(StorageError, match=r"may not list .*closed.*check file permissions"):
                call()
        assert expanded(tmp_path, "data/*.bin") == ["data/1.bin"], "where the pattern does not lead is not looked at"


def test_what_holds_only_a_link_to_nothing_is_not_empty(tmp_path: Path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").symlink_to("/gone/config.json")
    with pytest.raises(Exception, match="holds 1 objects already"):
        check_empty(str(target))


# --- checkpoints -----------------------------------------------------------------------------------------------


def move_and_link(run: Path, disk: Path, *steps: int) -> None:
    disk.mkdir(exist_ok=True)
    for step in steps:
        folder = Path(layout.folder_of(str(run), step))
        folder.rename(disk / folder.name)
        folder.symlink_to(disk / folder.name)


@pytest.fixture
def run(tmp_path: Path, ranks) -> Path:
    """A run with checkpoints of the steps 1, 2 and 3."""
    save(str(tmp_path / "run"), ranks, 1, 2, 3, keep_last=3)
    return tmp_path / "run"


@pytest.mark.parametrize("steps", [(1, 2, 3), (3,), (1,)], ids=str)
def test_checkpoints_behind_links_are_resumed_from(run: Path, tmp_path: Path, ranks, steps: tuple[int, ...]):
    move_and_link(run, tmp_path / "disk", *steps)
    assert load_newest(str(run), trained(2, 1)[1], ranks).step == 3


def test_a_linked_folder_of_checkpoints_is_resumed_from(run: Path, tmp_path: Path, ranks):
    (run / "checkpoints").rename(tmp_path / "disk")
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    assert load_newest(str(run), trained(2, 1)[1], ranks).step == 3


def break_link(run: Path, disk: Path) -> None:
    move_and_link(run, disk, 3)
    disk.rename(f"{disk}-elsewhere")


def break_marker(run: Path, disk: Path) -> None:
    marker = run / "checkpoints/step-00000003/COMPLETE"
    marker.unlink()
    marker.symlink_to(disk / "COMPLETE")


def two_names(run: Path, _: Path) -> None:
    (run / "checkpoints/step-00000004").symlink_to("step-00000003")


def file_instead(run: Path, _: Path) -> None:
    put(run / "checkpoints/step-00000004")


@pytest.mark.parametrize(
    ("hide", "message"),
    [
        (
            break_link,
            r"step-00000003: is a link to .*disk/step-00000003, which does not exist; mount or restore it, or",
        ),
        (
            break_marker,
            r"step-00000003/COMPLETE: is a link to .*disk/COMPLETE, which does not exist",
        ),
        (two_names, r"step-00000004: one listing of the store shows it and another does not; check the store, or move"),
        (file_instead, r"step-00000004: is a file, but should be a checkpoint.s folder"),
    ],
)
def test_a_step_that_may_be_hidden_stops_training(run: Path, tmp_path: Path, ranks, hide, message: str):
    """It neither starts over nor resumes from an older one. Nor does what evaluates, exports or talks to it."""
    hide(run, tmp_path / "disk")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_newest(str(run), trained(2, 1)[1], ranks)
    assert f"out of {run}/checkpoints to go on without it" in str(caught.value)
    with pytest.raises(CheckpointError, match=message):
        look_up(str(run))
    assert look_up(layout.folder_of(str(run), 2))[1] == {"step": 2}, "one that is asked for by name needs no other"


def test_a_step_that_cannot_be_read_stops_training(run: Path, ranks):
    with (
        unreadable(run / "checkpoints/step-00000003"),
        pytest.raises(CheckpointError, match=r"step-00000003: may not be read .*; make it readable for this user"),
    ):
        load_newest(str(run), trained(2, 1)[1], ranks)


@pytest.mark.parametrize("hidden", ["step-00000003/", "step-00000003/COMPLETE"])
def test_a_store_whose_listings_disagree_stops_training(run: Path, ranks, monkeypatch, hidden: str):
    real, listings = storage.list_objects, []

    def forgetful(prefix: str) -> list[storage.ObjectInfo]:
        listings.append(prefix)
        return [info for info in real(prefix) if hidden not in info.uri]

    monkeypatch.setattr(storage, "list_objects", forgetful)
    with pytest.raises(CheckpointError, match="step-00000003: one listing of the store shows it and another does not"):
        load_newest(str(run), trained(2, 1)[1], ranks)
    assert len(listings) == layout.LISTINGS


def test_a_listing_that_was_only_late_does_not_stop_training(run: Path, ranks, monkeypatch):
    """Another machine of the run completes a checkpoint between two listings."""
    real, listings = storage.list_objects, []

    def late(prefix: str) -> list[storage.ObjectInfo]:
        listings.append(prefix)
        return [info for info in real(prefix) if len(listings) > 1 or "step-00000003" not in info.uri]

    monkeypatch.setattr(storage, "list_objects", late)
    assert load_newest(str(run), trained(2, 1)[1], ranks).step == 3


def test_a_folder_that_pruning_left_empty_hides_nothing(tmp_path: Path, ranks):
    save(str(tmp_path), ranks, 1, 2, 3, keep_last=2)
    assert "step-00000001" in storage.list_names(f"{tmp_path}/checkpoints")
    assert load_newest(str(tmp_path), trained(2, 1)[1], ranks).step == 3


def test_an_unfinished_step_in_a_bucket_hides_nothing(bucket: str, ranks):
    save(bucket, ranks, 1, 2, 3, keep_last=2)
    storage.delete(f"{layout.folder_of(bucket, 3)}/COMPLETE")
    assert list(layout.restorable(bucket)) == [3, 2]
    assert load_newest(bucket, trained(2, 1)[1], ranks).step == 2


def test_an_import_does_not_take_a_run_with_a_broken_link_for_a_new_one(tmp_path: Path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step-00000009").symlink_to("/gone/step-00000009")
    settings = type("Settings", (), {"run": type("Run", (), {"url": str(tmp_path / "run")})})
    with pytest.raises(RunError, match="holds objects already"):
        write_first_checkpoint(settings, None, "", "")


# --- pruning ---------------------------------------------------------------------------------------------------


def test_pruning_removes_a_checkpoint_behind_a_link_and_nothing_else_there(run: Path, tmp_path: Path, ranks):
    disk = tmp_path / "disk"
    move_and_link(run, disk, 1, 3)
    put(disk / "step-00000001/notes.txt", disk / "step-00000001/sub/file", disk / "step-00000007/COMPLETE")
    save(str(run), ranks, 4, keep_last=2)
    assert layout.complete_steps(str(run)) == [4, 3]
    assert sorted(path.name for path in (disk / "step-00000001").iterdir()) == ["notes.txt", "sub"]
    assert (disk / "step-00000007/COMPLETE").exists()
    assert load_newest(str(run), trained(2, 1)[1], ranks).step == 4, "what is left there is no checkpoint"


def test_pruning_does_not_touch_the_checkpoints_of_another_run(run: Path, tmp_path: Path, ranks):
    """A run that goes on from a step of another one, by a link to it."""
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        Path(layout.folder_of(str(other), step)).symlink_to(layout.folder_of(str(run), step))
    save(str(other), ranks, 4, 5, keep_last=2)
    assert layout.complete_steps(str(other)) == [5, 4]
    assert storage.list_names(f"{other}/checkpoints") == ["step-00000004", "step-00000005"]
    assert layout.complete_steps(str(run)) == [3, 2, 1]
    assert load_newest(str(run), trained(2, 1)[1], ranks).step == 3


def test_a_step_that_links_to_the_run_itself_costs_it_nothing(run: Path, ranks):
    put(run / "run.json")
    (run / "checkpoints/step-00000000").symlink_to("..")
    save(str(run), ranks, 4, keep_last=3)
    assert layout.complete_steps(str(run)) == [4, 3, 2]
    assert (run / "run.json").exists()


# --- other readers ---------------------------------------------------------------------------------------------


def test_pull_takes_the_runs_own_newest_checkpoint(run: Path, tmp_path: Path, ranks):
    """Not that of a run that it links to, which its listing now shows as well."""
    put(run / "run.json")
    save(str(tmp_path / "other"), ranks, 9)
    (run / "before").symlink_to(tmp_path / "other")
    chosen = runs.choose(str(run), storage.list_objects(str(run)))
    assert {Path(info.uri).parent.name for info in chosen} == {"run", "step-00000003"}


def test_what_a_linked_segment_cost_still_counts(tmp_path: Path):
    url = str(tmp_path / "run")
    for _ in range(2):
        Ledger(RunFolder(url), Machine(usd_per_hour=3.0), {}).close("finished")
    before, spent = [segment.end for segment in read_run(url).segments], spent_usd_at_most(url)
    (tmp_path / "run/ledger/segment-000001").rename(tmp_path / "disk")
    (tmp_path / "run/ledger/segment-000001").symlink_to(tmp_path / "disk")
    assert [segment.end for segment in read_run(url).segments] == before
    assert spent_usd_at_most(url) == spent


def test_the_newest_checkpoint_behind_a_link_is_pulled_and_opened(tmp_path: Path):
    run = tmp_path / "run"
    for step in (1, 2):
        checkpoints.store(str(run), checkpoints.random_model(seed=step), step)
    move_and_link(run, tmp_path / "disk", 2)
    put(run / "run.json")
    done = subprocess.run(
        [sys.executable, "-m", "launch.runs", "pull", str(run), str(tmp_path / "copy")], capture_output=True, text=True
    )
    assert "checkpoint: step-00000002" in done.stdout, done.stderr
    assert layout.complete_steps(str(tmp_path / "copy")) == [2]
    assert open_weights(str(run), checkpoints.torch.device("cpu")).step == 2
