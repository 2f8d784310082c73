"""HellaSwag (Zellers et al. 2019): which of four endings follows? Scored like lm-evaluation-harness does it.

The context and each ending become text in the harness's form; the ending with the largest log-likelihood is the
answer, once as it is (`accuracy`, its acc) and once per character of the ending (`accuracy_norm`, its acc_norm). The
items come from DATA_URL/sets/hellaswag.jsonl (data_prep.sets).

The style "llm.c" (and build-nanogpt) takes another text, `ctx` without the activity label or any cleaning, and
divides by tokens: its 29.5 % for GPT-2 124M is not the harness's number, 31.1 %.
"""

import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.errors import DataError
from trainer.distributed.process_group import Ranks, StopCheck
from trainer.evals.likelihood import Request, likelihoods
from trainer.evals.progress import Kept
from trainer.model.gpt import GPT

NAME = "hellaswag"  # of the set
STYLES = ("harness", "llm.c")


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


@dataclass(frozen=True)
class Answers:
    """Which items were answered rightly, by the sums and by the sums over lengths."""

    right: list[bool]
    right_norm: list[bool]

    def score(self, without: Container[int] = ()) -> Score:
        """Over all items but those with a number in `without`."""
        kept = [number for number in range(len(self.right)) if number not in without]
        right, right_norm = (sum(each[number] for number in kept) for each in (self.right, self.right_norm))
        items = len(kept)
        share, share_norm = (count / items if items else math.nan for count in (right, right_norm))
        return Score(items, share, _error(share, items), share_norm, _error(share_norm, items))


class HellaSwag:
    """Items made into requests once; called with a model as often as one likes."""

    def __init__(
        self,
        items: Sequence[Mapping[str, Any]],
        encoding,
        ranks: Ranks,
        precision: str = "auto",
        style: str = "harness",
    ):
        """`items` as in the published rows. Raises DataError for one that is none."""
        self._ranks = ranks
        self._precision = precision
        self._requests: list[Request] = []
        self._labels: list[int] = []
        self._lengths: list[list[int]] = []  # what the normalised sums are divided by
        for number, item in enumerate(items):
            try:
                label = int(item["label"])
                requests, lengths = _of_harness(item, encoding) if style == "harness" else _of_llm_c(item, encoding)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DataError(
                    f"HellaSwag item {number}: {type(error).__name__}: {error}; store the set again"
                ) from error
            self._labels.append(label)
            self._lengths.append(lengths)
            self._requests += requests

    def __call__(self, model: GPT, check_stop: StopCheck | None = None) -> Score:
        return self.answers(model, check_stop=check_stop).score()

    def answers(
        self, model: GPT, kept: Kept | None = None, title: str = "", check_stop: StopCheck | None = None
    ) -> Answers:
        """On all ranks; `kept`, `title` and `check_stop` as for `likelihoods`."""
        found = likelihoods(
            model, self._requests, self._ranks, self._precision, kept, title=title, check_stop=check_stop
        )
        answers = Answers([], [])
        position = 0
        for label, lengths in zip(self._labels, self._lengths, strict=True):
            sums = [each.total for each in found[position : position + len(lengths)]]
            position += len(lengths)
            means = [each / length for each, length in zip(sums, lengths, strict=True)]
            answers.right.append(_best(sums) == label)
            answers.right_norm.append(_best(means) == label)
        return answers


def _of_harness(item: Mapping[str, Any], encoding) -> tuple[list[Request], list[int]]:
    context, endings, _ = text_of(item)
    return [request_of(context, f" {ending}", encoding) for ending in endings], [len(ending) for ending in endings]


def _of_llm_c(item: Mapping[str, Any], encoding) -> tuple[list[Request], list[int]]:
    """As build-nanogpt's hellaswag.py: context and endings are encoded apart."""
    context = encoding.encode_ordinary(item["ctx"])
    endings = [encoding.encode_ordinary(f" {ending}") for ending in item["endings"]]
    return [Request(context, ending) for ending in endings], [len(ending) for ending in endings]


def text_of(item: Mapping[str, Any]) -> tuple[str, list[str], int]:
    """Context, endings and the right one's number, in the harness's form."""
    context = f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}"
    return clean(context), [clean(ending) for ending in item["endings"]], int(item["label"])


def request_of(context: str, continuation: str, encoding) -> Request:
    """Token ids, cut where the context's own tokens end; spaces at its end belong to the continuation."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = encoding.encode_ordinary(context + continuation)
    begin = len(encoding.encode_ordinary(context))
    return Request(whole[:begin], whole[begin:])


def clean(text: str) -> str:
    """WikiHow's marks out of the text, as the harness does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda index: values[index])


def _error(share: float, items: int) -> float:
    """Standard error of a share, with Bessel's correction."""
    return math.sqrt(share * (1 - share) / (items - 1)) if items > 1 else math.nan
