"""HellaSwag (Zellers et al. 2019): which of four endings follows? Scored like lm-evaluation-harness does it.

The context and each ending become text in the harness's form; the ending with the largest log-likelihood is the
answer, once as it is (`accuracy`, its acc) and once per character of the ending (`accuracy_norm`, its acc_norm). The
items come from DATA_URL/sets/hellaswag.jsonl (data_prep.sets).

llm.c and build-nanogpt take another text (no activity label) and divide by tokens: their 29.5 % for GPT-2 124M is
not this number, which the harness gives as 31.1 %.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.errors import DataError
from trainer.distributed import Ranks
from trainer.evals.likelihood import Request, log_likelihoods
from trainer.model.gpt import GPT

NAME = "hellaswag"  # of the set


@dataclass(frozen=True)
class Score:
    """Shares of right answers, with their standard errors, over `items`."""

    items: int
    accuracy: float
    accuracy_stderr: float
    accuracy_norm: float
    accuracy_norm_stderr: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{100 * self.accuracy_norm:.2f} ± {100 * self.accuracy_norm_stderr:.2f} % by character, "
            f"{100 * self.accuracy:.2f} ± {100 * self.accuracy_stderr:.2f} % as they are, {self.items:,} items"
        )


class HellaSwag:
    """Items made into requests once; called with a model as often as one likes."""

    def __init__(self, items: Sequence[Mapping[str, Any]], encoding, ranks: Ranks, precision: str = "auto"):
        """`items` as in the published rows. Raises DataError for one that is none."""
        self._ranks = ranks
        self._precision = precision
        self._requests: list[Request] = []
        self._labels: list[int] = []
        self._characters: list[list[int]] = []
        for number, item in enumerate(items):
            try:
                context, endings, label = text_of(item)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DataError(
                    f"HellaSwag item {number}: {type(error).__name__}: {error}; store the set again"
                ) from error
            self._labels.append(label)
            self._characters.append([len(ending) for ending in endings])
            self._requests += [request_of(context, f" {ending}", encoding) for ending in endings]

    def __call__(self, model: GPT) -> Score:
        likelihoods = log_likelihoods(model, self._requests, self._ranks, self._precision)
        right = right_norm = 0
        position = 0
        for label, characters in zip(self._labels, self._characters, strict=True):
            sums = likelihoods[position : position + len(characters)]
            position += len(characters)
            right += _best(sums) == label
            right_norm += _best([each / length for each, length in zip(sums, characters, strict=True)]) == label
        items = len(self._labels)
        return Score(items, right / items, _error(right, items), right_norm / items, _error(right_norm, items))


def text_of(item: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """Context, endings and the right one's number, in the harness's form."""
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return _clean(context), [_clean(ending) for ending in item["endings"]], int(item["label"])


def request_of(context: str, continuation: str, encoding) -> Request:
    """Token ids, cut where the context's own tokens end; spaces at its end belong to the continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = encoding.encode_ordinary(context + continuation)
    begin = len(encoding.encode_ordinary(context))
    return Request(whole[:begin], whole[begin:])


def _clean(text: str) -> str:
    """WikiHow's marks out of the text, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: values[index])


def _error(right: int, items: int) -> float:
    """Standard error of a share, with Bessel's correction."""
    share = right / items
    return math.sqrt(share * (1 - share) / (items - 1)) if items > 1 else math.nan
