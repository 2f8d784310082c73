"""What runs on a node around the program: supervision, exit codes, the log that is kept, a whole preflight."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from core import commands, stop
from core.commands import run_within
from core.errors import ConfigError
from core.exit_codes import BAD_NODE, CAPPED
from core.run import journal, log, paid
from core.run.folder import RunFolder
from core.run.reader import spent_usd_at_most
from launch.node import __main__ as node
from launch.node import preflight, supervise
from launch.node.supervise import Child, Outcome
from tests import warm
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parent.parent


def child(script: str, lines: list[str], **options) -> Child:
    return Child([sys.executable, "-c", script], os.environ, lines.append, **options)


@pytest.fixture(autouse=True)
def looks_often(monkeypatch):
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.05)


# --- supervision -----------------------------------------------------------------------------------------------


def test_output_is_kept_line_by_line_and_the_code_is_told():
    lines = []
    outcome = child("import sys; print('one'); print('two', file=sys.stderr); sys.exit(7)", lines).wait(60)
    assert sorted(lines) == ["one", "two"]
    assert outcome == Outcome(7)


def test_a_request_to_stop_reaches_the_worker_below_a_launcher():
    """As torchrun: the workers are its children, and only they know how to save."""
    worker = "import signal,time\nsignal.signal(15, lambda *_: exit(print('saved')))\nprint('ready')\ntime.sleep(60)"
    launcher = f"import subprocess,sys; sys.exit(subprocess.call([sys.executable, '-c', {worker!r}]))"
    lines = []
    running = child(launcher, lines, launched=True)
    stop_when(running, lambda: "ready" in lines)
    outcome = running.wait(60)
    assert lines == ["ready", "saved"]
    assert outcome.stopped


def test_a_worker_that_begins_after_the_request_is_asked_too(tmp_path):
    """And it can tell a request from the signal with which torchrun ends what is left when a worker has failed."""
    early = "import signal,time\nsignal.signal(15, lambda *_: print('early'))\nprint('ready')\n"
    early += "while True: time.sleep(60)"
    late = "import os,signal\nsignal.sigwait({15})\nprint(os.path.exists(os.environ['STOP_FILE']))"
    launcher = "import os,signal,subprocess,sys,time\n"
    launcher += f"first = subprocess.Popen([sys.executable, '-c', {early!r}])\n"
    launcher += "while not os.path.exists(os.environ['STOP_FILE']): time.sleep(0.05)\n"
    launcher += "signal.pthread_sigmask(signal.SIG_BLOCK, {15})\n"  # as it is when the worker begins
    launcher += f"subprocess.call([sys.executable, '-c', {late!r}]); first.kill()"
    lines = []
    environment = {**os.environ, "STOP_FILE": str(tmp_path / "stop")}
    running = Child([sys.executable, "-c", launcher], environment, lines.append, launched=True)
    stop_when(running, lambda: "ready" in lines)
    running.wait(60, stop_seconds=60)
    assert lines == ["ready", "early", "True"]


def test_a_request_during_a_hang_does_not_take_longer():
    """What hangs is asked to save for up to 90 s, and then for its stacks: too long for a machine that goes away."""
    lines = []
    script = (
        "import signal,time\nfor n in (10, 6, 15): signal.signal(n, lambda n, _: print('got', n))\nprint('ready')\n"
    )
    running = child(script + "while True: time.sleep(60)", lines)
    wait_for(lambda: "ready" in lines)
    stop_when(running, lambda: "got 10" in lines)
    outcome = running.wait(hang_seconds=1, stop_seconds=1)
    assert outcome.stopped
    assert "got 15" in lines
    assert outcome.returncode == -signal.SIGKILL


def test_who_does_not_stop_is_killed():
    lines = []
    running = child("import signal,time\nsignal.signal(15, signal.SIG_IGN)\nprint('ready')\ntime.sleep(60)", lines)
    stop_when(running, lambda: "ready" in lines)
    assert running.wait(60, stop_seconds=1).returncode == -signal.SIGKILL


def test_a_hang_prints_the_stacks_and_ends():
    script = "import signal,time\nsignal.signal(10, signal.SIG_IGN)\ndef stuck_here():\n print('go'); time.sleep(60)\n"
    script += "stuck_here()"
    lines = []
    running = child(script, lines)
    wait_for(lambda: "go" in lines)
    outcome = running.wait(hang_seconds=0.5)
    assert outcome.hung
    assert outcome.stacks
    assert any("in stuck_here" in line or "line 4" in line for line in lines), lines


@pytest.mark.parametrize("goes_on", [True, False], ids=["it saves", "it has nothing to save"])
def test_a_hang_that_can_still_save_is_not_aborted(tmp_path, goes_on):
    script = "import signal,time\nfrom core import pulse\n"
    script += f"signal.signal(10, lambda *_: exit(({goes_on} and pulse.beat(), print('saved'))[1]))\n"
    script += "print('go')\ntime.sleep(60)"
    lines = []
    environment = {**os.environ, "PULSE_FILE": str(tmp_path / "pulse"), "PYTHONPATH": str(ROOT)}
    outcome = Child([sys.executable, "-c", script], environment, lines.append).wait(hang_seconds=2)
    assert outcome.hung
    assert outcome.answered == goes_on
    assert not outcome.stacks
    assert lines == ["go", "saved"]


def test_a_program_that_takes_steps_does_not_hang_though_it_prints_nothing(tmp_path):
    """As training with a large train.log_every."""
    script = "import time\nfrom core import pulse\npulse.EVERY_SECONDS = 0\n"
    script += "for _ in range(14): time.sleep(0.25); pulse.beat()"
    environment = {**os.environ, "PULSE_FILE": str(tmp_path / "pulse"), "PYTHONPATH": str(ROOT)}
    outcome = Child([sys.executable, "-c", script], environment, [].append).wait(hang_seconds=3)
    assert outcome == Outcome(0)


def test_a_program_that_prints_dots_does_not_hang_and_its_line_is_kept_whole():
    script = "import time\nfor _ in range(14): print('.', end='', flush=True); time.sleep(0.25)\nprint('done')"
    lines = []
    assert child(script, lines).wait(hang_seconds=3) == Outcome(0)
    assert lines == ["." * 14 + "done"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a\nb\n", ["a", "b"]),
        ("a\n\nb", ["a", "", "b"]),
        ("step 1\rstep 2\r\n", ["step 1", "step 2"]),  # a progress bar
        ("caf\xe9\n", ["caf\ufffd"]),  # not UTF-8
        ("snow \u2603 \u2028 one line\n", ["snow \u2603 \u2028 one line"]),
        ("", []),
    ],
)
def test_lines_end_where_they_end(text, lines):
    data = text.encode("latin-1" if "\xe9" in text else "utf-8")
    found = []
    child(f"import os\nfor byte in {data!r}: os.write(1, bytes([byte]))", found).wait(60)
    assert found == lines


def test_a_line_without_end_takes_little_memory(monkeypatch):
    """A binary file on the screen, or a progress bar that never ends its line."""
    monkeypatch.setattr(supervise, "LINE_CHARACTERS", 1000)
    lines = []
    child("import sys\nfor _ in range(500): sys.stdout.write('y' * 1000)\nprint()\nprint('end')", lines).wait(60)
    assert lines == ["y" * 1000 + " ... (499,000 more characters)", "end"]


def test_lines_that_the_store_does_not_take_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "WAITING_BYTES", 1000)
    monkeypatch.setattr(log, "FLUSH_SECONDS", 3600.0)
    output = node.Output(str(tmp_path))
    for number in range(100):
        output.add(f"line {number} " + "x" * 100)
    output._journal.flush()
    output.add("later")
    output.close()
    lines = [event["line"] for event in journal.read(str(tmp_path))[0]]
    kept = len(lines) - 2
    assert 5 < kept < 10
    assert lines[-2].startswith(f"({100 - kept} lines are left out here")
    assert lines[-1] == "later"


@pytest.mark.parametrize(
    ("outcome", "told", "code", "said"),
    [
        (Outcome(1, hung=True, answered=True), 33, 33, None),  # it has saved: slow, not hung
        (Outcome(1, hung=True, answered=True), None, BAD_NODE, "the program hung; it printed no stacks"),
        (Outcome(-9, hung=True), None, BAD_NODE, "the program hung; it printed no stacks"),
        (Outcome(-6, hung=True, stacks=True), None, BAD_NODE, "the program hung; its stacks are in the log"),
    ],
)
def test_who_hung_is_refused_and_the_record_says_what_there_is(tmp_path, monkeypatch, outcome, told, code, said):
    class Ended:
        def __init__(self, command, environment, *_, **__):
            if told is not None:
                Path(environment["EXIT_CODE_FILE"]).write_text(str(told))

        def wait(self, *_):
            return outcome

    monkeypatch.setattr(node, "Child", Ended)
    environment = {"RUN_URL": str(tmp_path)}
    try:
        assert node.job("platform", [], environment, [], node.Output(str(tmp_path / "logs")), "attempt") == code
    finally:
        stop.forget()
    refused = [json.loads(path.read_text())["problems"] for path in (tmp_path / "refused").glob("*")]
    assert refused == ([[said]] if said else [])


def test_a_program_that_sigkill_does_not_end_is_not_waited_for(monkeypatch):
    """It waits inside of a driver. The node hung, and another one is taken."""
    child = Child([sys.executable, "-c", ""], dict(os.environ), lambda line: None)

    def never(seconds: float) -> int:
        raise subprocess.TimeoutExpired("program", seconds)

    monkeypatch.setattr(child.process, "wait", never)
    outcome = child.wait(hang_seconds=PATIENCE_SECONDS)
    assert (outcome.returncode, outcome.hung, outcome.stopped) == (-signal.SIGKILL, True, False)


def test_a_command_beyond_its_limit_is_killed_with_all_it_started_and_not_waited_for(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "killpg", lambda group, number: killed.append((group, number)))
    with pytest.raises(subprocess.TimeoutExpired):
        run_within(["sh", "-c", "sleep 300 & sleep 300"], 0.1)
    monkeypatch.undo()
    [(group, number)] = killed
    assert number == signal.SIGKILL
    os.killpg(group, signal.SIGKILL)  # here it was none that nothing ends
    assert run_within(["sh", "-c", "echo out; echo err >&2; exit 3"], PATIENCE_SECONDS).returncode == 3


def test_nothing_that_the_child_started_outlives_it(tmp_path):
    script = "import os,subprocess,sys,time\np=subprocess.Popen(['sleep','600'])\nprint(p.pid)\n"
    script += f"while not os.path.exists({str(tmp_path / 'seen')!r}): time.sleep(0.05)"
    lines = []
    running = child(script, lines)

    def end_once_it_is_seen() -> None:
        wait_for(lambda: lines and int(lines[0]) in running._started)
        (tmp_path / "seen").touch()

    threading.Thread(target=end_once_it_is_seen, daemon=True).start()
    running.wait(PATIENCE_SECONDS)
    assert gone(int(lines[0]))


def wait_for(ready) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stop_when(running: Child, ready) -> None:
    def wait() -> None:
        wait_for(ready)
        running.stop()

    threading.Thread(target=wait, daemon=True).start()


def gone(pid: int) -> bool:
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.1)
    return False


# --- exit codes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "told", "code"),
    [
        (Outcome(0), 0, 0),
        (Outcome(1), 33, 33),  # torchrun says 1, whatever its workers say
        (Outcome(1), 34, 34),
        (Outcome(1), None, 1),
        (Outcome(-9), None, 1),
        (Outcome(0), None, 0),  # preparation does not write a code
        (Outcome(-15, stopped=True), None, 33),
        (Outcome(1, stopped=True), None, 33),  # ranks that were importing, a store that is away
        (Outcome(-9, stopped=True), None, 33),  # killed when its time was over
        (Outcome(0, stopped=True), None, 0),
        (Outcome(1, stopped=True), 0, 0),
        (Outcome(1, stopped=True), 34, 34),
        (Outcome(-15), None, 33),  # somebody asked torchrun itself
        (Outcome(143), None, 33),
    ],
)
def test_exit_code(outcome, told, code):
    assert node.exit_code(outcome, told) == code


def test_a_bad_node_is_left_a_few_times_then_the_job_ends(tmp_path):
    run_url = str(tmp_path)
    codes = [node.refuse(run_url, f"{stamp(-60 + n)}-node-000", ["GPU 3 is gone"]) for n in range(4)]
    assert codes == [BAD_NODE] * node.REFUSALS_PER_DAY + [1]
    assert json.loads(next((tmp_path / "refused").iterdir()).read_text())["problems"] == ["GPU 3 is gone"]


def test_refusals_of_yesterday_do_not_count(tmp_path):
    for number in range(5):
        node.refuse(str(tmp_path), f"{stamp(-2 * 86400 + number)}-node-000", ["slow"])
    assert node.refuse(str(tmp_path), f"{stamp(0)}-node-000", ["slow"]) == BAD_NODE


def stamp(seconds: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + seconds))


def test_the_node_program_runs_a_module_and_keeps_its_log(tmp_path):
    environment = {**os.environ, "RUN_URL": str(tmp_path), "CLOUD": "", "SKYPILOT_CLUSTER_INFO": ""}
    command = [sys.executable, "-m", "launch.node", "-m", "platform"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    (attempt,) = (tmp_path / "logs").iterdir()
    events, problems = journal.read(str(attempt))
    lines = [event["line"] for event in events]
    assert problems == []
    assert lines[0].startswith("node 1 of 1: ?/?/?")
    assert any(line.startswith("Linux") for line in lines)
    assert lines[-1] == "exit code 0"


def test_a_node_that_fails_before_its_program_runs_has_a_record_for_the_cap(tmp_path, monkeypatch):
    def fail(*arguments) -> int:
        raise ConfigError("no")

    monkeypatch.setattr(node, "job", fail)
    began = time.time() - 3600
    given = {"RUN_URL": str(tmp_path), "USD_PER_HOUR": "16", "SEGMENT_STARTED_AT": f"{began:.0f}"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError):
        node.main(["-m", "trainer.train"])
    assert spent_usd_at_most(str(tmp_path)) == pytest.approx(16.0, abs=1.0)
    (record,) = (tmp_path / "machines").iterdir()
    assert (record / "end.json").exists()


@pytest.mark.parametrize(("max_usd", "code"), [("15", CAPPED), ("0", None), ("", None), ("60", None)])
def test_on_a_spent_cap_a_node_ends_before_it_costs_more(tmp_path, monkeypatch, max_usd, code):
    class Preflight(Exception):
        pass

    def preflight_begins(*arguments):
        raise Preflight

    now = time.time()
    paid.begin(RunFolder(str(tmp_path)), "earlier", now - 3600, 16.0, "elsewhere")
    paid.end(RunFolder(str(tmp_path)), "earlier")
    monkeypatch.setattr(node.network, "check_port", preflight_begins)
    environment = {"RUN_URL": str(tmp_path), "MAX_USD": max_usd}
    with contextlib.nullcontext() if code else pytest.raises(Preflight):
        assert node.job("trainer.train", [], environment, [], None, "now") == code


def test_two_starts_in_one_second_have_logs_of_their_own(tmp_path, monkeypatch):
    """Two machines on one run: a managed job that recovers, beside a start by hand."""
    monkeypatch.setenv("RUN_URL", str(tmp_path))
    monkeypatch.setenv("CLOUD", "")
    monkeypatch.setenv("SKYPILOT_CLUSTER_INFO", "")
    monkeypatch.setattr(node.time, "strftime", lambda *_: "20261129T120000Z")
    try:
        assert [node.main(["-m", "platform"]) for _ in range(2)] == [0, 0]
    finally:
        stop.forget()
    found = [journal.read(str(attempt))[0] for attempt in (tmp_path / "logs").iterdir()]
    assert [events[-1]["line"] for events in found] == ["exit code 0"] * 2


def test_without_a_run_url_one_sentence():
    command = [sys.executable, "-m", "launch.node", "-m", "platform"]
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: RUN_URL is not set")


def test_preflight_of_a_rehearsal_measures_and_passes(tmp_path, monkeypatch):
    """The whole of it with two gloo ranks instead of GPUs."""
    monkeypatch.setattr(commands.subprocess, "Popen", warm.Popen)
    monkeypatch.setenv("WARM_CHILDREN", "yes")
    report = preflight.run({"RUN_URL": str(tmp_path), "DEVICE": "cpu", "RANKS_PER_NODE": "2"}, [])
    assert report.problems == []
    assert report.figures["all_reduce_gb_per_s"] > 0
    assert report.figures["bucket_read_mb_per_s"] > 0
    assert not list((tmp_path / "preflight").iterdir()), "the probe is deleted"


def test_a_failing_worker_has_the_last_word(tmp_path):
    """One sentence, not torchrun's own traceback, and no run is begun."""
    settings = {"RUN_URL": str(tmp_path), "DATA_URL": str(tmp_path / "none"), "DEVICE": "cpu", "CLOUD": ""}
    command = [sys.executable, "-m", "launch.node", "-m", "trainer.train", "trainer/configs/debug.yaml"]
    command += ["--train.device=cpu"]
    environment = {**os.environ, **settings, "WARM_CHILDREN": "yes"}
    done = warm.run(command, cwd=ROOT, env=environment, timeout=PATIENCE_SECONDS)
    assert done.returncode == 1
    assert "there is no manifest; prepare the data first" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run.json").exists()


def test_the_launcher_needs_neither_torch_nor_skypilot():
    """It runs in the prep image and on a laptop; the sky command is a program beside it."""
    names = [f"launch.{path.stem}" for path in (ROOT / "launch").glob("*.py") if path.stem != "__init__"]
    code = "import importlib,sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "print(sorted({'torch', 'sky', 'boto3'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert done.stdout.strip() == "[]", done.stderr
