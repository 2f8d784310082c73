"""core.output: what is behind standard output (an old encoding, a full disk, `| head`) does not end a program badly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.run import journal
from tests.patience import PATIENCE_SECONDS

ROOT = Path(__file__).parent.parent
ENTRY = """
import sys
from core.console import run_entry

def main(arguments):
    for number in range(100_000):
        print(number)
    open(arguments[0], "w").write("done")

run_entry(main, shows={shows})
"""


def start(code: str, *arguments: str, stdout, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env=variables, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, timeout=PATIENCE_SECONDS
    )


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("ascii", b"2 -> 6 - h\\xf6st ... \\u2603 \xff"),
        ("latin-1", b"2 -> 6 - h\xf6st ... \\u2603 \xff"),
        ("cp1252", b"2 -> 6 \x96 h\xf6st \x85 \\u2603 \xff"),
        ("utf-8", "2 → 6 – höst … ☃ ".encode() + b"\xff"),
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_characters_that_the_encoding_lacks_are_replaced(encoding, printed, unbuffered):
    """The last character is a byte of a file's name that is not UTF-8."""
    code = "from core.console import run_entry\nrun_entry(lambda _: print('2 → 6 – höst … ☃ \\udcff'))"
    environment = {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": unbuffered}
    done = start(code, stdout=subprocess.PIPE, **environment)
    assert (done.stdout, done.stderr, done.returncode) == (printed + b"\n", b"", 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(("shows", "code", "kind"), [(True, 1, "error"), (False, 0, "warning")])
def test_a_full_disk_is_one_sentence_and_work_goes_on(tmp_path, shows, code, kind):
    with open("/dev/full", "w") as full:
        done = start(ENTRY.format(shows=shows), str(tmp_path / "work"), stdout=full)
    said = f"{kind}: standard output: No space left on device; the rest of the output is lost\n"
    assert (done.stderr.decode(), done.returncode) == (said, code)
    assert (tmp_path / "work").exists() != shows


@pytest.mark.parametrize("shows", [True, False])
def test_a_reader_that_has_gone_is_no_failure_and_work_goes_on(tmp_path, shows):
    """`make down | head` ends every machine; a report into `| head` ends early."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as pipe:
        done = start(ENTRY.format(shows=shows), str(tmp_path / "work"), stdout=pipe)
    assert (done.stderr, done.returncode) == (b"", 0)
    assert (tmp_path / "work").exists() != shows


def test_a_closed_standard_output_leads_nowhere(tmp_path):
    code = f"import sys\nsys.stdout = None\n{ENTRY.format(shows=True)}"
    done = start(code, str(tmp_path / "work"), stdout=subprocess.DEVNULL)
    assert (done.stderr, done.returncode) == (b"", 0)
    assert (tmp_path / "work").exists()


def test_a_large_log_is_shown_object_by_object(tmp_path, monkeypatch):
    """Not read as a whole before its first line appears; and one that is being put together is listed again."""
    writer = journal.Journal(str(tmp_path), 3600.0)
    for number in range(6):
        writer.add({"n": number})
        writer.flush()
    shown = journal.stream(str(tmp_path))
    assert next(shown) == ([{"n": 0}], [])
    writer.close()  # one object replaces the six
    assert list(shown) == [([{"n": number} for number in range(1, 6)], [])]


def test_the_first_lines_of_a_large_log_need_no_other(tmp_path):
    """`make logs FROM=bucket | head` ends at once and well. The last object would give a warning if it was read."""
    folder = tmp_path / "logs" / "20260101T000000Z-node-000"
    folder.mkdir(parents=True)
    line = json.dumps({"time": 0.0, "line": "step " * 40}) + "\n"
    for first in range(0, 10_000, 1000):
        (folder / f"{first:08d}-{first + 999:08d}.jsonl").write_text(line * 1000)
    (folder / "00010000-00010000.jsonl").write_text("no JSON\n")
    command = [sys.executable, "-m", "launch.runs", "logs", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        shown = [process.stdout.readline() for _ in range(2)]
        process.stdout.close()
        said = process.stderr.read()
        code = process.wait(PATIENCE_SECONDS)
    assert shown == [b"--- 20260101T000000Z-node-000\n", b"00:00:00 " + b"step " * 40 + b"\n"]
    assert (said, code) == (b"", 0)
