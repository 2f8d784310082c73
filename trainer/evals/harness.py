"""Runs tasks of lm-evaluation-harness on our models, as a model class of the harness. Needs `pip install lm-eval`.

Every rank builds the same requests and computes its share. All ranks receive all answers and the same scores.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections import Counter
from typing import Any

import numpy as np

from core.data import chat_template
from core.data.vocabulary import GPT2_END_OF_TEXT
from core.errors import ConfigError
from core.settings.evaluation import EvaluateConfig
from core.settings.inference import Sampling
from core.settings.loader import SettingError
from trainer.distributed.process_group import Ranks, gather_objects
from trainer.evals.likelihood import ScoringRequest, likelihoods
from trainer.evals.perplexity import rolling
from trainer.evals.progress import PartialResults
from trainer.inference.engine import Engine, GenerationRequest
from trainer.weights.open import TrainedModel

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ConfigError(
        f"tasks of lm-evaluation-harness need it: pip install lm-eval, or `pip install -e '.[eval]'` ({error})"
    ) from error

log = logging.getLogger("evaluate")

NEW_TOKENS = 256  # most tokens of a generated text if the task sets no limit, as in the harness
# This number is part of a result's identity. Raise it when the meaning of options or seeds changes, so that old results
# are not reused.
SAMPLING = 2
_OPTIONS = {"top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float}
# Options that only other backends support. An option is accepted if it has one of the listed values or null, because
# these values have no effect.
_NEUTRAL: dict[str, list[Any]] = {
    "early_stopping": [False],
    "frequency_penalty": [0],
    "length_penalty": [1],
    "no_repeat_ngram_size": [0],
    "num_beams": [1],
    "num_return_sequences": [1],
    "presence_penalty": [0],
    "typical_p": [1],
    "use_cache": [False, True],
}


def version() -> str:
    from importlib.metadata import version

    return version("lm-eval")


def run(
    task: str,
    trained: TrainedModel,
    ranks: Ranks,
    precision: str,
    partial: PartialResults,
    settings: EvaluateConfig,
) -> dict[str, Any]:
    """The harness's scores by metric, and by TASK/METRIC for sub-tasks.

    Raises ConfigError for an unknown task, for an option of a task that is not supported, and for a base model if
    `settings.apply_chat_template` is set.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    in_turns, folder = settings.apply_chat_template, os.path.expanduser(settings.lm_eval_tasks)
    tuned = chat_template.is_tuned(trained.state, trained.name)
    if in_turns and not tuned:
        raise ConfigError(f"apply_chat_template: {trained.name} is a base model without a chat template; leave it out")
    if tuned and not in_turns and ranks.is_main:
        log.warning(
            "lm-eval:%s: %s was fine-tuned with a chat template, which these prompts lack; --apply_chat_template=true "
            "applies it",
            task,
            trained.name,
        )
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    # The harness needs half a minute to index its own tasks. If the task is in the user's folder, no index is needed.
    tasks = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if tasks is None or not tasks.match_tasks([task]):
        tasks = _all_tasks(folder)
    if not tasks.match_tasks([task]):
        raise ConfigError(f"lm-eval:{task}: unknown task of the harness; `lm_eval ls tasks` lists them")
    found = simple_evaluate(
        HarnessModel(trained, ranks, precision, partial, in_turns),
        tasks=[task],
        num_fewshot=None if settings.num_fewshot < 0 else settings.num_fewshot,
        limit=settings.limit or None,
        apply_chat_template=in_turns,
        log_samples=False,
        task_manager=tasks,
        # Standard errors of metrics other than means are estimated from this many samples.
        bootstrap_iters=1000,
    )
    scores = {}
    for name, metrics in sorted(found["results"].items()):
        for metric, value in metrics.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                short = metric.removesuffix(",none")
                scores[short if name == task else f"{name}/{short}"] = value
    return scores


@functools.cache
def _all_tasks(folder: str):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder or None)


