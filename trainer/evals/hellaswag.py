"""Scores HellaSwag (Zellers et al. 2019) as lm-evaluation-harness does. Each item is a choice between four endings.

For `accuracy` (acc in the harness), the answer is the ending with the largest log-likelihood. For `accuracy_norm`
(acc_norm), the log-likelihood is divided by the characters of the ending. Texts are formatted as in the harness. The
items come from DATA_URL/sets/hellaswag.jsonl (data_prep.sets).

The style "llm.c", which build-nanogpt uses too, takes the field `ctx` without activity label and cleaning. It divides
the log-likelihood by the number of tokens. For GPT-2 124M, this style gives 29.5 %, and the harness's style gives 31.1
%.
"""

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.errors import DataError
from trainer.distributed.process_group import Ranks, StopCheck
from trainer.evals.likelihood import ScoringRequest, likelihoods
from trainer.evals.progress import PartialResults
from trainer.model.gpt import GPT

NAME = "hellaswag"  # name of the example set
STYLES = ("harness", "llm.c")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Score:
    """Fractions of right answers among `items`, with standard errors."""

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
            f"{100 * self.accuracy:.2f} ± {100 * self.accuracy_stderr:.2f} % unnormalised, {self.items:,} items"
        )


@dataclass(frozen=True)
class HellaSwagAnswers:
    """Whether each item was answered correctly, by log-likelihood and by normalised log-likelihood."""

    right: list[bool]
    right_norm: list[bool]

    def score(self, without: Container[int] = ()) -> Score:
        """Scores all items, except those whose numbers are in `without`."""
        counted = [number for number in range(len(self.right)) if number not in without]
        right, right_norm = (sum(each[number] for number in counted) for each in (self.right, self.right_norm))
        items = len(counted)
        share, share_norm = (count / items if items else math.nan for count in (right, right_norm))
        return Score(items, share, _error(share, items), share_norm, _error(share_norm, items))


class HellaSwag:
    """HellaSwag's items, encoded once. Calling this object with a model scores the model."""

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        encoding,
        ranks: Ranks,
        precision: str = "auto",
        style: str = "harness",
    ):
        """`items` are rows of the published data set. Raises DataError for a malformed row."""
        self._ranks = ranks
        self._precision = precision
        self._requests: list[ScoringRequest] = []
        self._labels: list[int] = []
        self._lengths: list[list[int]] = []  # divisors that normalise the log-likelihoods, for each ending of an item
        for number, item in enumerate(items):
            try:
                label = int(item["label"])
                requests, lengths = _of_harness(item, encoding) if style == "harness" else _of_llm_c(item, encoding)
            except _MALFORMED as error:
                raise _malformed(number, error) from error
            self._labels.append(label)
            self._lengths.append(lengths)
            self._requests += requests

    def __call__(self, model: GPT, check_stop: StopCheck | None = None) -> Score:
        return self.answers(model, check_stop=check_stop).score()

    def answers(
        self,
        model: GPT,
        partial: PartialResults | None = None,
        title: str = "",
        check_stop: StopCheck | None = None,
    ) -> HellaSwagAnswers:
        """Answers all items, on all ranks. `partial`, `title` and `check_stop` are passed to `likelihoods`."""
        found = likelihoods(
            model, self._requests, self._ranks, self._precision, partial, title=title, check_stop=check_stop
        )
        answers = HellaSwagAnswers([], [])
        position = 0
        for label, lengths in zip(self._labels, self._lengths, strict=True):
            sums = [each.total for each in found[position : position + len(lengths)]]
            position += len(lengths)
            means = [each / max(1, length) for each, length in zip(sums, lengths, strict=True)]
            answers.right.append(_best(sums) == label)
            answers.right_norm.append(_best(means) == label)
        return answers


def check(items: Sequence[Mapping[str, Any]]) -> None:
    """Checks the items without encoding them. Raises DataError if an item is malformed."""
    for number, item in enumerate(items):
        try:
            _, endings, label = text_of(item)
            if label not in range(len(endings)):
                raise ValueError(f"label {label} with {len(endings)} endings")
        except _MALFORMED as error:
            raise _malformed(number, error) from error


def _malformed(number: int, error: Exception) -> DataError:
    return DataError(f"HellaSwag item {number}: {type(error).__name__}: {error}; store the set again")


def _of_harness(item: Mapping[str, Any], encoding) -> tuple[list[ScoringRequest], list[int]]:
    context, endings, _ = text_of(item)
    return [request_of(context, f" {ending}", encoding) for ending in endings], [len(ending) for ending in endings]


def _of_llm_c(item: Mapping[str, Any], encoding) -> tuple[list[ScoringRequest], list[int]]:
    """Encodes context and endings separately, as build-nanogpt's hellaswag.py does."""
    context = encoding.encode_ordinary(item["ctx"])
    endings = [encoding.encode_ordinary(f" {ending}") for ending in item["endings"]]
    return [ScoringRequest(context, ending) for ending in endings], [len(ending) for ending in endings]


def text_of(item: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """Context, endings and the number of the right ending, formatted as in the harness."""
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return clean(context), [clean(ending) for ending in item["endings"]], int(item["label"])


def request_of(context: str, continuation: str, encoding) -> ScoringRequest:
    """Encodes context and continuation together and splits after the context's tokens.

    Trailing spaces of the context move to the continuation.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = encoding.encode_ordinary(context + continuation)
    begin = len(encoding.encode_ordinary(context))
    return ScoringRequest(whole[:begin], whole[begin:])


def clean(text: str) -> str:
    """Removes WikiHow's marks, such as [title], from a text, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: values[index])


def _error(share: float, items: int) -> float:
    """Standard error of a fraction, with Bessel's correction."""
    return math.sqrt(share * (1 - share) / (items - 1)) if items > 1 else math.nan
