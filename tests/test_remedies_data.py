"""What messages about data tell a user to do, done as printed: the same program then accepts it."""

import json
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.data import manifest
from core.data import vocabulary as vocabularies
from core.errors import LauncherError
from core.settings import loader
from core.settings.preparation import PrepConfig
from data_prep import encode, fetch, inspect, prepare, sets, verify
from data_prep.sources import json_files
from tests.corpus import documents, write_parquet

SMALL = ("--data.part_bytes=20000", "--data.shard_tokens=5000", "--data.val_fraction=0.1", "--workers=1")


@pytest.fixture(autouse=True)
def vocabulary(vocab_bpe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOCAB_URL", str(vocab_bpe))
    for name in ("RUN_URL", "DATA_URL", "SOURCE_URL"):
        monkeypatch.delenv(name, raising=False)


def refused(program: ModuleType, *arguments: str) -> str:
    """What a program says when it refuses."""
    with pytest.raises(LauncherError) as caught:
        program.main(list(arguments))
    return str(caught.value)


def found(pattern: str, said: str) -> Sequence[str]:
    match = re.search(pattern, said)
    assert match, said
    return match.groups()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, vocab_bpe: Path) -> tuple[Path, list[str]]:
    """A prepared set, and the arguments that prepare it. Its folder has a blank in its name."""
    folder = tmp_path_factory.mktemp("a set")
    source = write_parquet(folder / "source", [documents(150), documents(250)[150:]])
    arguments = [f"--source.url={source}", *SMALL, f"--tokenizer.vocab_url={vocab_bpe}"]
    prepare.main([*arguments, f"--data.url={folder / 'set'}"])
    return folder / "set", arguments


