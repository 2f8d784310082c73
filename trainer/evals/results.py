"""Results of evaluations beside the checkpoint they are about. Field by field in docs/formats.md.

    RUN_URL/evaluations/step-00001000/hellaswag-0123abcd.json     0123abcd: of all that defines the number
    RUN_URL/evaluations/step-00001000/hellaswag-0123abcd-2.json   the same, measured again
    RUN_URL/evaluations/step-00001000/partial/                    what unfinished tasks have found so far

A folder of its own, so that checkpoints come and go without it. Each object is created exclusively: no result is ever
overwritten.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from core import storage
from core.errors import ObjectExists
from core.run.folder import RunFolder, step_name
from trainer.weights.open import TrainedModel

FORMAT = "evaluation"
VERSION = 1
_NAME = re.compile(r"^(?P<key>.+-[0-9a-f]{8})(-(?P<number>\d+))?\.json$")


def folder_of(opened: TrainedModel, home: str) -> str:
    """Where results about a model lie: with its run, or below `home` for a model that is no run of ours."""
    if opened.run_url:
        return storage.join(RunFolder(opened.run_url).evaluations, step_name(opened.step))
    return storage.join(home, re.sub(r"[^\w.-]+", "-", opened.name).strip("-"))


def key_of(task: str, identity: Mapping[str, Any]) -> str:
    """The task's name and a hash of what defines its result."""
    text = json.dumps([task, identity], sort_keys=True)
    return f"{re.sub(r'[^a-zA-Z0-9_.-]+', '-', task)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def find(folder: str, key: str) -> dict[str, Any] | None:
    """The newest result under a key."""
    return _newest(folder).get(key)


def read_all(folder: str) -> list[dict[str, Any]]:
    """The newest result of each key, by name."""
    return [document for _, document in sorted(_newest(folder).items())]


def store(folder: str, key: str, document: Mapping[str, Any]) -> str:
    """Keep a result beside those that are there. Returns its URI."""
    data = (json.dumps({"format": FORMAT, "version": VERSION, **document}, indent=1) + "\n").encode()
    number = 1
    while True:
        uri = storage.join(folder, f"{key}.json" if number == 1 else f"{key}-{number}.json")
        try:
            storage.write_bytes(uri, data, exclusive=True)
            return uri
        except ObjectExists:
            number += 1


def _newest(folder: str) -> dict[str, dict[str, Any]]:
    names: dict[str, tuple[int, str]] = {}
    for name in storage.list_names(folder):
        if match := _NAME.match(name):
            number = int(match["number"] or 1)
            names[match["key"]] = max(names.get(match["key"], (0, "")), (number, name))
    found = {}
    for key, (_, name) in names.items():
        document = json.loads(storage.read_bytes(storage.join(folder, name)))
        if (document.get("format"), document.get("version")) == (FORMAT, VERSION):
            found[key] = document
    return found
