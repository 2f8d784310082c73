"""Runs tasks of lm-evaluation-harness on our models through its model interface (extra `eval`: pip install lm-eval).

Every rank builds the same requests and computes its share. All ranks receive all answers and the same scores.
"""

import functools
import logging
from typing import Any

import numpy as np

from core.data.vocabulary import GPT2_END_OF_TEXT
from core.errors import ConfigError
from trainer.distributed.process_group import Ranks, gather_objects
from trainer.evals.likelihood import ScoringRequest, likelihoods
from trainer.evals.perplexity import rolling
from trainer.evals.progress import PartialResults
from trainer.inference.engine import Engine, GenerationRequest
from trainer.inference.sampling import Sampling
from trainer.weights.open import TrainedModel

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ConfigError(
        f"tasks of lm-evaluation-harness need it: pip install lm-eval, or `pip install -e .[eval]` ({error})"
    ) from error

NEW_TOKENS = 256  # the harness's default for tasks without a limit


def version() -> str:
    from importlib.metadata import version

    return version("lm-eval")


def run(
    task: str,
    trained: TrainedModel,
    ranks: Ranks,
    precision: str,
    partial: PartialResults,
    folder: str,
    limit: int,
    num_fewshot: int,
) -> dict[str, Any]:
    """The harness's scores by metric, and by TASK/METRIC for sub-tasks. Raises ConfigError for an unknown task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    # The harness needs half a minute to index its own tasks. Skip them if the task is in the folder.
    tasks = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if tasks is None or not tasks.match_tasks([task]):
        tasks = _all_tasks(folder)
    if not tasks.match_tasks([task]):
        raise ConfigError(f"lm-eval:{task}: unknown task of the harness; `lm_eval ls tasks` lists them")
    found = simple_evaluate(
        HarnessModel(trained, ranks, precision, partial),
        tasks=[task],
        num_fewshot=None if num_fewshot < 0 else num_fewshot,
        limit=limit or None,
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
    """Our model behind the harness's interface. TemplateLM encodes pairs of context and continuation."""

    def __init__(self, trained: TrainedModel, ranks: Ranks, precision: str, partial: PartialResults):
        super().__init__()
        self._model = trained.model
        self._encoding = trained.encoding
        self._ranks = ranks
        self._precision = precision
        self._partial = partial
        self._calls = 0

    @property
    def eot_token_id(self) -> int:
        return GPT2_END_OF_TEXT

    @property
    def tokenizer_name(self) -> str:
        return "gpt2"

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
        """Generates texts, each rank its share. Greedy unless the task asks for sampling."""
        engine = Engine(self._model, self._encoding, self._ranks.device, self._precision)
        mine = {}
        numbers = range(self._ranks.rank, len(requests), self._ranks.world)
        prompts = [self._prompt(*requests[number].args) for number in numbers]
        for number, completion in zip(numbers, engine.complete(prompts), strict=True):
            mine[number] = completion.text
        found = {number: text for part in gather_objects(mine, self._ranks) for number, text in part.items()}
        return [found[number] for number in range(len(requests))]

    def _prompt(self, text: str, options: dict[str, Any]) -> GenerationRequest:
        until = options.get("until") or []
        limit = int(options.get("max_gen_toks", NEW_TOKENS))
        room = self._model.config.context - limit
        if room < 1:
            raise ConfigError(
                f"a task asks for {limit} new tokens, the model's context is {self._model.config.context}; "
                "evaluate a model with a longer context, or another task"
            )
        tokens = (self.tok_encode(text) or [GPT2_END_OF_TEXT])[-room:]
        sampling = Sampling(
            max_tokens=limit,
            temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
            top_k=0,
            top_p=float(options.get("top_p", 1.0)),
            seed=0,
            stop=(until,) if isinstance(until, str) else tuple(until),
        )
        return GenerationRequest(tokens, sampling)

    def _compute(self, requests: list[ScoringRequest]):
        self._calls += 1
        part = f"{self._calls}/"
        return likelihoods(self._model, requests, self._ranks, self._precision, self._partial, part, "lm-eval")
