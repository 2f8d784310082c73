"""trainer.checkpoint: what counts, what is skipped by name, what is kept, who may write."""

import json

import pytest
import torch

from core import storage
from core.errors import CheckpointError, DiskFull
from core.run.folder import RunFolder
from core.run.ledger import Ledger
from core.run.machine import Machine
from core.settings.training import CheckpointConfig, ModelConfig, OptimizerConfig
from trainer.checkpoint import blocks, layout, load
from trainer.checkpoint.load import load_newest
from trainer.checkpoint.save import Saver
from trainer.model.gpt import GPT
from trainer.optim.optimizer import BlockOptimizer

MODEL = ModelConfig(layers=1, heads=2, width=8, context=4, padded_vocab_size=32)


def trained(seed: int, steps: int) -> tuple[GPT, BlockOptimizer]:
    """A model and its optimizer after some steps on made-up gradients."""
    model = GPT(MODEL)
    model.initialise(seed)
    optimizer = BlockOptimizer(model, OptimizerConfig(warmup_steps=0), rank=0, world=1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(0.01)
    return model, optimizer


def saver(run_url: str, ranks, optimizer: BlockOptimizer, segment: int = 1, **config: int) -> Saver:
    return Saver(run_url, segment, ranks, CheckpointConfig(**config), None, lambda: True, optimizer.blocks)


def save(run_url: str, ranks, *steps: int, segment: int = 1, **config: int) -> None:
    _, optimizer = trained(1, 1)
    each = saver(run_url, ranks, optimizer, segment, **config)
    for step in steps:
        each.begin(step, {"step": step})
        each.finish(step)


def test_what_is_loaded_is_what_was_saved(tmp_path, ranks):
    run_url = str(tmp_path)
    model, optimizer = trained(1, 3)
    each = saver(run_url, ranks, optimizer)
    each.begin(3, {"step": 3, "tokens": 99})
    # The snapshot is taken: what training does meanwhile must not reach the checkpoint.
    expected = {key: rows.clone() for key, rows in optimizer.blocks()}
    for parameter in model.parameters():
        parameter.data.zero_()
    each.finish(3)
    other_model, other = trained(2, 1)
    restored = load_newest(run_url, other, ranks)
    assert (restored.step, restored.state, restored.skipped) == (3, {"step": 3, "tokens": 99}, ())
    found = dict(other.blocks())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not torch.equal(other_model.wte.weight, model.wte.weight)


def test_payload_is_plain_safetensors(tmp_path, ranks):
    import safetensors.torch

    _, optimizer = trained(1, 2)
    staged = blocks.StagedFile(optimizer.blocks())
    staged.fill(optimizer.blocks())
    loaded = safetensors.torch.load(bytes(staged.data))
    assert loaded.keys() == dict(optimizer.blocks()).keys()
    assert all(torch.equal(loaded[key], rows) for key, rows in optimizer.blocks())


def test_nothing_stored_is_a_fresh_start(tmp_path, ranks):
    assert load_newest(str(tmp_path), trained(1, 1)[1], ranks) is None


def payload(run_url: str, step: int) -> str:
    manifest = layout.read_manifest(run_url, step, layout.stored(run_url)[step])
    return storage.join(layout.folder_of(run_url, step), manifest.files[0].name)


def flip(uri: str, position: int) -> None:
    data = bytearray(storage.read_bytes(uri))
    data[position] ^= 4
    storage.write_bytes(uri, bytes(data))


DAMAGES = {
    "no marker": (lambda run: storage.delete(f"{run}/checkpoints/step-00000002/COMPLETE"), "never finished"),
    "missing file": (lambda run: storage.delete(payload(run, 2)), "safetensors: missing"),
    "truncated": (
        lambda run: storage.write_bytes(payload(run, 2), storage.read_bytes(payload(run, 2))[:-5]),
        "its manifest says",
    ),
    "flipped bit": (lambda run: flip(payload(run, 2), -9), "checksum differs from its manifest's"),
    "flipped header": (lambda run: flip(payload(run, 2), 9), "checksum differs from its manifest's"),
    "swapped": (
        lambda run: storage.write_bytes(payload(run, 2), storage.read_bytes(payload(run, 1))),
        "checksum differs",
    ),
    "no manifest": (
        lambda run: storage.delete(f"{run}/checkpoints/step-00000002/manifest-segment-000001.json"),
        "incomplete",
    ),
    "edited manifest": (
        lambda run: flip(f"{run}/checkpoints/step-00000002/manifest-segment-000001.json", 30),
        "checksum differs from its marker's",
    ),
    "empty marker": (
        lambda run: storage.write_bytes(f"{run}/checkpoints/step-00000002/COMPLETE", b""),
        "damaged marker",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_newest_is_skipped_by_name_for_the_one_before(tmp_path, ranks, kind: str):
    damage, reason = DAMAGES[kind]
    run_url = str(tmp_path)
    _, optimizer = trained(1, 1)
    each = saver(run_url, ranks, optimizer)
    for step in (1, 2):
        optimizer.step(0.01)  # so that the two differ
        each.begin(step, {"step": step})
        each.finish(step)
    damage(run_url)
    restored = load_newest(run_url, trained(3, 1)[1], ranks)
    assert restored.step == 1
    ((name, why),) = restored.skipped
    assert name == "step-00000002"
    assert reason in why


def test_all_damaged_stops_and_leaves_the_targets_alone(tmp_path, ranks):
    run_url = str(tmp_path)
    save(run_url, ranks, 1, 2)
    for step in (1, 2):
        flip(payload(run_url, step), -1)
    model, optimizer = trained(5, 1)
    before = model.wte.weight.clone()
    with pytest.raises(
        CheckpointError, match=r"none of the 2 complete checkpoints can be used; the newest fails with: .*step-00000002"
    ):
        load_newest(run_url, optimizer, ranks)
    assert torch.equal(model.wte.weight, before)


@pytest.mark.parametrize("old_listings", [2, 99])
def test_a_listing_that_shows_only_removed_checkpoints_is_repeated(tmp_path, ranks, monkeypatch, old_listings: int):
    run_url, listed = str(tmp_path), []
    save(run_url, ranks, 1, 2, keep_last=2)
    old = layout.restorable(run_url)
    save(run_url, ranks, 3, 4, segment=2, keep_last=2)
    recent = layout.restorable

    def lagging(url: str) -> dict[int, dict[str, int]]:
        listed.append(url)
        return old if len(listed) <= old_listings else recent(url)

    monkeypatch.setattr(layout, "restorable", lagging)
    monkeypatch.setattr(load, "OLD_LISTING_SECONDS", (0.01, 0.01, 0.01))
    if old_listings == 2:
        assert load_newest(run_url, trained(2, 1)[1], ranks).step == 4
    else:
        with pytest.raises(CheckpointError, match="none of the 2 complete checkpoints can be used"):
            load_newest(run_url, trained(2, 1)[1], ranks)
    assert len(listed) == min(old_listings + 1, 4)


def test_another_models_checkpoint_is_refused(tmp_path, ranks):
    save(str(tmp_path), ranks, 1)
    wider = GPT(ModelConfig(layers=1, heads=2, width=8, context=4, padded_vocab_size=64))
    with pytest.raises(CheckpointError, match=r"holds 32 of 64 rows of model\.wte\.weight"):
        load_newest(str(tmp_path), BlockOptimizer(wider, OptimizerConfig(warmup_steps=0), 0, 1), ranks)


def test_retention_keeps_the_newest_and_the_multiples(tmp_path, ranks):
    save(str(tmp_path), ranks, *range(1, 12), keep_last=3, keep_every_steps=4)
    assert layout.complete_steps(str(tmp_path)) == [11, 10, 9, 8, 4]


def test_leftovers_of_dead_segments_go_and_newer_ones_stay(tmp_path, ranks):
    run_url = str(tmp_path)
    for step in (3, 9):
        storage.write_bytes(storage.join(layout.folder_of(run_url, step), layout.payload_name(1, 0, 1)), b"half")
    save(run_url, ranks, 5, segment=2)
    assert sorted(layout.stored(run_url)) == [5, 9]
    assert layout.complete_steps(run_url) == [5]


def test_a_machine_that_was_replaced_does_not_complete_its_checkpoint(tmp_path, ranks):
    run_url = str(tmp_path)
    old, new = (Ledger(RunFolder(run_url), Machine(), {}) for _ in range(2))
    _, optimizer = trained(1, 1)
    zombie = saver(run_url, ranks, optimizer, old.segment)
    zombie.begin(7, {"step": 7})
    with pytest.raises(CheckpointError, match="segment 2 has taken over this run, so segment 1 stops writing"):
        zombie.finish(7)
    assert zombie.taken_over is not None
    assert layout.complete_steps(run_url) == []
    save(run_url, ranks, 7, segment=new.segment)
    assert layout.complete_steps(run_url) == [7]
    for ledger in (old, new):
        ledger.close("finished")


def test_books_that_cannot_be_stored_hold_the_marker_back(tmp_path, ranks):
    _, optimizer = trained(1, 1)
    each = Saver(str(tmp_path), 1, ranks, CheckpointConfig(), None, lambda: False, optimizer.blocks)
    each.begin(1, {})
    with pytest.raises(
        CheckpointError, match="the metrics and the ledger of its steps must be stored first, but could not be stored"
    ):
        each.finish(1)
    assert layout.complete_steps(str(tmp_path)) == []


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_rows_are_assigned_once_and_evenly(world: int):
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPT(ModelConfig()).named_parameters()}
    assigned = blocks.assign_blocks(shapes, world)
    loads = [0] * world
    for name, shape in shapes.items():
        position = 0
        for block in sorted((each for each in assigned if each.name == name), key=lambda each: each.start):
            assert block.start == position
            position = block.stop
            loads[block.owner] += (block.stop - block.start) * shape[1:].numel()
        assert position == shape[0]
    assert max(loads) - min(loads) <= blocks.MAX_BLOCK_ELEMENTS
    cuts = {(each.name, each.start, each.stop) for each in assigned}
    assert cuts == {(each.name, each.start, each.stop) for each in blocks.assign_blocks(shapes, 1)}, (
        "cuts do not depend on ranks"
    )


def test_marker_names_its_manifest(tmp_path, ranks):
    save(str(tmp_path), ranks, 1)
    marker = json.loads(storage.read_bytes(storage.join(layout.folder_of(str(tmp_path), 1), layout.MARKER)))
    assert marker["manifest"] == "manifest-segment-000001.json"


@pytest.fixture
def small_disk(tmp_path, ranks, monkeypatch):
    """A function that limits the folder of the test to the size of so many checkpoints."""
    save(str(tmp_path / "measured"), ranks, 1)
    size = used(tmp_path / "measured")
    write = storage.write_bytes

    def limit(checkpoints: float) -> str:
        def write_if_it_fits(uri: str, data, **options) -> None:
            if used(tmp_path / "run") + len(data) > checkpoints * size:
                raise DiskFull(f"{uri}: could not write: the disk is full; free space or choose another folder")
            write(uri, data, **options)

        monkeypatch.setattr(storage, "write_bytes", write_if_it_fits)
        monkeypatch.setattr("trainer.checkpoint.save.AGAIN_SECONDS", 0.01)
        return str(tmp_path / "run")

    return limit


def used(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_gets_room_from_the_checkpoints_before_the_newest(small_disk, ranks, caplog):
    run_url = small_disk(2.5)
    save(run_url, ranks, 1, 2, 3, 4)
    assert layout.complete_steps(run_url) == [4, 3]
    assert "the disk is full: removed the checkpoints of steps 1" in caplog.text
    run_url = small_disk(1.5)  # the newest is never deleted before the next is complete
    _, optimizer = trained(1, 1)
    each = saver(run_url, ranks, optimizer)
    each.begin(5, {"step": 5})
    with pytest.raises(CheckpointError, match="the disk is full"):
        each.finish(5)
    assert layout.complete_steps(run_url) == [4]
    assert each.stuck is None


def test_a_disk_that_stays_full_ends_training(small_disk, ranks):
    run_url = small_disk(1.5)
    _, optimizer = trained(1, 1)
    each = saver(run_url, ranks, optimizer)
    for step in (1, 2, 3):
        each.begin(step, {"step": step})
        each.wait()
    assert each.stuck is None  # two in a row
    each.begin(4, {"step": 4})
    each.wait()
    assert "3 checkpoints in a row were not stored; the newest is step 1. Free space there" in str(each.stuck)
    assert layout.complete_steps(run_url) == [1]


def test_milestones_are_kept_on_a_full_disk(small_disk, ranks):
    run_url = small_disk(3.5)
    save(run_url, ranks, 1, 2, 3, 4, 5, keep_last=3, keep_every_steps=2)
    assert layout.complete_steps(run_url) == [5, 4, 2]
