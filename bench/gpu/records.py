"""Writes the record of one part of bench.on_gpu as JSON and as text. Both files are rewritten after each result.

    FOLDER/2026-12-01-gpu-look.json    date, machine, versions, commit, command, results of each measurement
    FOLDER/2026-12-01-gpu-look.txt     the same as text

If the program is killed, the state of the record stays `running`, and all results so far are in the record.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import harness
from core import files
from core.run.machine import program_versions

# Packages whose versions influence the results.
PACKAGES = ("torch", "triton", "numpy", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-nccl-cu13", "torchao")


class Record:
    """The measurements of one part, by name: state, command, results, and the reason of a failure."""

    def __init__(self, folder: Path, name: str, command: str, **facts: Any):
        folder.mkdir(parents=True, exist_ok=True)
        head = harness.header(*PACKAGES)
        self.path = folder / f"{head['date']}-{name}.json"
        gpu = {"gpu": gpu_facts()}
        commit = program_versions(()).get("git_revision")
        self.document: dict[str, Any] = {**head, **gpu, "commit": commit, "command": command, **facts}
        self.document |= {"state": "running", "measurements": {}}
        self.write()

    def begin(self, name: str, command: str) -> None:
        self._set(name, state="running", command=command, results=[])

    def add(self, name: str, result: dict[str, Any]) -> None:
        self.document["measurements"][name]["results"].append(result)
        self.write()

    def end(self, name: str, state: str, seconds: float, why: str = "") -> None:
        self._set(name, state=state, seconds=round(seconds, 1), **({"why": why} if why else {}))

    def skip(self, name: str, why: str, state: str = "skipped") -> None:
        self._set(name, state=state, why=why, results=[])

    def finish(self, state: str) -> None:
        self.document["state"] = state
        self.write()

    def results(self, name: str) -> list[dict[str, Any]]:
        return self.document["measurements"].get(name, {}).get("results", [])

    def write(self) -> None:
        for path, text in ((self.path, json.dumps(self.document, indent=1)), (self.text_path, self.as_text())):
            with files.replacing(path) as file:
                file.write(f"{text}\n".encode())

    @property
    def text_path(self) -> Path:
        return self.path.with_suffix(".txt")

    def as_text(self) -> str:
        document = self.document
        machine = f"{document['gpu'] or 'no GPU'}, {document['machine']['cores']} cores"
        versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        lines = [f"{document['command']}", f"{document['date']}, {machine}; {versions}"]
        lines += [f"commit {document['commit'] or '?'}; {document['state']}", ""]
        for name, each in document["measurements"].items():
            seconds = f" after {each['seconds']} s" if "seconds" in each else ""
            lines.append(f"{name}: {each['state']}{seconds}{': ' + each['why'] if 'why' in each else ''}")
            lines += [f"  {line}" for result in each["results"] for line in result["text"].splitlines()]
        return "\n".join(lines)

    def _set(self, name: str, **values: Any) -> None:
        self.document["measurements"].setdefault(name, {}).update(values)
        self.write()


def gpu_facts(query: Sequence[str] = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")) -> str:
    """The first GPU, as nvidia-smi describes it. "" if there is no GPU."""
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return said.splitlines()[0] if said.strip() else ""
