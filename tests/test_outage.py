"""A store that goes away in mid-run: training stops by itself, tries to store the last step, and says what is lost."""

import os
import re
import signal
from pathlib import Path

import pytest

from core import storage
from core.errors import StorageError
from core.exit_codes import NO_STORAGE
from core.run.journal import Journal
from tests import launching, patched
from tests.patience import PATIENCE_SECONDS

SOON = ("--checkpoint.every_steps=5", "--checkpoint.outage_minutes=0.01", "--train.steps=1000000")

PROMPT = {**patched.PROMPT, "trainer.checkpoint.save.AGAIN_SECONDS": 0.1}


class Place:
    """The folder of a run behind a link, which can lead nowhere: a bucket that is gone."""

    def __init__(self, folder: Path):
        self.url = str(folder / "run")
        (folder / "real").mkdir()
        self._point_to("real")

    def take_away(self) -> None:
        self._point_to("nowhere")

    def give_back(self) -> None:
        self._point_to("real")

    def _point_to(self, name: str) -> None:
        new = Path(f"{self.url}.new")
        new.symlink_to(new.with_name(name))
        os.replace(new, self.url)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def flags(pretrained: tuple[str, str], place: Place) -> list[str]:
    return [f"--data.url={pretrained[0]}", f"--run.url={place.url}", *SOON]


def test_a_store_that_stays_away_ends_training_with_a_code_of_its_own(pretrained, place, tmp_path):
    file = tmp_path / "exit-code"
    more = ("--checkpoint.last_try_minutes=0.01",)
    environment = {"EXIT_CODE_FILE": str(file)}
    process = launching.start(2, *flags(pretrained, place), *more, environment=environment, constants=PROMPT)
    launching.wait_until(lambda: bool(launching.completed(place.url)), process)
    place.take_away()
    code, output = launching.finish(process)
    assert code != 0
    assert int(file.read_text()) == NO_STORAGE
    said = re.search(
        r"stopped at step (\d+) of 1000000, because .* has taken nothing for .* \(.*is a link to .*\); the newest "
        r"stored step is (\d+), and the work of (\d+) steps is lost; repair the store",
        output,
    )
    assert said, output
    reached, stored, lost = map(int, said.groups())
    assert reached - stored == lost > 0
    assert "Traceback" not in output.partition("stopped at")[0], "torchrun shows one for a worker that failed"
    place.give_back()
    assert launching.completed(place.url)[0] == stored


def test_a_store_that_comes_back_in_time_loses_nothing(pretrained, place):
    process = launching.start(1, *flags(pretrained, place), constants=PROMPT)
    launching.wait_until(lambda: bool(launching.completed(place.url)), process)
    place.take_away()
    output = ""
    for line in process.stdout:
        output += line
        if "training stops, and saving step" in line:
            place.give_back()
    assert process.wait(PATIENCE_SECONDS) == NO_STORAGE, output
    reached = int(re.search(r"stopped at step (\d+) of .*; that step is stored after all", output)[1])
    assert launching.completed(place.url)[0] == reached
    process = launching.start(1, *flags(pretrained, place))
    launching.wait_until(lambda: launching.completed(place.url)[0] > reached, process)
    process.send_signal(signal.SIGTERM)
    assert f"resumed from step {reached}" in launching.finish(process)[1]


def test_an_outage_that_ends_is_no_reason_to_stop(tmp_path, monkeypatch):
    def away(*_, **__):
        raise StorageError("s3://bucket: no answer")

    journal = Journal(str(tmp_path), flush_seconds=1e9)
    assert journal.failing_seconds == 0
    journal.add({"a": 1})
    with monkeypatch.context() as outage:
        outage.setattr(storage, "write_bytes", away)
        assert not journal.flush()
        first = journal.failing_seconds
        assert not journal.flush()
        assert journal.failing_seconds >= first
        assert journal.failure == "s3://bucket: no answer"
    assert journal.flush()
    assert journal.failing_seconds == 0
    journal.close()