class HarnessModel(TemplateLM):
    """Our model behind the harness's interface. The base class encodes pairs of context and continuation."""

    def __init__(self, trained: TrainedModel, ranks: Ranks, precision: str, partial: PartialResults, in_turns: bool):
        super().__init__()
        self._model = trained.model
        self._encoding = trained.encoding
        self._ranks = ranks
        self._precision = precision
        self._partial = partial
        self._in_turns = in_turns
        self._calls = 0

    @property
    def eot_token_id(self) -> int:
        return GPT2_END_OF_TEXT

    @property
    def tokenizer_name(self) -> str:
        return "gpt2"

    def chat_template(self, _: bool | str = False) -> str:
        return chat_template.JINJA

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_template.text_of(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._encoding.encode(string, allowed_special="all")

    def _loglikelihood_tokens(self, requests, **_: Any) -> list[tuple[float, bool]]:
        found = self._compute([ScoringRequest(context, continuation) for _, context, continuation in requests])
        return [tuple(each) for each in found]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        context = self._model.config.context
        windows = [
            list(rolling(np.array(self.tok_encode(string), np.int64), context))
            for (string,) in (request.args for request in requests)
        ]
        found = iter(self._compute([window for document in windows for window in document]))
        return [sum(next(found).total for _ in document) for document in windows]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Generates one text per request; each rank computes its share. Greedy unless the task asks for sampling."""
        engine = Engine(self._model, self._encoding, self._ranks.device, self._precision)
        seeds = seeds_of(requests)
        # Every rank checks all options, so that all ranks raise the same error.
        samplings = [self._sampling(request, seed) for request, seed in zip(requests, seeds, strict=True)]
        mine = {}
        numbers = range(self._ranks.rank, len(requests), self._ranks.world)
        prompts = [self._prompt(requests[number].args[0], samplings[number]) for number in numbers]
        for number, completion in zip(numbers, engine.complete(prompts), strict=True):
            mine[number] = completion.text
        found = {number: text for part in gather_objects(mine, self._ranks) for number, text in part.items()}
        return [found[number] for number in range(len(requests))]

    def _sampling(self, request, seed: int) -> Sampling:
        sampling = sampling_of(request.args[1], seed, f"lm-eval:{request.task_name}")
        if sampling.max_tokens >= self._model.config.context:
            raise ConfigError(
                f"lm-eval:{request.task_name}: asks for {sampling.max_tokens} new tokens, the model's context is "
                f"{self._model.config.context}; evaluate a model with a longer context, or another task"
            )
        return dataclasses.replace(sampling, stop=sampling.stop + chat_template.STOP) if self._in_turns else sampling

    def _prompt(self, text: str, sampling: Sampling) -> GenerationRequest:
        room = self._model.config.context - sampling.max_tokens
        return GenerationRequest((self.tok_encode(text) or [GPT2_END_OF_TEXT])[-room:], sampling)

    def _compute(self, requests: list[ScoringRequest]):
        self._calls += 1
        part = f"{self._calls}/"
        return likelihoods(self._model, requests, self._ranks, self._precision, self._partial, part, "lm-eval")


def seeds_of(requests) -> list[int]:
    """One seed per request. The seeds are the same on every rank.

    A seed is computed from the task, the place in the task and the number of the repeat. For a task with `repeats`, the
    harness passes the same request several times.
    """
    seen: Counter[str] = Counter()
    seeds = []
    for request in requests:
        key = json.dumps([request.task_name, request.doc_id, request.idx, str(request.args[0])])
        digest = hashlib.blake2b(f"{key}/{seen[key]}".encode(), digest_size=6).digest()
        seeds.append(int.from_bytes(digest, "big"))
        seen[key] += 1
    return seeds


def sampling_of(options: dict[str, Any], seed: int, where: str) -> Sampling:
    """Converts a task's `generation_kwargs` as the harness reads them. Raises ConfigError for unsupported options."""
    try:
        known = {key: value for key, value in normalize_gen_kwargs(options, NEW_TOKENS).items() if value is not None}
        until, limit, is_sampled = known.pop("until", []), known.pop("max_gen_toks"), known.pop("do_sample", False)
        # If a task samples, the default temperature is 1, as in `transformers`.
        temperature = float(known.pop("temperature", 1.0)) if is_sampled else 0.0
        known.pop("temperature", None)  # greedy decoding ignores the option
        chosen = {key: kind(known.pop(key)) for key, kind in _OPTIONS.items() if key in known}
        chosen["top_k"] = max(0, chosen.get("top_k", 0))  # -1 turns the option off in other backends
        seed ^= int(known.pop("seed", 0))
        if not temperature:
            # Greedy decoding takes the likeliest token, so options that limit the candidates have no effect.
            chosen = {key: value for key, value in chosen.items() if key == "repetition_penalty"}
        stop = tuple(str(text) for text in until if text)
        sampling = Sampling(max_tokens=limit, temperature=temperature, seed=seed, stop=stop, **{"top_k": 0, **chosen})
    except (SettingError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: generation_kwargs cannot be used: {error}; correct the task's file") from error
    left = [key for key, value in known.items() if value not in _NEUTRAL.get(key, [])]
    if left:
        names = ", ".join(("until", "max_gen_toks", "do_sample", "temperature", *_OPTIONS, "seed"))
        raise ConfigError(
            f"{where}: generation_kwargs has {left[0]}={known[left[0]]!r}, which is not supported; use {names} only"
        )
    return sampling
