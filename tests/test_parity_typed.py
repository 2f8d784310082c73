"""The commands of docs/parity.md are typed: programs to their end, training to its first step, launches up to sky."""

import contextlib
import re
import shlex
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
import yaml

from core.data import manifest
from core.run.reader import read_run
from core.settings import loader
from core.settings.preparation import FetchConfig, PrepConfig
from core.task import read_task
from tests import corpus, launching, parity, parity_world
from tests.fake_endpoint import FakeEndpoint
from tests.parity_world import CONFIG, SETS, SHORT, Place, World
from tests.patience import PATIENCE_SECONDS

FIRST_STEP = "the first step began"
PLAIN = "python -m trainer.train CONFIG --data.url=DATA_URL --run.url=RUN_URL"
# Targets whose task has another name.
TASKS = {"pretrain": "pretrain-8xa100", "pretrain-spot": "pretrain-8xa100-spot", "image": "build-image"}
# Something that the output of a program has only if it did its work.
SAYS = {
    "data_prep.inspect": "tokens",
    "data_prep.sets": "SHA-256",
    "trainer.evaluate": "metric",
    "trainer.import_weights": "parameters of",
    "trainer.synthesize": "2 rows",
    "trainer.train": "--optimizer.lr",
    "cost_report.py": r"\$|USD",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory, vocab_bpe) -> World:
    return parity_world.make(tmp_path_factory.mktemp("parity"), vocab_bpe)


@pytest.fixture
def place(world: World, tmp_path: Path) -> Place:
    (tmp_path / "clone/home").mkdir(parents=True)
    return Place(world, tmp_path / "clone")


# --- cheap: who types what -----------------------------------------------------------------------------------------


def test_every_command_of_the_page_is_typed_by_somebody_or_has_a_reason():
    kinds = {command: parity.kind_of(command) for command in parity.commands()}
    tables = {*parity.ELSEWHERE, *parity.UNTYPED, *parity.LOGGED, *parity.NAMED, *parity.ALONE}
    assert tables <= set(kinds), "a table names a command that the page no longer has"
    for part in parity.ADDED:
        assert any(part in command for command in kinds), part
    for where in parity.ELSEWHERE.values():
        file, name = where.split("::")
        assert f"def {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8"), where
    assert all(len(reason) > 20 for reason in parity.UNTYPED.values())


@pytest.mark.parametrize("command", ["python -m trainer.new RUN_URL", "python new.py", "torchrun -m new", "new"])
def test_a_new_kind_of_command_is_noticed(command: str):
    with pytest.raises(ValueError, match=r"say in tests/parity\.py who types it"):
        parity.kind_of(command)


# --- training ------------------------------------------------------------------------------------------------------


def train(place: Place, command: str, until: str = FIRST_STEP) -> str:
    """Type a training command, ask it to stop once it has said `until`, and return its output.

    It may also have finished by then. A step of a GPU's size takes minutes here, so a command with such a batch is
    killed when it has printed this batch.
    """
    large = re.search(r"--batch.tokens_per_step=(\d+)", command)
    if large:
        until = f"batch: {int(large[1]):,} tokens"
    run = place.copied(place.world.run, "run") if "extend" in command else place.clone / "run"
    config = place.world.folder / "finished.yaml" if "extend" in command else place.clone / "config.yaml"
    words = place.words(command, RUN_URL=run, DATA_URL=place.world.data, CONFIG=config)
    if "launch.node" in command:
        facts = {"RUN_URL": str(run), "DATA_URL": str(place.world.data), "DEVICE": "cpu", "RANKS_PER_NODE": "1"}
        place.environment |= facts | {"CLOUD": ""}
    before = read_run(str(run)).last_step if run.exists() else 0
    process = place.start([*words, *parity.added_to(command)])
    output = ""
    try:
        for line in process.stdout:
            output += line
            if until in line:
                if large:
                    break
                process.terminate()
        code = None if large else process.wait(PATIENCE_SECONDS)
    finally:
        launching.kill(process)
    assert until in output, output
    if large:
        return output
    told = (place.clone / "code").read_text().strip() if (place.clone / "code").exists() else ""
    assert "33" in (str(code), told) or (code == 0 and "finished; next:" in output), f"{code}, {told}\n{output}"
    assert read_run(str(run)).last_step > before
    return output


