"""`pip install .` takes along every package and every file that the programs read."""

import tomllib
from fnmatch import fnmatch
from pathlib import Path

from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_READ = {"README.md", "targets.mk"}  # by an installed program
FOLDERS = [pattern.removesuffix("*") for pattern in SETUPTOOLS["packages"]["find"]["include"]]


def is_installed(file: Path) -> bool:
    """Whether a pattern of package-data holds a file, whose path is relative to the repository."""
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = Path(package.replace(".", "/"))
        if file.is_relative_to(folder):
            below = file.relative_to(folder)
            if any(fnmatch(below.name, Path(each).name) and below.match(each) for each in patterns):
                return True
    return False


def test_every_data_file_is_installed():
    files = [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    data = [path.relative_to(REPOSITORY) for path in files if path.suffix not in (".py", ".pyc")]
    assert len(data) > 25
    assert [str(file) for file in data if file.name not in NOT_READ and not is_installed(file)] == []
    assert not is_installed(Path("costs/other.css"))


def test_every_folder_with_code_is_a_package():
    for folder in FOLDERS:
        for file in (REPOSITORY / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.parent} has no __init__.py, so it is not installed"


def test_one_file_holds_the_version():
    version = PROJECT["project"]["version"]
    assert all(
        f'"{version}"' not in path.read_text() for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")
    )
