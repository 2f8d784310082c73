"""Defines the tasks that measure a model, and stores their results in the model's run.

    RUN_URL/evaluations/step-00001000/hellaswag-0123abcd.json     (0123abcd: hash of settings that define the result)
    RUN_URL/evaluations/step-00001000/hellaswag-0123abcd-2.json   (the same task, measured once more)
    RUN_URL/evaluations/step-00001000/partial/                    (partial results of unfinished tasks)

The hash covers the task's `identity`. So two results are comparable if their objects have the same name, even for
different models. The results are not in the folder of the checkpoint, because old checkpoints are deleted. An existing
object is never overwritten. docs/formats.md documents the fields.
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from core import storage, untrusted
from core.data import chat_template, manifest, sets
from core.errors import ConfigError, ObjectExists
from core.run.folder import RunFolder, step_name
from core.settings.evaluation import LM_EVAL, EvaluateConfig
from trainer.distributed.process_group import Ranks, on_all, on_main
from trainer.evals import contamination, perplexity
from trainer.evals.hellaswag import NAME as HELLASWAG
from trainer.evals.hellaswag import HellaSwag
from trainer.evals.progress import PartialResults
from trainer.weights.open import TrainedModel

log = logging.getLogger("evaluate")
FORMAT = "evaluation"
VERSION = 1
_NAME = re.compile(r"^(?P<key>.+-[0-9a-f]{8})(-(?P<number>\d+))?\.json$")

Found = dict[str, Any]  # the field `scores` and other fields of a stored result


@dataclass(frozen=True)
class Measurement:
    """One task. `identity` holds all settings that define its result."""

    name: str
    identity: Mapping[str, Any]
    # All ranks call this function, and all get the same result.
    compute: Callable[[TrainedModel, PartialResults], Found]


@dataclass(frozen=True)
class EvaluationData:
    """The dataset at `url`. Each of its parts is read only once."""

    url: str
    ranks: Ranks

    @functools.cached_property
    def manifest(self) -> manifest.Manifest:
        if not self.url:
            raise ConfigError(
                "no data: the first model is not a run with a data.url; give --data_url=..., or set DATA_URL"
            )
        return on_main(lambda: manifest.read(self.url), self.ranks)

    def lacks(self, name: str) -> str:
        """If the set `name` is missing, a sentence that says how to store it. Otherwise an empty text."""
        self.manifest  # noqa: B018 (the access raises an error if no data was given)
        return on_main(lambda: sets.missing(self.url, name), self.ranks)

    def hellaswag(self, count: int) -> list[dict[str, Any]]:
        self.manifest  # noqa: B018 (the access raises an error if no data was given)
        rows = on_main(lambda: sets.read(self.url, HELLASWAG), self.ranks)
        return rows[: count or len(rows)]


def measurements(
    settings: EvaluateConfig, data: EvaluationData, ranks: Ranks, precision: str, home: str
) -> list[Measurement]:
    """One measurement per task, in the order of the tasks. Raises ConfigError, or DataError if data is missing.

    HellaSwag is left out with a warning if its set is not stored, unless it is the only task.
    """
    makers = {"perplexity": _perplexity, HELLASWAG: _hellaswag}
    found = []
    for task in dict.fromkeys(settings.tasks):
        if task == HELLASWAG and len(settings.tasks) > 1 and (missing := data.lacks(HELLASWAG)):
            log.warning("%s is left out: %s", HELLASWAG, missing)
            continue
        maker = _harness if task.startswith(LM_EVAL) else makers[task]
        found.append(maker(task, settings, data, ranks, precision, home))
    return found


def _perplexity(
    task: str, settings: EvaluateConfig, data: EvaluationData, ranks: Ranks, precision: str, home: str
) -> Measurement:
    identity = {"data": data.manifest.fingerprint, "tokens": settings.tokens, "precision": precision}
    tokens = functools.cache(
        lambda: on_all(lambda: perplexity.read_tokens(data.url, data.manifest, settings.tokens), ranks)
    )
    how = perplexity.of_documents if settings.per_document else perplexity.of_stream

    def compute(trained: TrainedModel, partial: PartialResults) -> Found:
        return {"scores": how(trained.model, tokens(), trained.encoding, ranks, precision, partial)}

    return Measurement(f"{task}-rolling" if settings.per_document else task, identity, compute)


def _hellaswag(
    task: str, settings: EvaluateConfig, data: EvaluationData, ranks: Ranks, precision: str, home: str
) -> Measurement:
    items = data.hellaswag(settings.limit)
    info = on_main(lambda: sets.info_of(data.url, HELLASWAG), ranks)
    style = settings.hellaswag_style
    identity = {"set": info.sha256, "items": len(items), "style": style, "precision": precision}
    if settings.contamination:
        run = settings.contamination_tokens
        seen_in = {"set": info.sha256, "items": len(items), "data": data.manifest.fingerprint, "tokens": run}
        identity |= {"contamination": seen_in}

    @functools.cache
    def scorer(encoding) -> HellaSwag:
        return HellaSwag(items, encoding, ranks, precision, style)

    def compute(trained: TrainedModel, partial: PartialResults) -> Found:
        answers = scorer(trained.encoding).answers(trained.model, partial, task)
        scores = answers.score().as_dict()
        if settings.contamination:
            seen = set(_seen(items, trained.encoding, data, settings, ranks, home, seen_in, partial.check))
            scores["seen_items"] = len(seen)
            scores |= {f"unseen_{name}": value for name, value in answers.score(seen).as_dict().items()}
        bits = {name: "".join("01"[each] for each in values) for name, values in asdict(answers).items()}
        return {"scores": scores, "answers": bits}

    return Measurement(task if style == "harness" else f"{task}-{style}", identity, compute)


def _seen(
    items,
    encoding,
    data: EvaluationData,
    settings: EvaluateConfig,
    ranks: Ranks,
    home: str,
    identity,
    check: Callable[[], None],
) -> list[int]:
    """The numbers of the items that occur in the training shards.

    These numbers are stored once for all models, because they depend only on the data.
    """
    key = result_key("contamination", identity)
    found = on_main(lambda: find_result(home, key), ranks)
    if found is None:
        tokens = [contamination.item_tokens(item, encoding) for item in items]
        with PartialResults(f"{home}/partial/{key}", ranks, check) as partial:
            run = settings.contamination_tokens
            seen = contamination.seen(tokens, data.url, data.manifest, run, ranks, partial)
        found = {"task": "contamination", "identity": identity, "seen": seen}
        on_main(lambda: store_result(home, key, found), ranks)
        partial.discard()
    return found["seen"]


def _harness(
    task: str, settings: EvaluateConfig, data: EvaluationData, ranks: Ranks, precision: str, home: str
) -> Measurement:
    from trainer.evals import harness  # raises ConfigError if lm-eval is not installed

    name = task.removeprefix(LM_EVAL)
    identity = {
        "lm_eval": harness.version(),
        "items": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "folder": settings.lm_eval_tasks,
        "precision": precision,
        "sampling": harness.SAMPLING,
    }
    if settings.apply_chat_template:
        identity["template"] = chat_template.NAME

    def compute(trained: TrainedModel, partial: PartialResults) -> Found:
        return {"scores": harness.run(name, trained, ranks, precision, partial, settings)}

    return Measurement(task, identity, compute)


# --- results ---------------------------------------------------------------------------------------------------


def results_folder(trained: TrainedModel, home: str) -> str:
    """The folder for a model's results: in its run, or below `home` for a model without a run."""
    if trained.run_url:
        return storage.join(RunFolder(trained.run_url).evaluations, step_name(trained.step))
    return storage.join(home, re.sub(r"[^\w.-]+", "-", trained.name).strip("-"))


def result_key(task: str, identity: Mapping[str, Any]) -> str:
    """The task's name and a hash of all that defines its result."""
    text = json.dumps([task, identity], sort_keys=True)
    return f"{re.sub(r'[^a-zA-Z0-9_.-]+', '-', task)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def find_result(folder: str, key: str) -> dict[str, Any] | None:
    """The newest result of a key, or None."""
    return _newest(folder).get(key)


def read_results(folder: str) -> list[dict[str, Any]]:
    """The newest result of each key, sorted by key."""
    return [document for _, document in sorted(_newest(folder).items())]


def store_result(folder: str, key: str, document: Mapping[str, Any]) -> str:
    """Stores a result beside the existing ones. Returns its URI."""
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
        uri = storage.join(folder, name)
        try:
            document = untrusted.read_json(uri, is_finite=False)  # the standard error of a single item is NaN
        except ValueError as error:
            log.warning("%s: left out, because it is not a result (%s)", uri, error)
            continue
        if isinstance(document, dict) and (document.get("format"), document.get("version")) == (FORMAT, VERSION):
            found[key] = document
    return found
