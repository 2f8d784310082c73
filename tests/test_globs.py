"""Patterns mean the same on every store: literal paths first, no hidden names, folders named with what is in them."""

import re
from pathlib import Path

import pytest

from core import storage
from core.errors import DataError
from data_prep.sources.files import find_files

FILES = (
    "part[0].txt",
    "part0.txt",
    "data [v1]/train.txt",
    "data v/other.txt",
    "mac/a.txt",
    "mac/._a.txt",
    "spark/_SUCCESS",
    "spark/_temporary/0.txt",
    "spark/y=1/0.txt",
    "spark/.ipynb_checkpoints/0.txt",
)
MATCHES = {
    "part[0].txt": ["part[0].txt"],
    "part[01].txt": ["part0.txt"],
    "part*.txt": ["part0.txt", "part[0].txt"],
    "data [v1]/*.txt": ["data [v1]/train.txt"],
    "data [v1]/**": ["data [v1]/train.txt"],
    "*/train.txt": ["data [v1]/train.txt"],
    "mac/*": ["mac/a.txt"],
    "mac/.*": ["mac/._a.txt"],
    "mac/._a.txt": ["mac/._a.txt"],
    "spark/**": ["spark/y=1/0.txt"],
    "spark/**/*.txt": ["spark/y=1/0.txt"],
    "spark/*/*.txt": ["spark/y=1/0.txt"],
    "spark/_temporary/*.txt": ["spark/_temporary/0.txt"],
    "spark/_*/**": ["spark/_temporary/0.txt"],
    "spark/[._]*/0.txt": [],
}


@pytest.fixture(params=["disk", "file", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = {"disk": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{tmp_path.name}"}
    root = root[request.param] if request.param != "s3" else f"{request.getfixturevalue('bucket')}/folder"
    for name in FILES:
        storage.write_bytes(f"{root}/{name}", b"text")
    return root


def test_a_pattern_means_the_same_on_every_store(place: str):
    folder = place.removeprefix("file://")
    for pattern, expected in MATCHES.items():
        found = [uri.removeprefix("file://").removeprefix(f"{folder}/") for uri in storage.expand(f"{place}/{pattern}")]
        assert (pattern, found) == (pattern, expected)


def test_a_folder_is_answered_with_a_pattern_that_works(place: str):
    for folder, pattern in (("mac", "mac/*.txt"), ("spark", "spark/**/*.txt"), ("data [v1]/", "data [v1]/*.txt")):
        with pytest.raises(DataError, match=f"is a folder; name the files in it: .*{re.escape(pattern)}$") as caught:
            find_files(f"{place}/{folder}", (".txt", ".parquet"))
        assert find_files(str(caught.value).partition("in it: ")[2], (".txt",))
    with pytest.raises(DataError, match="no file matches"):
        find_files(f"{place}/mac/*.parquet", (".txt", ".parquet"))


def test_linked_folders_are_followed(tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "nest/y=1").mkdir(parents=True)
    (tmp_path / "other/c.txt").write_text("c")
    (tmp_path / "nest/y=1/a.txt").write_text("a")
    (tmp_path / "nest/link").symlink_to("../other")
    for pattern in ("nest/**/*.txt", "nest/*/*.txt", "nest/**"):
        assert [Path(uri).name for uri in storage.expand(f"{tmp_path}/{pattern}")] == ["c.txt", "a.txt"]
