"""Fixtures that several test files use.

They import what they need themselves: tests/test_gpu.py runs where many packages are not installed.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from demo.s3_server import S3Server
    from tests.sky_command import SkyCommand

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory):
    """A real S3 server; `s3.environment()` is set for the whole test process."""
    from demo.s3_server import S3Server

    with S3Server(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """The URL of a folder in a bucket, of this test alone: every bucket more takes the server several volumes."""
    if not s3.has_bucket("tests"):
        s3.make_bucket("tests")
    return f"s3://tests/{abs(hash(request.node.nodeid)):x}"


@pytest.fixture(scope="module")
def ranks():
    """This process as the only rank of a job, and afterwards as none."""
    from trainer.distributed import process_group

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that it is absent again at the end
            patch.delenv(name)
        yield process_group.start("cpu")
        process_group.stop()


@pytest.fixture(scope="session")
def vocab_bpe() -> Path:
    """OpenAI's GPT-2 merges."""
    from tests import corpus

    return corpus.vocab_bpe()


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory, vocab_bpe: Path) -> tuple[str, str]:
    """(data_url, run_url) of a small token set and a short run on it, from which tuning starts."""
    from filelock import FileLock

    from tests import tuning

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # all workers use one copy
    with FileLock(shared / "pretrained.lock"):
        made = shared / "pretrained.json"
        if not made.exists():
            folder = tempfile.mkdtemp(prefix="pretrained-", dir=shared)
            made.write_text(json.dumps(tuning.pretrain(Path(folder), vocab_bpe)))
        data_url, run_url = json.loads(made.read_text())
    return data_url, run_url


@pytest.fixture
def sky(tmp_path) -> SkyCommand:
    """A `sky` command with answers of our choice."""
    from tests.sky_command import SkyCommand

    return SkyCommand(tmp_path)


@pytest.fixture
def cloud(sky, monkeypatch):
    """tests.pretended.Pretended: the only cloud of the user of `sky`."""
    from tests import pretended

    return pretended.only_cloud(sky, monkeypatch)
