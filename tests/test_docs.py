"""Commands and files that the documentation names exist."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """Indented lines and inline code that start with a program."""
    text = re.sub(r"<!-- demo output: begin -->.*?<!-- demo output: end -->", "", page.read_text(), flags=re.S)
    lines = [line.strip() for line in text.splitlines() if re.match(r"^ {4}(make|python|torchrun|sky) ", line)]
    return lines + re.findall(r"`((?:make|python|torchrun|sky) [^`]+)`", text)


def make_targets() -> set[str]:
    files = [REPOSITORY / "Makefile", *(REPOSITORY / "launch").glob("*.mk")]
    return {match for file in files for match in re.findall(r"^([a-z][a-z-]*):", file.read_text(), re.M)}


def problem_of(command: str) -> str | None:
    words = shlex.split(command.split("   ")[0].replace("[", "").replace("]", ""))
    if words[0] == "make":
        is_target = words[1] in make_targets() or "=" in words[1]
        return None if is_target else f"no target {words[1]}"
    for option, module in itertools.pairwise(words):
        place = module.replace(".", "/")
        exists = any((REPOSITORY / f"{place}{end}").exists() for end in (".py", "/__main__.py"))
        if option == "-m" and "pytest" not in words and not exists:
            return f"no module {module}"
    for word in words:
        is_ours = re.match(r"^(sky|trainer|data_prep|demo|bench)/.*\.(yaml|py)$", word) or word == "cost_report.py"
        if is_ours and word != "sky/TASK.yaml" and not (REPOSITORY / word).exists():
            return f"no file {word}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_exist(page: Path):
    problems = {command: problem for command in commands(page) if (problem := problem_of(command))}
    assert not problems


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_checks_above_can_fail():
    assert problem_of("make no-such-target") == "no target no-such-target"
    assert problem_of("python -m trainer.no_such") == "no module trainer.no_such"
    assert problem_of("sky launch sky/no-such.yaml") == "no file sky/no-such.yaml"
    assert len(commands(PAGES[0])) > 8


def test_readme_names_the_test_command_that_ci_runs():
    ci = (REPOSITORY / ".ci" / "run").read_text()
    assert "make test" in (REPOSITORY / "README.md").read_text()
    assert re.search(r"^stage test make test$", ci, re.M)


def test_the_table_of_presets_is_true():
    from core.settings.model import parameters
    from tests import presets

    rows = re.findall(
        r"^\| `([\w.-]+)` \| ([\d,]+) \| (\d+) x (\d+) \|", (REPOSITORY / "docs/models.md").read_text(), re.M
    )
    found = {name: (int(count.replace(",", "")), int(layers), int(width)) for name, count, layers, width in rows}
    expected = {name: settings.model for name, settings in presets.pretraining().items()}
    assert found == {name: (parameters(model), model.layers, model.width) for name, model in expected.items()}


def test_tables_of_the_documents_are_those_of_records_and_code():
    from bench import tables

    for path, text in tables.up_to_date().items():
        assert text.count(": begin -->") == (2 if path.name == "README.md" else 1), path
        assert text == path.read_text(), "run python -m bench.tables"
