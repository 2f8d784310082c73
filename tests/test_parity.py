"""docs/parity.md: every promise has a command or a reason, and the commands exist and take their settings."""

import re
import shlex

import pytest

from core.errors import ConfigError
from core.settings import evaluation, loader
from core.settings.preparation import FetchConfig, PrepConfig
from core.settings.stages import training_schema
from core.settings.tuning import SynthesisConfig
from tests import remedies
from tests.parity import PAGE, ROOT, ROWS, SPECIAL, commands
from trainer.chat import ChatConfig
from trainer.export import ExportConfig
from trainer.generate import GenerateConfig
from trainer.serve import ServeConfig

SCHEMAS = {
    "data_prep.prepare": PrepConfig,
    "data_prep.fetch": FetchConfig,
    "trainer.synthesize": SynthesisConfig,
    "trainer.generate": GenerateConfig,
    "trainer.chat": ChatConfig,
    "trainer.serve": ServeConfig,
    "trainer.export": ExportConfig,
}
PRESET = {"data_prep.prepare": "data_prep/configs/text.yaml", "trainer.train": "trainer/configs/gpt2-124m.yaml"}
PLACES = {"RUN_URL": "RUN_URL", "DATA_URL": "DATA_URL"}


def problem_of(command: str) -> str | None:
    """What is wrong with a command, file or setting that the page names."""
    if command.startswith("/"):
        return None if command.split()[0][1:] in remedies.chat_commands() else f"no command {command} in the chat"
    words = shlex.split(command)
    if words[0] == "make":
        return make_problem(words[1:])
    if words[0] == "pip":
        wanted = re.search(r"\[([\w,]+)\]", command)
        extras = wanted[1].split(",") if wanted else []
        known = remedies.project()["optional-dependencies"]
        packages = {*remedies.packages(), *known.get("track", ())}
        return None if (extras and set(extras) <= set(known)) or words[-1] in packages else f"{command}: not known"
    if words[0] == "sky":
        return None if (ROOT / words[2]).is_file() else f"no file {words[2]}"
    if words[:2] == ["python", "cost_report.py"]:
        return own_problem(words[2:], "cost_report.py")
    if words[0] in ("python", "torchrun"):
        return program_problem(words)
    if re.fullmatch(r"[\w:]+|--?[\w.=-]+", command) and "/" not in command:
        return None  # a word of a log, a flag beside a command
    return None if (ROOT / command).exists() or command in SPECIAL else f"no file {command}"


def make_problem(words: list[str]) -> str | None:
    if words[0] not in remedies.targets():
        return f"no target {words[0]}"
    for word in words[1:]:
        name, _, value = word.partition("=")
        if name not in remedies.known_variables():
            return f"{name} is no variable of make {words[0]}"
        if value.endswith(".yaml") and not (ROOT / value).is_file():
            return f"no file {value}"
        if name == "TASK" and not (ROOT / f"sky/{value}.yaml").is_file():
            return f"no task {value}"
    return None


def own_problem(words: list[str], program: str) -> str | None:
    """Of a program without a schema."""
    flags = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    text = (ROOT / program).read_text() + "".join(path.read_text() for path in (ROOT / "costs").rglob("*.py"))
    unknown = [flag for flag in flags if f"--{flag}" not in text and f'"{flag}"' not in text]
    missing = [word for word in words if word.endswith(".yaml") and not (ROOT / word).is_file()]
    return f"{program}: unknown {unknown} {missing}" if unknown or missing else None


def program_problem(words: list[str]) -> str | None:
    """Reads the arguments as the program would."""
    place = len(words) - 1 - words[::-1].index("-m")
    module, arguments = words[place + 1], words[place + 2 :]
    file = ROOT / f"{module.replace('.', '/')}.py"
    if not file.is_file():
        return f"no module {module}"
    given = [PRESET[module] if word == "CONFIG" else word for word in arguments]
    flags = [word for word in given if word.startswith("--")]
    configs = [word for word in given if word.endswith(".yaml")]
    if "--help" in flags:
        return None
    try:
        if module == "trainer.train":
            loader.load(training_schema([*configs, *flags]), [*configs, *flags], PLACES)
        elif module == "trainer.evaluate":
            evaluation.parse(given, {})
        elif module in SCHEMAS:
            loader.load(SCHEMAS[module], [*configs, *flags], PLACES)
        else:
            return own_problem(given, str(file.relative_to(ROOT)))
    except ConfigError as error:
        return f"{module}: {error}"
    return None


def test_the_page_has_every_promise_once():
    ids = [row[0] for row in ROWS]
    assert len(ids) == len(set(ids)) == 216
    assert len(re.findall(r"^\| (?:S\d|C)-", PAGE, re.M)) == 216
    for number, promise, here, note in ROWS:
        assert promise.strip(), number
        assert "`" in here or (here == "–" and len(note) > 20), f"{number} has neither a command nor a reason"
    said = int(re.search(r"has\s+no command for (\d+) of the promises", PAGE)[1])
    assert said == sum(here == "–" for _, _, here, _ in ROWS)


def test_every_command_exists_and_takes_its_settings():
    problems = {command: problem for command in commands() if (problem := problem_of(command))}
    assert not problems


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "make pretrain CONFIG=trainer/configs/no.yaml",
        "make pretrain NO_SUCH=1",
        "python -m trainer.no_such RUN_URL",
        "python -m trainer.train CONFIG --data.url=D --run.url=R --train.step=4",
        "python -m trainer.plots RUN_URL --ouput=plots",
        "python -m data_prep.fetch data_prep/configs/text.yaml --data.url=D",
        "python cost_report.py RUN_URL --cvs",
        "sky launch sky/no.yaml",
        "docs/no.md",
        "pip install '.[no]'",
        "/no",
    ],
)
def test_the_check_above_can_fail(command: str):
    assert problem_of(command)