@pytest.mark.slow
@pytest.mark.parametrize("command", parity.of_kind("training"))
def test_training_reaches_its_first_step_and_leaves_when_asked(place: Place, command: str):
    train(place, command)


@pytest.mark.slow
def test_the_log_has_the_words_that_the_notes_name(place: Place):
    output = train(place, f"{PLAIN} --train.log_every=1", until="remaining")
    for word in parity.LOGGED:
        assert word in output


# --- programs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in parity.of_kind("program") if "trainer.serve" not in each])
def test_a_program_does_its_work(place: Place, command: str, request):
    words = [*prepared(place, command, request), *parity.added_to(command)]
    said = "".join(f"{line}\n" for line in chat_lines(place, command))
    process = place.start(words, stdin=subprocess.PIPE)
    try:
        output, _ = process.communicate(said, timeout=PATIENCE_SECONDS)
    finally:
        launching.kill(process)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert re.search(SAYS.get(parity.module_of(command), ""), output)
    for file in re.findall(r"--out=(\S+)", command):
        assert (place.clone / file).exists()
    if parity.module_of(command) in ("data_prep.prepare", "data_prep.fetch"):
        folder = next(word.partition("=")[2] for word in words if word.startswith("--data.url="))
        assert manifest.read(str(place.clone / folder)).splits["train"].tokens > 1000


def prepared(place: Place, command: str, request) -> list[str]:
    """The words of a command, after what it needs has been made."""
    module = parity.module_of(command)
    if module in ("data_prep.prepare", "data_prep.fetch"):
        return prepared_source(place, place.words(command, DATA_URL="made", CONFIG="source.yaml"), request)
    if module == "trainer.import_weights":
        return place.words(command, RUN_URL="imported", DATA_URL=place.world.data)
    if module == "trainer.synthesize":
        endpoint = request.getfixturevalue("endpoint")
        place.environment["OPENAI_BASE_URL"] = endpoint.url
        return place.words(command, RUN_URL="synthetic")
    if command == "python cost_report.py":
        place.environment["BUCKET"] = str(place.bucket)
    return place.words(command)


def prepared_source(place: Place, words: list[str], request) -> list[str]:
    """A local set of documents, or the Hub that the config names with a set of that name."""
    corpus.write_parquet(place.clone / "source", [corpus.documents(3000)], rows=500)
    source = {"source": {"url": "source/*.parquet"}}
    (place.clone / "source.yaml").write_text(yaml.safe_dump(source))
    config = next((word for word in words if word.startswith("data_prep/configs/")), "")
    if config:
        folder = next(word.partition("=")[2] for word in words if word.startswith("--data.url="))
        request.getfixturevalue("hubs").enter_context(hub_for(place, config, folder))
    return words


def hub_for(place: Place, config: str, folder: str):
    """The Hub with the set of a config, which finds HellaSwag beside the shards already."""
    schema = FetchConfig if config.endswith("-ready.yaml") else PrepConfig
    source = loader.load(schema, [str(launching.REPOSITORY / config)], {"DATA_URL": "any"}).source
    address = source.train_url if schema is FetchConfig else source.url
    repository = next(name for name in SETS if name in address)
    commit = re.search(r"[0-9a-f]{40}", f"{address} {source.revision}")[0]
    shutil.copytree(place.world.data / "sets", place.clone / folder / "sets")
    return parity_world.hub_of(place, repository, commit)


@pytest.fixture
def hubs():
    """Hubs that a test enters; they end with it."""
    with contextlib.ExitStack() as entered:
        yield entered


@pytest.fixture
def endpoint():
    with FakeEndpoint(faults=False) as server:
        yield server


def chat_lines(place: Place, command: str) -> list[str]:
    """What is typed into a program: in the chat every command that the page names."""
    if "trainer.chat" not in command:
        return []
    if command.endswith("RUN_URL"):
        typed = [" ".join(place.words(line)) for line in parity.of_kind("chat") if line != "/quit"]
        return ["Once upon a time", *typed, "/quit", "/compare no-such-run"]
    return ["Once upon a time", "/quit"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in parity.of_kind("program") if "trainer.serve" in each])
