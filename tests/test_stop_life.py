"""A request to stop at any moment of a run's life ends it with 33 or 0, and the next start continues.

Real processes: launch.node, torchrun, two ranks. The full sweep is slow; the short form takes one instant of each kind.
"""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from core import storage
from core.data import sets
from core.run.folder import RunFolder
from tests import corpus, launching, models, patched, warm
from tests.fake_metadata import metadata_service
from tests.faulty_proxy import FaultyProxy
from tests.lives import Life
from tests.patience import PATIENCE_SECONDS

STEPS = 12
EVERY = 4
FLAGS = [
    f"--train.steps={STEPS}",
    "--checkpoint.every_steps=2",
    f"--train.eval_every={EVERY}",
    "--train.eval_first=false",
    "--checkpoint.keep_best=false",
    f"--train.hellaswag_every={EVERY}",
    "--train.hellaswag_items=12",
    f"--train.sample_every={EVERY}",
]
STORE_IS_AWAY = {"LEAVE_SECONDS": "8"}  # of which the ranks take six


@pytest.fixture(scope="module")
def data_url(tmp_path_factory, vocab_bpe) -> str:
    """A token set with HellaSwag items, and so many validation tokens that to look at all of them takes very long."""
    folder = tmp_path_factory.mktemp("lives")
    source = corpus.write_parquet(folder / "source", [corpus.speeches(120)])
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


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """A run that nothing stopped, and its tensors after each step."""

    url: str
    tensors: Mapping[int, Mapping[str, bytes]]


@pytest.fixture(scope="module")
def undisturbed(data_in_bucket: str, tmp_path_factory) -> Undisturbed:
    """A step that was not stored, because the upload before it was still going on, comes from another run."""
    tensors: dict[int, Mapping[str, bytes]] = {}
    flags = [*FLAGS, *LONGER, f"--data.url={data_in_bucket}", f"--data.cache_dir={tmp_path_factory.mktemp('cache')}"]
    for every in range(1, STEPS + 1):
        url = f"s3://lives/undisturbed-{every}"
        if not set(range(every, STEPS + 1, every)) <= set(tensors):
            launching.train(
                1, *flags, f"--checkpoint.every_steps={every}", "--checkpoint.keep_last=100", f"--run.url={url}"
            )
            tensors |= {step: launching.tensors(url, step) for step in launching.completed(url)}
    return Undisturbed("s3://lives/undisturbed-1", tensors)


