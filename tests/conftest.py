"""Fixtures that several test files use.

They import what they need themselves: tests/test_gpu.py runs where many packages are not installed.
"""

from __future__ import annotations

import contextlib
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
# These variables of the terminal change what commands print.
for _name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CLICOLOR_FORCE"):
    os.environ.pop(_name, None)

S3_HOST = pytest.StashKey()
LONGEST = """
    test_train test_chat test_launch_node test_stop_life test_distil test_anneal test_finetune test_evaluate test_dpo
    test_distil_make test_refusals test_prep_named test_overfit test_prep_kill test_outage test_storage test_elsewhere
    test_exchange test_evaluate_cap test_generation test_cache test_export
""".split()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """In the process that starts the workers, for each of them."""
    from tests.one_s3 import Host

    if S3_HOST not in node.config.stash:
        node.config.stash[S3_HOST] = host = Host()
        node.config.add_cleanup(host.close)
    node.workerinput["s3_folder"] = str(node.config.stash[S3_HOST].folder)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --no-loadscope-reorder the files that take longest come first, so that no worker begins one of them last."""
    if config.getoption("loadscopereorder", default=True) is False:
        last = len(LONGEST)
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else last)


@pytest.fixture(scope="session")
def s3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A real S3 server, one for all workers; `s3.environment()` is set for the whole test process."""
    from demo.s3_server import S3Server
    from tests import one_s3

    with contextlib.ExitStack() as stack:
        if host := getattr(request.config, "workerinput", {}).get("s3_folder"):
            server = one_s3.join(Path(host))
        else:
            server = stack.enter_context(S3Server(tmp_path_factory.mktemp("s3")))
            server.make_bucket("tests")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def bucket(s3: S3Server, request: pytest.FixtureRequest) -> str:
    """The URL of a folder in a bucket, of this test alone: every bucket more takes the server several volumes."""
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