def test_a_server_answers(place: Place, command: str):
    process = place.start([*place.words(command), *parity.added_to(command)])
    output = ""
    try:
        for line in process.stdout:
            output += line
            if match := re.search(r"endpoint at (http://\S+/v1)", line):
                with urllib.request.urlopen(f"{match[1]}/models", timeout=PATIENCE_SECONDS) as answer:
                    assert b'"run"' in answer.read()
                process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0, output
    finally:
        launching.kill(process)
    assert "endpoint at" in output


# --- targets that rent nothing, and those that lack a setting --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command", parity.of_kind("here"))
def test_a_target_does_its_work_here(place: Place, command: str, request):
    settings = dict(word.split("=", 1) for word in shlex.split(command)[2:])
    source = settings.get("SOURCE", "")
    if source.endswith("-ready.yaml"):
        request.getfixturevalue("hubs").enter_context(hub_for(place, source, "data/fineweb-edu-10bt-ready"))
    elif source.endswith(".yaml"):
        place.environment["SOURCE_URL"] = "input.txt"  # in place of the config's address on the internet
    if command == "make train":
        shutil.copytree(place.world.data, place.clone / "data/input")
        (place.clone / "short.yaml").write_text(
            yaml.safe_dump({**CONFIG, "batch": SHORT, "train": {**CONFIG["train"], "steps": 4}})
        )
        place.environment["CONFIG"] = "short.yaml"
    code, output = place.shell(with_bucket(place, command))
    assert code == 0, output
    if source:
        name = settings.get("DATA") or Path(source).stem
        assert manifest.read(str(place.clone / "data" / name)).splits["train"].tokens > 1000
    elif command == "make train":
        assert read_run(str(place.clone / "runs/short")).last_step == 4
    elif command.startswith("make pull"):
        pulled = place.clone / "pulled" / settings.get("RUN", "gpt2-124m")
        assert read_run(str(pulled)).last_step == parity_world.STEPS
        assert launching.completed(str(pulled)) == [parity_world.STEPS]
    else:
        assert "make run USD=20" in output


def with_bucket(place: Place, command: str) -> str:
    """The command with a folder in the place of the bucket B."""
    if "BUCKET=B" not in command:
        return command
    return re.sub(r"\bBUCKET=B\b", f"BUCKET={place.bucket}", command).replace("s3://B/", f"{place.bucket}/")


@pytest.mark.slow
@pytest.mark.parametrize("command", parity.ALONE)
def test_a_target_that_lacks_a_setting_says_which(place: Place, sky, command: str):
    place.environment["PATH"] = f"{sky.folder}:{place.environment['PATH']}"
    code, output = place.shell(command)
    assert code != 0
    [said] = [line for line in output.splitlines() if line.startswith("error: ")]
    assert ("usd" if "plan" in command else "BUCKET") in said
    assert "Traceback" not in output
    assert sky.called() == []


# --- launches ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command", parity.of_kind("cloud"))
def test_a_launch_asks_sky_for_its_task_with_its_settings(place: Place, sky, command: str):
    place.environment |= {"PATH": f"{sky.folder}:{place.environment['PATH']}", "HOME": str(sky.home)}
    place.environment |= {"SERVE_API_KEY": "a-key-of-the-test", "BUCKET_ACCESS_KEY_ID": "id"}
    place.environment |= {"BUCKET_SECRET_ACCESS_KEY": "key"}
    typed = with_bucket(place, command)
    code, output = place.shell(typed)
    assert code == 0, output
    calls, words = sky.called(), shlex.split(typed)
    settings = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    if words[0] == "sky":
        task = read_task(words[2], settings)
        assert calls == [" ".join(words[1:])]
        assert set(task.required) <= set(settings)
        return
    path = f"sky/{settings.pop('TASK', TASKS.get(words[1], words[1]))}.yaml"
    gpus = settings.pop("GPUS", None)
    assert len(calls) == (2 if words[1] == "image" else 1)
    for call in calls:
        assert call.startswith("jobs launch" if words[1] == "pretrain-spot" else "launch ")
        assert call.endswith(f" {path}")
        for name, value in settings.items():
            assert f"--env {name}={value}" in call
        assert (f"--gpus {gpus}" in call) == bool(gpus)