@pytest.fixture
def copy(whole: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy to break, and the arguments that prepare it."""
    place = tmp_path / "a copy"
    shutil.copytree(whole[0], place)
    return place, [*whole[1], f"--data.url={place}"]


# --- sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_column_is_named_as_the_message_says(kind: str, tmp_path: Path):
    rows = {"a": documents(50), "b": documents(50, 30)}
    if kind == "parquet":
        pq.write_table(pa.table(rows), tmp_path / "x.parquet")
    else:
        lines = [json.dumps(dict(zip(rows, row, strict=True))) + "\n" for row in zip(*rows.values(), strict=True)]
        (tmp_path / "x.jsonl").write_text("".join(lines))
    arguments = (f"--source.url={tmp_path / f'x.{kind}'}", f"--data.url={tmp_path / 'set'}", "--workers=1")
    column, flag = found(r"only (\w+) \(.*: (--source\.text_column=)\.\.\.$", refused(prepare, *arguments))
    assert prepare.main([*arguments, f"{flag}{column}"]) == 0
    other = (*arguments[:1], f"--data.url={tmp_path / 'other'}", "--workers=1")
    assert "has no column 'aa', only a, b" in refused(prepare, *other, f"{flag}aa")


def test_a_folder_is_named_as_the_message_says(tmp_path: Path):
    write_parquet(tmp_path / "source", [documents(20)])
    rest = (f"--data.url={tmp_path / 'set'}", "--workers=1")
    said = refused(prepare, f"--source.url={tmp_path / 'source'}", *rest)
    [files] = found(r"is a folder; name the files in it: (.*)$", said)
    assert prepare.main([f"--source.url={files}", *rest]) == 0


def test_filters_of_columns_are_left_out_for_plain_text(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n".join(documents(30)))
    (tmp_path / "b.txt").write_text("\n".join(documents(31)))
    arguments = {"source": f"--source.url={tmp_path}/*.txt", "data": f"--data.url={tmp_path / 'set'}"}
    filters = {"filter.min_score": "--filter.min_score=3", "filter.languages": "--filter.languages=en"}
    names = found(
        r"unset (filter\.min_score) and (filter\.languages)", refused(prepare, *arguments.values(), *filters.values())
    )
    kept = [flag for name, flag in filters.items() if name not in names]
    assert prepare.main([*arguments.values(), "--workers=1", *kept]) == 0


def test_the_share_of_bad_rows_is_raised_for_the_same_folder(tmp_path: Path):
    """Bad rows behind the first ones, so that some parts are finished when they are counted."""
    texts = [*documents(400), *[None] * 40]
    write_parquet(tmp_path / "source", [texts])
    arguments = (f"--source.url={tmp_path}/source/*.parquet", f"--data.url={tmp_path / 'set'}", *SMALL)
    said = refused(prepare, *arguments)
    [setting] = found(r"more than (source\.max_bad_share) = 0\.01; .* or raise that share", said)
    assert prepare.main([*arguments, f"--{setting}=0.5"]) == 0


def test_one_large_json_document_is_written_as_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"text": text} for text in documents(50)]
    (tmp_path / "FILE.json").write_text(json.dumps(rows))
    monkeypatch.setattr(json_files, "LARGEST_DOCUMENT_BYTES", 1000)
    rest = (f"--data.url={tmp_path / 'set'}", "--workers=1")
    said = refused(prepare, f"--source.url={tmp_path / 'FILE.json'}", *rest)
    [query, made] = found(r"jq -c '(.*)' FILE\.json > (FILE\.jsonl)", said)
    assert query == ".[]"  # what the next line does
    (tmp_path / made).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert prepare.main([f"--source.url={tmp_path / made}", *rest]) == 0


def test_the_slower_tokenizer_is_taken_where_the_fast_one_cannot_be_imported(
    vocab_bpe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    known = vocabularies.read(str(vocab_bpe))
    with pytest.raises(LauncherError) as caught:
        encode.open_engine("gigatoken", known)
    [flag] = found(r"or set (--tokenizer\.engine=tiktoken)", str(caught.value))
    chosen = loader.load(PrepConfig, ["--data.url=/d", "--source.url=/s.txt", flag], {}).tokenizer.engine
    assert encode.open_engine(chosen, known).name == "tiktoken"


# --- a preparation that is not finished, or is damaged -----------------------------------------------------------


def test_missing_parts_are_prepared_with_the_named_settings(copy: tuple[Path, list[str]]):
    place, arguments = copy
    before = manifest.read(str(place)).fingerprint
    (place / "manifest.json").unlink()
    (place / "parts/00001.json").unlink()
    [module, flag] = found(
        r"run python -m ([\w.]+) with the same settings and (--phase=all)",
        refused(prepare, *arguments, "--phase=finalize"),
    )
    assert module == "data_prep.prepare"
    assert prepare.main([*arguments, "--phase=finalize", flag]) == 0
    assert manifest.read(str(place)).fingerprint == before


@pytest.mark.parametrize(
    "damage", [b"", b"{", b'{"format": "tokens"}', None], ids=["empty", "cut", "other", "incomplete"]
)
def test_a_damaged_manifest_is_deleted_and_written_again(damage: bytes | None, copy: tuple[Path, list[str]]):
    place, arguments = copy
    file = place / "manifest.json"
    before = json.loads(file.read_bytes())
    if damage is None:
        damage = json.dumps({key: value for key, value in before.items() if key != "splits"}).encode()
    file.write_bytes(damage)
    said = refused(verify, str(place))
    if "it is not a manifest of a dataset" not in said:
        assert "delete it, and run the command that prepared the data again" in said
    assert refused(prepare, *arguments) == said
    file.unlink()
    assert prepare.main(arguments) == 0
    assert json.loads(file.read_bytes()) == before


def test_a_damaged_record_of_a_part_is_deleted_and_made_again(copy: tuple[Path, list[str]]):
    place, arguments = copy
    before = (place / "manifest.json").read_bytes()
    (place / "manifest.json").unlink()
    (place / "parts/00000.json").write_text("{")
    [record] = found(r"^(.*): not a record of a part .*; delete it and prepare again", refused(prepare, *arguments))
    Path(record).unlink()
    assert prepare.main(arguments) == 0
    assert (place / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("damage", ["gone", "cut", "header", "magic"])
def test_a_damaged_shard_is_mended_by_deleting_the_set(damage: str, copy: tuple[Path, list[str]], capsys):
    place, arguments = copy
    shard = sorted((place / "train").glob("*.bin"))[0]
    content = shard.read_bytes()
    shard.unlink()
    if damage != "gone":
        shard.write_bytes({"cut": content[:-2], "header": content[:9], "magic": b"0000" + content[4:]}[damage])
    assert verify.main([str(place)]) == 1
    assert "delete the set and prepare it again" in capsys.readouterr().out.splitlines()[-1]
    shutil.rmtree(place)
    assert prepare.main(arguments) == 0
    assert shard.read_bytes() == content
    assert verify.main([str(place)]) == 0


def test_another_preparation_takes_another_folder(copy: tuple[Path, list[str]], tmp_path: Path):
    place, arguments = copy
    said = refused(prepare, *arguments, "--data.seed=3")
    [setting] = found(r"nothing was changed: choose another (data\.url), or delete that folder", said)
    assert prepare.main([*arguments, "--data.seed=3", f"--{setting}={tmp_path / 'other'}"]) == 0
    shutil.rmtree(place)
    assert prepare.main([*arguments, "--data.seed=3"]) == 0


def test_what_is_printed_at_the_end_checks_the_set(copy: tuple[Path, list[str]], capsys: pytest.CaptureFixture):
    place, arguments = copy
    prepare.main(arguments)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("check it ")]
    command = shlex.split(line.removeprefix("check it "))
    assert command == ["python", "-m", "data_prep.verify", str(place)]
    assert verify.main(command[3:]) == 0


# --- imported shards ---------------------------------------------------------------------------------------------


def test_a_file_in_both_splits_is_left_out_as_the_message_says(tmp_path: Path):
    for name in ("train_0", "val_0"):
        np.save(tmp_path / f"{name}.npy", np.arange(3000, dtype=np.uint16) + len(name))
    flags = {"train": f"--source.train_url={tmp_path}/*.npy", "val": f"--source.val_url={tmp_path}/*val*.npy"}
    said = refused(fetch, *flags.values(), f"--data.url={tmp_path / 'set'}")
    train, example, val = found(
        r"narrow (source\.train_url), .* to (\*train\*), or leave (source\.val_url) empty", said
    )
    one = [f"--{train}={tmp_path}/{example}.npy", flags["val"], f"--data.url={tmp_path / 'one'}"]
    other = [flags["train"], f"--{val}=", f"--data.url={tmp_path / 'other'}"]
    assert fetch.main(one) == fetch.main(other) == 0


# --- example sets, and the programs that show and check ------------------------------------------------------------

ROWS = [{"instruction": f"{i}?", "output": f"{i}."} for i in range(20)]
PAIRS = [{"prompt": f"{i}?", "chosen": f"{i}.", "rejected": "No."} for i in range(20)]


@pytest.mark.parametrize(
    ("kind", "name"), [("instructions", "instructions"), ("instructions", "mine"), ("preferences", "p")]
)
def test_a_set_is_stored_with_the_command_that_is_printed(kind: str, name: str, tmp_path: Path):
    from core.data import sets as stored

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (PAIRS if kind == "preferences" else ROWS)))
    place = str(tmp_path / "a set")
    if kind == "instructions":  # only its name tells the kind of a set that is not there
        [first] = found(r"store it first: (.*)$", said_of(stored, place, name))
        run_printed(first, rows)
    else:
        sets.main([kind, place, f"--from={rows}", f"--name={name}"])
    assert len(stored.read(place, name)) == 20
    (tmp_path / f"a set/sets/{name}.jsonl").write_text("{}\n")
    source, again = found(
        r"checksum has changed; store it again, from (.*): (python .*)$", said_of(stored, place, name)
    )
    assert source == str(rows)
    run_printed(again, rows)
    assert len(stored.read(place, name)) == 20


def said_of(stored: ModuleType, place: str, name: str) -> str:
    with pytest.raises(LauncherError) as caught:
        stored.read(place, name)
    return str(caught.value)


def run_printed(command: str, rows: Path) -> None:
    words = shlex.split(command.replace("--from=FILE", shlex.quote(f"--from={rows}")))
    assert words[:3] == ["python", "-m", "data_prep.sets"]
    assert sets.main(words[3:]) == 0


def test_flags_of_sets_and_inspect(copy: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = str(copy[0])
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    [flag] = found(r"as (--from=rows\.jsonl)$", refused(sets, "instructions", place))
    assert sets.main(["instructions", place, flag]) == 0
    assert "--help" in refused(sets, "instruction", place)
    assert sets.main(["--help"]) == 0
    known = found(r"known flags: (\S+), (\S+), (\S+), (--set=), (\S+)$", refused(inspect, place, "--sample=1"))
    assert inspect.main([place, *known]) == 0
    [example] = found(r"python -m data_prep\.inspect (DATA_URL --samples=3)$", refused(inspect))
    assert inspect.main([place if word == "DATA_URL" else word for word in example.split()]) == 0
