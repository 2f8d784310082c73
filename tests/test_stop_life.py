"""A request to stop at any moment of a run's life ends it with 33 or 0, and the next start continues.

Real processes: launch.node, torchrun, two ranks. The full sweep is slow; the short form takes one instant of each kind.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from core import ledger, sets, storage
from tests import corpus, launching, models
from tests.faulty_proxy import FaultyProxy
from tests.lives import Life
from tests.patience import PATIENCE_SECONDS

STEPS = 12
EVERY = 4
FLAGS = [
    f"--train.steps={STEPS}",
    "--checkpoint.every=2",
    f"--train.eval_every={EVERY}",
    f"--train.hellaswag_every={EVERY}",
    "--train.hellaswag_items=12",
    f"--train.sample_every={EVERY}",
]
STORE_IS_AWAY = {"LEAVE_SECONDS": "8"}  # of which the ranks take six


@pytest.fixture(scope="module")
def data_url(tmp_path_factory, vocab_bpe) -> str:
    """A token set with HellaSwag items, and so many validation tokens that to look at all of them takes very long."""
    folder = tmp_path_factory.mktemp("lives")
    source = corpus.write_parquet(folder / "source", [corpus.speeches(249)])
    large = ("--data.part_bytes=100000000", "--data.shard_tokens=1000000", "--data.val_fraction=0.5")
    corpus.prepare_set(source, str(folder / "set"), vocab_bpe, *large)
    rows = "".join(json.dumps(item) + "\n" for item in models.hellaswag_items(12)).encode()
    sets.write(str(folder / "set"), "hellaswag", "hellaswag", "made for the tests", "MIT", rows)
    return str(folder / "set")


@pytest.fixture(scope="module")
def data_in_bucket(s3, data_url: str) -> str:
    s3.make_bucket("lives")
    for info in storage.list_objects(data_url):
        storage.write_bytes(info.uri.replace(data_url, "s3://lives/set"), storage.read_bytes(info.uri))
    return "s3://lives/set"


@pytest.fixture(scope="module")
def straight(data_in_bucket: str) -> str:
    """A run that nothing interrupted, with the checkpoints of all its steps."""
    run_url = "s3://lives/straight"
    every = ["--checkpoint.every=1", "--checkpoint.keep=100"]
    launching.train(1, *FLAGS, *every, f"--data.url={data_in_bucket}", f"--run.url={run_url}")
    return run_url


class Run:
    """A run in one life after the other; what each of them leaves behind is looked at."""

    def __init__(self, run_url: str, flags: Sequence[str], straight: str | None = None):
        self.url = run_url
        self._flags = flags
        self._straight = straight  # a run that nothing interrupted

    @property
    def newest(self) -> int:
        return (launching.completed(self.url) or [0])[0]

    def live(self, *flags: str, ranks: int = 2, **environment: str) -> Life:
        self.began_at = self.newest
        return Life(self.url, *self._flags, *flags, f"--run.url={self.url}", ranks=ranks, environment=environment)

    def ends(self, life: Life) -> int:
        """The exit code; what is stored is right, and no less than before."""
        code = life.end()
        assert code in (0, 33), life.output
        assert life.resumed_from() in (None, self.began_at), life.output
        assert self.newest >= self.began_at
        assert (code == 0) <= (self.newest == STEPS)
        if self.newest and self._straight:
            assert launching.tensors(self.url, self.newest) == launching.tensors(self._straight, self.newest)
        assert not storage.list_names(f"{self.url}/refused"), "no machine is to blame"
        return code

    def assert_finished(self) -> None:
        """Every step and everything that was due is in the metrics, as if nothing had happened."""
        assert self.newest == STEPS
        for kind, names in (("train", ("loss",)), ("eval", ("val_loss",)), ("hellaswag", ("accuracy_norm",))):
            mine, theirs = (launching.metrics(url, kind) for url in (self.url, self._straight))
            assert sorted(mine) == sorted(theirs)
            for step, name in itertools.product(mine, names):
                assert mine[step][name] == theirs[step][name], (kind, step)
        mine, theirs = (launching.metrics(url, "sample") for url in (self.url, self._straight))
        assert {step: mine[step]["text"] for step in mine} == {step: theirs[step]["text"] for step in theirs}


# --- the short form --------------------------------------------------------------------------------------------


def test_one_instant_of_each_kind(data_url, tmp_path):
    run = Run(str(tmp_path / "run"), [*FLAGS, f"--data.url={data_url}", f"--data.cache_dir={tmp_path}/cache"])
    preflight = run.live().until_said("node 1 of 1").until_it_runs("trainer.preflight").ask()
    assert run.ends(preflight) == 33
    assert not storage.list_names(f"{run.url}/preflight")
    imports = run.live(ranks=1).until_it_runs("-m trainer.train").ask(signal.SIGHUP).ask(signal.SIGINT)
    assert run.ends(imports) == 33
    assert run.newest == 0
    # An evaluation that takes long, as one of GPT-2 1.5B does.
    evaluation = run.live("--train.eval_tokens=10000000").until_said(f"step {EVERY}/").ask().ask()
    assert run.ends(evaluation) == 33
    assert f"the evaluation of step {EVERY} is cut off" in evaluation.output
    assert run.newest == EVERY
    assert launching.metrics(run.url, "eval") == {}
    last = run.live(ranks=1).until_said(f"step {STEPS} is saved").ask()
    if run.ends(last) == 33:
        assert f"the evaluation of step {STEPS} is cut off" in last.output
    assert f"resumed from step {EVERY}" in last.output
    assert EVERY in launching.metrics(run.url, "eval"), "what was cut off is done again"
    reasons = [ended(run.url, number) for number in ledger.segment_numbers(run.url)]
    assert set(reasons) <= {"preempted", "finished"}


def ended(run_url: str, number: int) -> str | None:
    """How a segment ended, by its ledger."""
    from costs.read import read_run

    (segment,) = [each for each in read_run(run_url).segments if each.number == number]
    return segment.end and segment.end["reason"]


@pytest.mark.parametrize("mood", ["hang", pytest.param("refuse", marks=pytest.mark.slow)])
def test_a_checkpoint_that_cannot_be_stored_before_the_time_is_over(s3, bucket, data_url, tmp_path, mood):
    """The store goes away with the machine: 33, and the log says how far the run has come."""
    run_url = f"{bucket}/run"
    flags = [*launching.TINY, *FLAGS, "--train.steps=100000", "--checkpoint.every=1000000"]
    with FaultyProxy(s3.endpoint) as proxy:
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url, "LEAVE_SECONDS": "4"}
        command = [sys.executable, "-m", "trainer.train", *flags, "--train.eval_every=0", "--train.sample_every=0"]
        command += [f"--data.url={data_url}", f"--run.url={run_url}", f"--data.cache_dir={tmp_path}"]
        process = subprocess.Popen(
            command, cwd=launching.REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
        )
        said = []
        for line in process.stderr:
            said.append(line)
            if "step 3/" in line:
                proxy.away = mood
                process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 33, "".join(said)
    assert "the time to save is over: no step is stored" in "".join(said)
    assert launching.completed(run_url) == []


# --- the full sweep --------------------------------------------------------------------------------------------

STEP_SECONDS = 0.2
MOST_POINTS = 100  # where a life takes longer than that many steps, these are longer


@pytest.mark.slow
@pytest.mark.parametrize("store", ["reachable", "away"])
def test_sigterm_at_every_moment_of_a_life(s3, data_in_bucket, straight, tmp_path, store):
    """Each life goes on where the one before was ended, a moment later than that one; a run that is finished is
    followed by a new one. Where the store is away it refuses or hangs from the request to stop until the end."""
    codes: dict[int, int] = {}
    with FaultyProxy(s3.endpoint) as proxy:
        flags = [*FLAGS, f"--data.url={data_in_bucket}", f"--data.cache_dir={tmp_path}"]
        environment = {"AWS_ENDPOINT_URL": proxy.url, **(STORE_IS_AWAY if store == "away" else {})}
        run, whole = begun(f"s3://lives/{store}-0", straight, flags, environment)
        step_seconds = max(STEP_SECONDS, whole / MOST_POINTS)
        points = 0
        while points * step_seconds <= whole:
            life = run.live(**environment).until_it_listens()
            ended_by_itself = waited(life, points * step_seconds)
            if store == "away" and not ended_by_itself:
                proxy.away = "hang" if points % 2 else "refuse"
            code = run_ends(run, life.ask(), proxy)
            codes[code] = codes.get(code, 0) + 1
            print(f"{store}: {points * step_seconds:5.1f} s: {code}, step {run.began_at} to {run.newest}", flush=True)
            points += 1
            if code == 0:
                run.assert_finished()
                run, _ = begun(f"s3://lives/{store}-{points}", straight, flags, environment)
        assert run_ends(run, run.live(**environment), proxy) == 0
        run.assert_finished()
    print(f"{store}: {points} points, every {step_seconds:.2f} s, exit codes {codes}")
    assert codes[33] > points / 2


def begun(run_url: str, straight: str, flags: list[str], environment: dict[str, str]) -> tuple[Run, float]:
    """A run with a checkpoint, so that its next life restores one; and how long an undisturbed life would take."""
    run = Run(run_url, flags, straight)
    started = time.monotonic()
    life = run.live(**environment).until_said(f"step {EVERY - 1}/").ask()
    assert run.ends(life) == 33
    assert run.newest
    return run, 2 * (time.monotonic() - started)


def waited(life: Life, seconds: float) -> bool:
    """Whether the life ended in that time."""
    try:
        life.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def run_ends(run: Run, life: Life, proxy: FaultyProxy) -> int:
    """The store comes back once the processes are gone."""
    life.end()
    proxy.away = ""
    return run.ends(life)
