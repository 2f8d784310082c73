"""Lines of each package that the tests reach, in the processes of pytest and in the programs that they start.

    python -m tests.covered SITE_PACKAGES [PYTEST_ARGUMENT ...]     SITE_PACKAGES holds the package coverage

`make coverage` installs it and runs the fast tests. A process that SIGKILL ends, or that gets an environment without
PYTHONPATH, leaves no figures: the table is a lower bound.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("core", "clouds", "data_prep", "costs", "launch", "trainer")
SETTINGS = """[run]
parallel = true
data_file = {folder}/data
source = {sources}
patch =
    _exit
    fork
"""


def main(site_packages: str, *arguments: str) -> int:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        settings = folder / "coveragerc"
        settings.write_text(SETTINGS.format(folder=folder, sources=", ".join(str(ROOT / each) for each in PACKAGES)))
        (folder / "sitecustomize.py").write_text("import coverage\ncoverage.process_startup()\n")
        paths = os.pathsep.join([str(folder), site_packages])
        environment = os.environ | {"PYTHONPATH": paths, "COVERAGE_PROCESS_START": str(settings)}
        code = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment).returncode
        for command in (["combine", "--quiet"], ["json", "--quiet", "-o", str(folder / "report.json")]):
            subprocess.run(
                [sys.executable, "-m", "coverage", command[0], f"--rcfile={settings}", *command[1:]],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": site_packages},
                check=True,
            )
        print(table(json.loads((folder / "report.json").read_text())["files"]))
    return code


def table(files: dict[str, dict]) -> str:
    """A row per package, and the files of which the tests reach least."""
    total, reached = defaultdict(int), defaultdict(int)
    for path, found in files.items():
        package = Path(path).parts[0]
        total[package] += found["summary"]["num_statements"]
        reached[package] += found["summary"]["covered_lines"]
    rows = [f"| {each} | {total[each]:,} | {100 * reached[each] / total[each]:.1f} % |" for each in PACKAGES]
    least = sorted(files.items(), key=lambda item: -item[1]["summary"]["missing_lines"])[:20]
    rows += [f"{found['summary']['missing_lines']:5d} of {path} are not reached" for path, found in least]
    return "\n".join(["| package | statements | reached |", "|---|---|---|", *rows])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
