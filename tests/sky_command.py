"""A `sky` command that is a real process, and programs of ours that find it first on their PATH."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Keeps the words it is called with, answers by the first ones from a file, and forgets what it is asked to end. Of
# several answers each call takes one, and the last one stays. A controller ends only if `delete` is typed.
PROGRAM = """#!{python}
import json, os, sys
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
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        kept |= {"HOME": str(self.home), "PATH": f"{self.folder}:{kept['PATH']}", "PYTHONIOENCODING": "utf-8"}
        kept |= {"AWS_EC2_METADATA_DISABLED": "true", **environment}
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=kept, stdin=subprocess.DEVNULL, capture_output=True, text=True, encoding="utf-8"
        )

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
