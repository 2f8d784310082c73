"""A data set or a model laid out as the Hub's cache, and the environment in which it is read offline."""

from collections.abc import Mapping
from pathlib import Path

from tests.fake_hub import COMMIT


def lay_out(
    home: Path, repository: str, files: Mapping[str, bytes], commit: str = COMMIT, kind: str = "datasets"
) -> Path:
    """The snapshot folder, as `hf download` leaves it: links to blobs. `home` is HF_HOME, `kind` datasets or models."""
    root = home / "hub" / f"{kind}--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for number, (name, data) in enumerate(files.items()):
        blob = root / "blobs" / f"{number:040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    return snapshot


def offline(home: Path) -> dict[str, str]:
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