class Run:
    """A run in one life after the other; what each of them leaves behind is looked at."""

    def __init__(self, run_url: str, flags: Sequence[str], straight: Undisturbed | None = None):
        self.url = run_url
        self._flags = flags
        self._straight = straight

    @property
    def newest(self) -> int:
        return (launching.completed(self.url) or [0])[0]

    def live(self, *flags: str, ranks: int = 2, is_warm: bool = False, **environment: str) -> Life:
        self.began_at = self.newest
        flags = (*self._flags, *flags, f"--run.url={self.url}")
        return Life(self.url, *flags, ranks=ranks, environment=environment, is_warm=is_warm)

    def ends(self, life: Life) -> int:
        """The exit code; what is stored is right, and no less than before."""
        code = life.end()
        assert code in (0, 33), life.output
        assert life.resumed_from() in (None, self.began_at), life.output
        assert self.newest >= self.began_at
        assert (code == 0) <= (self.newest == STEPS)
        if self.newest and self._straight:
            assert launching.tensors(self.url, self.newest) == self._straight.tensors[self.newest]
        assert not storage.list_names(f"{self.url}/refused"), "no machine is to blame"
        return code

    def copy(self, name: str) -> "Run":
        """The same run elsewhere."""
        url = f"{self.url}-{name}"
        for info in storage.list_objects(self.url):
            if not info.uri.startswith(f"{self.url}/logs/"):
                storage.write_bytes(info.uri.replace(self.url, url, 1), storage.read_bytes(info.uri))
        return Run(url, self._flags, self._straight)

    def continues(self, environment: Mapping[str, str]) -> None:
        """The next start goes on from the newest checkpoint, to the end."""
        newest = self.newest
        command = [sys.executable, "-m", "trainer.train", *launching.TINY, *self._flags, f"--run.url={self.url}"]
        done = warm.run(command, cwd=launching.REPOSITORY, env={**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        assert f"resumed from step {newest}" in done.stderr
        self.assert_finished()

    def assert_finished(self) -> None:
        """Every step and everything that was due is in the metrics, as if nothing had happened."""
        assert self.newest == STEPS
        for kind, names in (("train", ("loss",)), ("eval", ("val_loss",)), ("hellaswag", ("accuracy_norm",))):
            mine, theirs = (launching.metrics(url, kind) for url in (self.url, self._straight.url))
            assert sorted(mine) == sorted(theirs)
            for step, name in itertools.product(mine, names):
                assert mine[step][name] == theirs[step][name], (kind, step)
        mine, theirs = (launching.metrics(url, "sample") for url in (self.url, self._straight.url))
        assert {step: mine[step]["text"] for step in mine} == {step: theirs[step]["text"] for step in theirs}


# --- the short form --------------------------------------------------------------------------------------------


def test_one_instant_of_each_kind(data_url, tmp_path):
    run = Run(str(tmp_path / "run"), [*FLAGS, f"--data.url={data_url}", f"--data.cache_dir={tmp_path}/cache"])
    preflight = run.live().until_said("node 1 of 1").until_it_runs("trainer.distributed.preflight").ask()
    assert run.ends(preflight) == 33
    assert not storage.list_names(f"{run.url}/preflight")
    # An evaluation that takes long, as one of GPT-2 1.5B does.
    evaluation = run.live("--train.eval_tokens=10000000", is_warm=True).until_said(f"step {EVERY}/").ask().ask()
    assert run.ends(evaluation) == 33
    assert f"the evaluation of step {EVERY} is cut off" in evaluation.output
    assert run.newest == EVERY
    assert launching.metrics(run.url, "eval") == {}
    last = run.live(ranks=1, is_warm=True).until_said(f"step {STEPS} is saved").ask()
    if run.ends(last) == 33:
        assert f"the evaluation of step {STEPS} is cut off" in last.output
    assert f"resumed from step {EVERY}" in last.output
    assert EVERY in launching.metrics(run.url, "eval"), "what was cut off is done again"
    reasons = [ended(run.url, number) for number in RunFolder(run.url).segment_numbers()]
    assert set(reasons) <= {"preempted", "finished"}


@pytest.mark.slow
def test_a_request_while_the_trainer_is_imported(data_url, tmp_path):
    run = Run(str(tmp_path / "run"), [*FLAGS, f"--data.url={data_url}", f"--data.cache_dir={tmp_path}/cache"])
    imports = run.live(ranks=1).until_it_runs("-m trainer.train").ask(signal.SIGHUP).ask(signal.SIGINT)
    assert run.ends(imports) == 33
    assert run.newest == 0


@pytest.mark.slow
def test_ranks_without_their_supervisor_save_and_end(data_url, tmp_path):
    """The kernel kills launch.node, for lack of memory. No process of it keeps the GPUs."""
    run = Run(str(tmp_path / "run"), [*FLAGS, f"--data.url={data_url}", f"--data.cache_dir={tmp_path}/cache"])
    endless = ["--train.steps=1000000", "--checkpoint.every_steps=1000000", "--train.log_every=1"]
    endless += ["--train.eval_every=0", "--train.hellaswag_every=0", "--train.sample_every=0"]
    life = run.live(*endless).until_said("step 3/").ask(signal.SIGKILL)
    assert life.end() == -signal.SIGKILL
    assert run.newest >= 3


def ended(run_url: str, number: int) -> str | None:
    """How a segment ended, by its ledger."""
    from core.run.reader import read_run

    (segment,) = [each for each in read_run(run_url).segments if each.number == number]
    return segment.end and segment.end["reason"]


@pytest.mark.parametrize("mood", ["hang", pytest.param("refuse", marks=pytest.mark.slow)])
def test_a_checkpoint_that_cannot_be_stored_before_the_time_is_over(s3, bucket, data_url, tmp_path, mood):
    """The store goes away with the machine: 33, and the log says how far the run has come."""
    run_url = f"{bucket}/run"
    flags = [*launching.TINY, *FLAGS, "--train.steps=100000", "--checkpoint.every_steps=1000000"]
    with FaultyProxy(s3.endpoint) as proxy:
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.url, "LEAVE_SECONDS": "1"}
        command = [sys.executable, *patched.module_of("trainer.train", {"core.stop.CLOSE_SECONDS": 1.0}), *flags]
        command += ["--train.eval_every=0", "--train.sample_every=0"]
        command += [f"--data.url={data_url}", f"--run.url={run_url}", f"--data.cache_dir={tmp_path}"]
        process = warm.Popen(command, cwd=launching.REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
        said = []
        for line in process.stderr:
            said.append(line)
            if "step 3/" in line:
                proxy.away = mood
                process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 33, "".join(said)
    assert "the time to save is over: no step is stored" in "".join(said)
    assert launching.completed(run_url) == []


@pytest.mark.slow
def test_a_spot_notice_ends_an_evaluation(data_url, tmp_path):
    """The trainer itself hears it; the launcher does not know of it but by the exit code."""
    run_url = str(tmp_path / "run")
    command = [sys.executable, "-m", "trainer.train", *launching.TINY, *FLAGS, "--train.eval_tokens=10000000"]
    command += [f"--data.url={data_url}", f"--run.url={run_url}", f"--data.cache_dir={tmp_path}/cache"]
    with metadata_service() as (service, environment):
        environment = {**os.environ, **environment, "CLOUD": "aws", "EXIT_CODE_FILE": str(tmp_path / "code")}
        environment.pop("AWS_EC2_METADATA_DISABLED", None)
        process = warm.Popen(command, cwd=launching.REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
        said = []
        for line in process.stderr:
            said.append(line)
            if f"step {EVERY}/" in line:
                service.items["spot/instance-action"] = '{"action": "terminate", "time": "2026-11-20T08:02:00Z"}'
        assert process.wait(PATIENCE_SECONDS) == 33, "".join(said)
    assert (tmp_path / "code").read_text() == "33\n"
    assert f"left at step {EVERY} of {STEPS} (spot: terminate at 2026-11-20T08:02:00Z)" in "".join(said)
    assert launching.completed(run_url)[0] == EVERY


# --- the full sweep --------------------------------------------------------------------------------------------

STEP_SECONDS = 0.2
MOST_POINTS = 25  # of a phase; where it takes longer than so many steps, these are longer
LOOK = 2 * EVERY
# How the phases of a life begin, by lines of its log. Each is swept from its beginning to that of the next.
PHASES = {
    "start and preflight": None,
    "imports": "running ",
    "restore": "continuing ",
    "first step": "resumed from step",
    "steps": "the first step began",
    "evaluation": f"step {LOOK}/{STEPS} | loss",
    "HellaSwag": f"step {LOOK}/{STEPS} | validation loss",
    "samples": f"step {LOOK}/{STEPS} | HellaSwag",
    "more steps": f"step {LOOK}/{STEPS} | sample",
    "last checkpoint": f"step {STEPS}/{STEPS} | loss",
    "last evaluation": f"step {STEPS} is saved",
    "last HellaSwag": f"step {STEPS}/{STEPS} | validation loss",
    "last samples": f"step {STEPS}/{STEPS} | HellaSwag",
    "end": f"step {STEPS}/{STEPS} | sample",
}
_ORDER = list(PHASES)
PARTS = {
    "before the first step": _ORDER[: _ORDER.index("steps")],
    "from the first step": _ORDER[_ORDER.index("steps") :],
}
# So that each phase takes some steps of the sweep on a machine of today.
LONGER = (
    "--train.eval_tokens=4096",
    "--train.sample_tokens=24",
    "--train.log_every=1",
)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["reachable", "away"])
@pytest.mark.parametrize("part", PARTS)
def test_sigterm_at_every_moment_of_a_life(s3, data_in_bucket, undisturbed, tmp_path, part, store):
    """Each life continues a copy of the same run. A store that is away refuses or hangs from the request to stop until
    the end. Every checkpoint has the bits of a run that nothing stopped; of each phase, one run per stored step is
    continued to its end, which is that of the run that nothing stopped."""
    phases = PARTS[part]
    is_warm = part != next(iter(PARTS))
    store_url = f"s3://lives/{store}-{part.replace(' ', '-')}"
    flags = [*FLAGS, *LONGER, f"--data.url={data_in_bucket}", f"--data.cache_dir={tmp_path}"]
    codes: dict[str, list[int]] = {phase: [] for phase in phases}
    continued: set[tuple[str, int]] = set()
    with FaultyProxy(s3.endpoint) as proxy:
        environment = {"AWS_ENDPOINT_URL": proxy.url, **(STORE_IS_AWAY if store == "away" else {})}
        base = Run(f"{store_url}/base", flags, undisturbed)
        assert base.ends(base.live(**environment).until_said(f"step {EVERY - 2}/").ask()) == 33
        assert 0 < base.newest < LOOK
        seconds_of = durations(base.copy("whole").live(is_warm=is_warm, **environment))
        for phase, following in itertools.pairwise([*PHASES, None]):
            if phase not in phases:
                continue
            for point in itertools.count():
                run = base.copy(f"{phase}-{point}".replace(" ", "-"))
                seconds = point * max(STEP_SECONDS, seconds_of[phase] / MOST_POINTS)
                life = run.live(is_warm=is_warm, **environment).until_it_listens()
                is_over = not life.lives_on(PHASES[phase], seconds)
                is_over |= following is not None and life.has_said(PHASES[following])
                if store == "away":
                    proxy.away = "hang" if point % 2 else "refuse"
                life.ask().end()
                proxy.away = ""
                codes[phase].append(run.ends(life))
                stored = f"step {run.began_at} to {run.newest}"
                print(f"{store}: {phase} + {seconds:.1f} s: exit code {codes[phase][-1]}, {stored}", flush=True)
                if run.newest > run.began_at and (phase, run.newest) not in continued:
                    run.continues(environment)
                    continued.add((phase, run.newest))
                if is_over:
                    break
    found = {phase: dict(Counter(each)) for phase, each in codes.items()}
    print(f"{store}: {sum(map(len, codes.values()))} points, exit codes by phase: {found}")
    assert sum(each.count(33) for each in codes.values()) > len(phases)


def durations(undisturbed: Life) -> dict[str, float]:
    """Seconds of each phase."""
    began = time.monotonic()
    assert undisturbed.end() == 0, undisturbed.output
    starts = [undisturbed.said_at(text) if text else began for text in PHASES.values()]
    return {
        phase: max(0.0, end - start)
        for phase, (start, end) in zip(PHASES, itertools.pairwise([*starts, time.monotonic()]), strict=True)
    }
