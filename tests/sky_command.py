"""A `sky` command that is a real process, and programs of ours that find it first on their PATH."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Keeps the words it is called with, answers by the first ones from a file, and forgets what it is asked to end.
PROGRAM = """#!{python}
import json, os, sys
folder, words = os.path.dirname(os.path.abspath(__file__)), sys.argv[1:]
with open(folder + "/calls", "a") as calls:
    calls.write(" ".join(words) + "\\n")
with open(folder + "/answers.json") as file:
    answers = json.load(file)
key = " ".join(words[:2]) if words[0] == "jobs" else words[0]
if key in ("jobs cancel", "down") and key not in answers:
    answers["jobs queue" if key == "jobs cancel" else "status"] = ["[]", "", 0]
    with open(folder + "/answers.json", "w") as file:
        json.dump(answers, file)
out, err, code = answers.get(key, ["", "", 0])
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


class SkyCommand:
    """`sky(**{"status": (stdout, stderr, exit code)})` sets the answers; the home folder is empty."""

    def __init__(self, scratch: Path):
        self.folder, self.home = scratch / "bin", scratch / "home"
        self.folder.mkdir()
        self.home.mkdir()
        (self.folder / "sky").write_text(PROGRAM.format(python=sys.executable), encoding="utf-8")
        (self.folder / "sky").chmod(0o755)
        self()

    def __call__(self, **answers: tuple[str, str, int]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers), encoding="utf-8")

    def run(self, module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        """A program of ours, without the credentials and settings of whoever runs the tests."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        kept |= {"HOME": str(self.home), "PATH": f"{self.folder}:{kept['PATH']}", "PYTHONIOENCODING": "utf-8"}
        kept |= {"AWS_EC2_METADATA_DISABLED": "true", **environment}
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, encoding="utf-8")

    def called(self) -> list[str]:
        """Each call so far, without the command's own name."""
        calls = self.folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []
