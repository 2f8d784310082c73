"""docs/architecture.md names rooms, files and symbols that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| (.+?) \|$", PAGE.partition("## Where do I change")[2], re.M)[2:]


def names_of(file: Path) -> set[str]:
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_twenty_questions_have_an_answer_within_three_places():
    assert len(ROWS) >= 20
    for question, answer in ROWS:
        places = {place.partition(":")[0] for place in re.findall(r"`[\w./]+(?::\w+)?`", answer) if "/" in place}
        assert 1 <= len(places) <= 3, question


@pytest.mark.parametrize("place", sorted(set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*(?::\w+)?)`", PAGE))))
def test_a_named_place_exists(place: str):
    path, _, name = place.partition(":")
    assert (ROOT / path).exists(), f"docs/architecture.md names {path}"
    assert not name or name in names_of(ROOT / path), f"docs/architecture.md names {name} in {path}"


def test_every_room_is_in_the_tree():
    tree = PAGE.partition("## The tree")[2].partition("`tests/test_imports.py`")[0]
    packages = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/**/__init__.py")}
    for package in packages:
        if package.parts[0] in ("core", "clouds", "data_prep", "trainer", "costs", "launch"):
            assert re.search(rf"^ +{package.name}/ ", tree, re.M), f"{package} has no line in docs/architecture.md"
