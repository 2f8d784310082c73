"""A `sky` command that is a real process, and programs of ours that find it first on their PATH."""

import fcntl
import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parent.parent

# Keeps the words it is called with, answers by the first ones from a file, and forgets what it is asked to end. Of
# several answers each call takes one, and the last one stays. A controller ends only if `delete` is typed. A command
# whose exit code is `waits` does not end by itself.
PROGRAM = """#!{python}
import json, os, sys, time
folder, words = os.path.dirname(os.path.abspath(__file__)), sys.argv[1:]
with open(folder + "/calls", "a") as calls:
    calls.write(" ".join(words) + "\\n")
with open(folder + "/answers.json") as file:
    answers = json.load(file)
key = " ".join(words[:2]) if words[0] in ("jobs", "api") else words[0]
is_controller = key == "down" and words[1].startswith("sky-jobs-controller-")
if is_controller and sys.stdin.read() != "delete\\n":
    sys.exit("aborted")
ended = {{"jobs cancel": "jobs queue", "down": "status"}}.get(key)
if ended and key not in answers:
    was = answers.get(ended, ["[]", "", 0])
    if isinstance(was[0], str):
        try:
            left = [each for each in json.loads(was[0]) if ended == "status" and each["name"] not in words]
        except ValueError:
            left = []
        answers[ended] = [json.dumps(left), "", 0]
found = answers.get(key, ["", "", 0])
if not isinstance(found[0], str):
    answers[key] = found[1:] or found
    found = found[0]
with open(folder + "/answers.json", "w") as file:
    json.dump(answers, file)
out, err, code = found
sys.stdout.write(out)
sys.stderr.write(err)
if code == "waits":
    open(folder + "/waits", "w").close()
    time.sleep(600)
sys.exit(code)
"""


class SkyCommand:
    """`sky(**{"status": (stdout, stderr, exit code)})` sets the answers, of which a key may have several in a list.

    The home folder is empty.
    """

    def __init__(self, scratch: Path):
        self.folder, self.home = scratch / "bin", scratch / "home"
        self.folder.mkdir()
        self.home.mkdir()
        (self.folder / "sky").write_text(PROGRAM.format(python=sys.executable), encoding="utf-8")
        (self.folder / "sky").chmod(0o755)
        self()

    def __call__(self, **answers: tuple[str, str, int] | list[tuple[str, str, int]]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")

    def run(self, module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """A program of ours, without the credentials and settings of whoever runs the tests."""
        command, options = self._program(module, arguments, environment)
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, **options)

    def start(self, module: str, *arguments: str, **environment: str) -> subprocess.Popen:
        """The same without waiting for it, in a session with a terminal of its own. `terminal` is its other end."""
        command, options = self._program(module, arguments, environment)
        terminal, ours = pty.openpty()

        def begin() -> None:
            warm.default_signals()
            os.setsid()
            fcntl.ioctl(ours, termios.TIOCSCTTY, 0)

        process = subprocess.Popen(command, stdin=ours, stdout=ours, stderr=ours, preexec_fn=begin, **options)
        os.close(ours)
        process.terminal = terminal
        return process

    def _program(self, module: str, arguments: tuple[str, ...], environment: dict[str, str]) -> tuple[list[str], dict]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        kept |= {"HOME": str(self.home), "PATH": f"{self.folder}:{kept['PATH']}", "PYTHONIOENCODING": "utf-8"}
        kept |= {"AWS_EC2_METADATA_DISABLED": "true", **environment}
        return [sys.executable, "-m", module, *arguments], {"cwd": ROOT, "env": kept, "text": True, "encoding": "utf-8"}

    def find_here(self, patch: pytest.MonkeyPatch) -> None:
        """Programs of ours that run in this process find it too, and none of the user's credentials."""
        for name in [name for name in os.environ if name.startswith(("AWS_", "SKYPILOT_"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(self.home))
        patch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")
        patch.chdir(ROOT)

    def called(self) -> list[str]:
        """Each call so far, without the command's own name."""
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []
