"""core.stop: requests to stop are heard from the first moment and answered whatever the main thread does."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import warm
from tests.patience import PATIENCE_SECONDS
from tests.rare import fast_only

ROOT = Path(__file__).parent.parent
# Ten minutes in C, where Python calls no signal handler.
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', (1 << 31) - 1)"


class Program:
    """A script that listens, then does what it likes; it prints `ready` when a signal may come."""

    def __init__(self, script: str, inherits_signals: bool = False, **environment: str):
        code = "import os, sys, threading, time\nfrom core import stop\nstop.listen()\n"
        code += "from core.console import run_entry\n"
        left_out = ("TORCHELASTIC_RUN_ID", "EXIT_CODE_FILE", "STOP_FILE", "PARENT_PID", "LOCAL_RANK")
        self.process = subprocess.Popen(
            [sys.executable, "-c", code + textwrap.dedent(script)],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name not in left_out} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=None if inherits_signals else warm.default_signals,
        )

    def wait_for(self, line: str) -> None:
        for each in self.process.stdout:
            if each.strip() == line:
                return
        raise AssertionError(f"ended with {self.process.wait()} without {line!r}")

    def signal(self, *numbers: int) -> "Program":
        self.wait_for("ready")
        for number in numbers:
            self.process.send_signal(number)
        return self

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, output


@pytest.mark.parametrize("number", fast_only([signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], {signal.SIGTERM}))
def test_with_nothing_to_save_it_leaves_at_once_though_the_main_thread_is_in_c(number, tmp_path):
    script = f"""
        def close():
            print("closed", flush=True)
        stop.CLOSE_SECONDS = 1.0
        stop.on_leaving(close)
        stop.on_leaving(lambda: time.sleep(3600))  # as a store that does not answer
        print("ready", flush=True)
        {BUSY}
    """
    program = Program(script, EXIT_CODE_FILE=str(tmp_path / "code")).signal(number, number, number)
    code, output = program.end()
    assert (code, output.split()) == (33, ["closed"])
    assert (tmp_path / "code").read_text() == "33\n"


def test_what_is_ignored_stays_ignored():
    """As SIGHUP under nohup."""
    script = """
        import signal
        print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, callable(signal.getsignal(signal.SIGTERM)))
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        program = Program(script, inherits_signals=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert program.end() == (0, "True True\n")


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("return 0", 0),
        ("return 34", 34),
        ("return 35", 35),
        ("return 33", 33),
        ("return 1", 33),
        ("raise RuntimeError('the connection was closed by another rank')", 33),
        ("from core.errors import StorageError; raise StorageError('s3://b/x: could not write')", 33),
    ],
)
def test_after_a_request_only_a_verdict_of_its_own_counts(ending, code):
    script = f"""
        heard = threading.Event()
        stop.allow(3600)
        stop.inform(lambda reason: print(reason, flush=True) or heard.set())
        def main(arguments):
            print("ready", flush=True)
            heard.wait()
            {ending}
        run_entry(main)
    """
    found, output = Program(script).signal(signal.SIGTERM).end()
    assert found == code, output
    assert output.splitlines()[0] == "SIGTERM"
    assert "Traceback" not in output


@pytest.mark.parametrize(("settled", "code"), [("", 33), ("stop.settle(0)", 0)])
def test_when_the_time_is_over_it_says_so_and_leaves(settled, code, tmp_path):
    script = f"""
        import logging
        logging.basicConfig(level="INFO", format="%(message)s")
        {settled or "pass"}
        stop.allow(0.5, lambda: "the newest stored step is 7")
        print("ready", flush=True)
        {BUSY}
    """
    program = Program(script, EXIT_CODE_FILE=str(tmp_path / "code")).signal(signal.SIGTERM)
    assert program.end() == (code, "the newest stored step is 7\n")
    assert (tmp_path / "code").read_text() == f"{code}\n"


def test_a_request_to_save_by_hand_has_no_time_limit():
    script = """
        heard = threading.Event()
        stop.allow(0.1)
        stop.inform(lambda reason: heard.set())
        print("ready", flush=True)
        heard.wait()
        print("hurried" if stop.is_hurried() else "in peace", flush=True)
    """
    assert Program(script).signal(signal.SIGUSR1).end() == (0, "in peace\n")


def test_torchruns_signal_after_another_rank_failed_is_no_request(tmp_path):
    """The rank's own sentence and exit code remain, and the launcher is not told that it was asked to stop."""
    script = """
        heard = threading.Event()
        stop.inform(lambda reason: heard.set())
        def main(arguments):
            print("ready", flush=True)
            heard.wait()
            raise RuntimeError("the other rank is gone")
        run_entry(main)
    """
    worker = {"TORCHELASTIC_RUN_ID": "x", "EXIT_CODE_FILE": str(tmp_path / "code"), "STOP_FILE": str(tmp_path / "stop")}
    code, output = Program(script, **worker).signal(signal.SIGTERM).end()
    assert code == 1
    assert "RuntimeError: the other rank is gone" in output
    assert not (tmp_path / "code").exists()
    (tmp_path / "stop").touch()
    assert Program(script.replace('print("ready", flush=True)', "pass"), **worker).end()[0] == 33, (
        "asked before it began"
    )
    assert (tmp_path / "code").read_text() == "33\n"


def test_nothing_outlives_who_started_it():
    """Linux: SIGKILL for the parent, also before the child has begun to listen."""
    child = "from core import stop; stop.listen(); print('ready', flush=True); import time; time.sleep(3600)"
    parent = f"""
        import subprocess
        environment = os.environ | {{"PARENT_PID": str(os.getpid())}}
        subprocess.Popen([sys.executable, "-c", {child!r}], env=environment)
        time.sleep(3600)
    """
    program = Program(parent).signal(signal.SIGKILL)
    program.process.stdout.read()  # ends when the last holder of the pipe has gone
    orphan = subprocess.Popen(
        [sys.executable, "-c", child], cwd=ROOT, env=os.environ | {"PARENT_PID": str(program.process.pid)}
    )
    program.process.wait()
    assert orphan.wait(PATIENCE_SECONDS) == 33


def test_without_a_request_nothing_changes():
    assert Program("run_entry(lambda arguments: 5)").end() == (5, "")
    code, output = Program("def main(arguments): raise RuntimeError('own bug')\nrun_entry(main)").end()
    assert code == 1
    assert "Traceback" in output


def test_the_answer_does_not_wait_for_imports(tmp_path):
    """A module whose import takes for ever, and holds the import lock of its own."""
    (tmp_path / "slow.py").write_text("print('ready', flush=True)\nimport time\ntime.sleep(3600)\n")
    program = Program(f"sys.path.insert(0, {str(tmp_path)!r})\nimport slow")
    assert program.signal(signal.SIGTERM).end()[0] == 33


def test_many_threads_may_ask():
    script = """
        told = []
        stop.allow(3600)
        stop.inform(told.append)
        threads = [threading.Thread(target=stop.ask, args=(str(n),)) for n in range(20)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        stop.inform(told.append)
        assert len(told) == 2 and told[0] == told[1], told
        sys.exit(9)
    """
    assert Program(script).end() == (9, "")


def test_a_signal_after_the_last_line_of_the_program_does_not_replace_its_exit_code():
    """Python removes its handlers before it clears the modules, whose objects may live for some time."""
    late = "class Late:\n    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, 15)\n"
    code = f"import os\nfrom core import stop\nstop.listen()\n{late}late = Late()\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=warm.default_signals)
    assert done.returncode == 0
