"""What a run reads only at its evaluations is opened before it begins: nothing is written, and no step is paid for."""

import json
import shutil
from pathlib import Path

import pytest

from core.data import manifest, sets
from core.data.vocabulary import FILE_NAME
from tests import launching, models, tuning


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vocab_bpe) -> Path:
    """A token set with a HellaSwag set beside it."""
    return Path(models.prepare_data(tmp_path_factory.mktemp("data"), vocab_bpe, items=2))


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(whole, tmp_path / "data"))


def refused(data: Path, run: Path, *flags: str, ranks: int = 1, **environment: str) -> str:
    """The one error of a run that must not begin."""
    started = launching.start(
        ranks, f"--data.url={data}", f"--run.url={run}", "--train.steps=2", *flags, environment=environment
    )
    code, output = launching.finish(started)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code != 0
    assert len(errors) == 1, output
    assert "Traceback" not in output.split("error: ")[0], output
    assert not run.exists(), sorted(run.rglob("*"))
    return errors[0]


def test_a_vocabulary_that_is_missing_or_damaged(data: Path, tmp_path: Path):
    (data / FILE_NAME).write_bytes(b"cut off")
    assert f"{data / FILE_NAME}: line 1 is not a token rank" in refused(data, tmp_path / "run")
    (data / FILE_NAME).unlink()
    said = refused(data, tmp_path / "run", ranks=2)
    assert f"{data}: its vocabulary is not at {data / FILE_NAME}; set VOCAB_URL to" in said


def test_the_remedy_for_a_missing_vocabulary_works(data: Path, whole: Path, tmp_path: Path):
    (data / FILE_NAME).unlink()
    flags = [f"--data.url={data}", f"--run.url={tmp_path / 'run'}", "--train.steps=2"]
    output = launching.train(1, *flags, environment={"VOCAB_URL": str(whole / FILE_NAME)})
    assert "sample: The most important thing about" in output
    assert "HellaSwag" in output
    # Without samples and HellaSwag nothing needs one.
    plain = ["--train.sample_tokens=0", "--train.hellaswag_items=0", f"--run.url={tmp_path / 'plain'}"]
    assert "sample:" not in launching.train(1, *flags, *plain)


def test_a_damaged_hellaswag_set(data: Path, tmp_path: Path):
    rows = data / "sets" / "hellaswag.jsonl"
    good = rows.read_bytes()
    rows.write_bytes(good + b"\n")
    assert "its checksum has changed; store it again" in refused(data, tmp_path / "run")
    (data / "sets" / "hellaswag.json").write_text('{"broken')
    assert "not a description of a set" in refused(data, tmp_path / "run")
    item = {**json.loads(good.splitlines()[0]), "label": "9"}
    sets.write(str(data), "hellaswag", "hellaswag", "made", "MIT", json.dumps(item).encode() + b"\n")
    assert "HellaSwag item 0: ValueError: label 9 with 4 endings; store the set again" in refused(
        data, tmp_path / "run"
    )


def test_shards_that_are_missing_or_cut_off(data: Path, tmp_path: Path):
    shard = data / manifest.read(str(data)).splits["val"].shards[-1].name
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    said = refused(data, tmp_path / "run")
    assert f"{shard}: has {len(content) - 2:,} bytes, the manifest says {len(content):,}; copy it again" in said
    shard.unlink()
    assert f"{shard}: this shard of the manifest is missing; copy it again" in refused(data, tmp_path / "run")


def test_tuning_opens_them_too(pretrained, data: Path, tmp_path: Path):
    rows = tuning.write_rows(tmp_path / "rows.jsonl", tuning.conversations(8))
    (data / "sets" / "hellaswag.json").write_text('{"broken')
    flags = ["--stage=finetune", f"--start.weights={pretrained[1]}", f"--data.examples={rows}", f"--data.url={data}"]
    base = [*tuning.BATCH, *tuning.QUIET, f"--run.url={tmp_path / 'run'}", "--train.steps=2"]
    code, output = launching.finish(launching.start(1, *flags, base=base))
    assert code == 1
    assert "not a description of a set" in output.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["finetune", "dpo", "distil"])
def test_damaged_weights_of_the_start(stage: str, pretrained, tmp_path: Path):
    """A byte of the newest checkpoint has changed; its manifest, which is read first, is whole."""
    start = Path(shutil.copytree(pretrained[1], tmp_path / "start"))
    newest = max(start.glob("checkpoints/step-*"))
    payload = max(newest.iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(payload.read_bytes())
    content[-1] ^= 1
    payload.write_bytes(content)
    rows = tuning.preferences(8) if stage == "dpo" else tuning.conversations(8)
    examples = f"--data.examples={tuning.write_rows(tmp_path / 'rows.jsonl', rows)}"
    places = [f"--start.weights={start}", f"--data.url={pretrained[0]}", f"--run.url={tmp_path / 'run'}"]
    more = [*tuning.MODEL, f"--teacher.weights={pretrained[1]}"] if stage == "distil" else [examples]
    said = tuning.refused(
        "trainer.train", f"--stage={stage}", *tuning.BATCH, *tuning.QUIET, "--train.steps=2", *places, *more
    )
    assert f"{payload}: checksum differs from its manifest's" in said
    assert not (tmp_path / "run").exists()
