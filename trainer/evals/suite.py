"""What can be measured of a model, each with all that defines its result.

A measurement's `identity` and its model are what a stored result is found by: two results with the same identity may
be compared.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from core.data import manifest, sets
from core.errors import ConfigError
from core.settings.evaluation import LM_EVAL, EvaluateConfig
from trainer.distributed.process_group import Ranks, on_all, on_main
from trainer.evals import contamination, perplexity, results
from trainer.evals.hellaswag import NAME as HELLASWAG
from trainer.evals.hellaswag import HellaSwag
from trainer.evals.progress import Kept
from trainer.weights.open import TrainedModel

Found = dict[str, Any]  # `scores`, and what else is worth keeping


@dataclass(frozen=True)
class Measurement:
    name: str
    identity: Mapping[str, Any]
    compute: Callable[[TrainedModel, Kept], Found]  # on all ranks, the same everywhere


@dataclass(frozen=True)
class Data:
    """What lies at the data's URL, read once."""

    url: str
    ranks: Ranks

    @functools.cached_property
    def manifest(self) -> manifest.Manifest:
        if not self.url:
            raise ConfigError(
                "no data: none of the models is a run that names its own; give --data_url=..., or set DATA_URL"
            )
        return on_main(lambda: manifest.read(self.url), self.ranks)

    def hellaswag(self, count: int) -> list[dict[str, Any]]:
        self.manifest  # noqa: B018 (says how to give data where there is none)
        rows = on_main(lambda: sets.read(self.url, HELLASWAG), self.ranks)
        return rows[: count or len(rows)]


def measurements(settings: EvaluateConfig, data: Data, ranks: Ranks, precision: str, home: str) -> list[Measurement]:
    """One per task, in order. Raises ConfigError, DataError for what is not there."""
    makers = {"perplexity": _perplexity, HELLASWAG: _hellaswag}
    return [
        (_harness if task.startswith(LM_EVAL) else makers[task])(task, settings, data, ranks, precision, home)
        for task in dict.fromkeys(settings.tasks)
    ]


def _perplexity(
    task: str, settings: EvaluateConfig, data: Data, ranks: Ranks, precision: str, home: str
) -> Measurement:
    identity = {"data": data.manifest.fingerprint, "tokens": settings.tokens, "precision": precision}
    tokens = functools.cache(
        lambda: on_all(lambda: perplexity.read_tokens(data.url, data.manifest, settings.tokens), ranks)
    )
    how = perplexity.of_documents if settings.per_document else perplexity.of_stream

    def compute(opened: TrainedModel, kept: Kept) -> Found:
        return {"scores": how(opened.model, tokens(), opened.encoding, ranks, precision, kept)}

    return Measurement(f"{task}-rolling" if settings.per_document else task, identity, compute)


def _hellaswag(task: str, settings: EvaluateConfig, data: Data, ranks: Ranks, precision: str, home: str) -> Measurement:
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

    def compute(opened: TrainedModel, kept: Kept) -> Found:
        answers = scorer(opened.encoding).answers(opened.model, kept, task)
        scores = answers.score().as_dict()
        if settings.contamination:
            seen = set(_seen(items, opened.encoding, data, settings, ranks, home, seen_in, kept.check))
            scores["seen_items"] = len(seen)
            scores |= {f"unseen_{name}": value for name, value in answers.score(seen).as_dict().items()}
        bits = {name: "".join("01"[each] for each in values) for name, values in asdict(answers).items()}
        return {"scores": scores, "answers": bits}

    return Measurement(task if style == "harness" else f"{task}-{style}", identity, compute)


def _seen(
    items,
    encoding,
    data: Data,
    settings: EvaluateConfig,
    ranks: Ranks,
    home: str,
    identity,
    check: Callable[[], None],
) -> list[int]:
    """Items that occur in the training shards; a property of the data alone, and kept as such."""
    key = results.key_of("contamination", identity)
    found = on_main(lambda: results.find(home, key), ranks)
    if found is None:
        tokens = [contamination.item_tokens(item, encoding) for item in items]
        with Kept(f"{home}/partial/{key}", ranks, check) as kept:
            run = settings.contamination_tokens
            seen = contamination.seen(tokens, data.url, data.manifest, run, ranks, kept)
        found = {"task": "contamination", "identity": identity, "seen": seen}
        on_main(lambda: results.store(home, key, found), ranks)
        kept.discard()
    return found["seen"]


def _harness(task: str, settings: EvaluateConfig, data: Data, ranks: Ranks, precision: str, home: str) -> Measurement:
    from trainer.evals import harness  # says what is missing where lm-eval is not installed

    name = task.removeprefix(LM_EVAL)
    identity = {
        "lm_eval": harness.version(),
        "items": settings.limit,
        "num_fewshot": settings.num_fewshot,
        "folder": settings.lm_eval_tasks,
        "precision": precision,
    }

    def compute(opened: TrainedModel, kept: Kept) -> Found:
        folder, limit, num_fewshot = settings.lm_eval_tasks, settings.limit, settings.num_fewshot
        return {"scores": harness.run(name, opened, ranks, precision, kept, folder, limit, num_fewshot)}

    return Measurement(task, identity, compute)
