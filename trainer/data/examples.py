"""Conversations as token ids with their targets, cut to a length, split by hash: what tuning trains on.

    examples = read(data_url, "instructions", encoding, length=1024, ...)

Rules: an example that is longer than a row is cut at its end, and left out if nothing of its answer remains; a row
without an answer, or of no known form, is left out, and too many of them stop everything. Examples with the same
question are on the same side of the split.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core import storage
from core.data import sets
from core.data.sets import conversation, preference, question_of
from core.errors import DataError
from core.settings.tuning import RowsConfig
from trainer.data.chat_template import NO_TARGET, render

log = logging.getLogger("train")

TOLD = 5  # rows that are named one by one


@dataclass
class Texts:
    """Token ids and targets of many texts, one after the other; text i is [starts[i], starts[i + 1])."""

    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    targets: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    @classmethod
    def of(cls, texts: Sequence[tuple[np.ndarray, np.ndarray]]) -> "Texts":
        if not texts:
            return cls()
        lengths = [len(tokens) for tokens, _ in texts]
        tokens, targets = (np.concatenate([text[part] for text in texts]) for part in (0, 1))
        return cls(tokens, targets, np.concatenate([[0], np.cumsum(lengths)]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> list[int]:
        return np.diff(self.starts).tolist()

    def put(self, index: int, tokens: np.ndarray, targets: np.ndarray, place: int) -> int:
        """Copy text `index` to position `place` of a row; returns where it ends there."""
        part = slice(self.starts[index], self.starts[index + 1])
        end = place + int(part.stop - part.start)
        tokens[place:end], targets[place:end] = self.tokens[part], self.targets[part]
        return end

    def answers(self) -> np.ndarray:
        """How many tokens of each text are to be predicted."""
        counts = np.concatenate([[0], np.cumsum(self.targets != NO_TARGET)])
        return counts[self.starts[1:]] - counts[self.starts[:-1]]


@dataclass(frozen=True)
class Examples:
    """`train` and `val` hold one text per example, or two (chosen, rejected) where `per_example` is 2."""

    train: Texts
    val: Texts
    per_example: int
    fingerprint: str
    report: str


def read_conversations(data: RowsConfig, encoding, length: int) -> Examples:
    """Loss on all answers of a conversation. Raises DataError."""

    def texts_of(row: Any) -> tuple[str, list[list[dict[str, str]]]]:
        messages = conversation(row)["messages"]
        return question_of(messages), [messages]

    return _read(data, encoding, length, 1, texts_of)


def read_preferences(data: RowsConfig, encoding, length: int) -> Examples:
    """Loss on the last answer of each of two conversations. Raises DataError."""

    def texts_of(row: Any) -> tuple[str, list[list[dict[str, str]]]]:
        chosen, rejected = (each["messages"] for each in preference(row))
        return question_of(chosen), [chosen, rejected]

    return _read(data, encoding, length, 2, texts_of)


def _read(
    data: RowsConfig,
    encoding,
    length: int,
    per_example: int,
    texts_of: Callable[[Any], tuple[str, list[list[dict[str, str]]]]],
) -> Examples:
    where, rows, fingerprint = rows_of(data)
    sides: dict[str, list] = {"train": [], "val": []}
    problems: list[str] = []
    long = lost = count = 0
    for count, row in enumerate(rows, 1):
        try:
            question, conversations = texts_of(row)
            rendered = [render(messages, encoding) for messages in conversations]
        except (ValueError, DataError) as error:
            problems.append(f"row {count} {error}")
            continue
        if per_example == 2:
            rendered = [_last_answer_only(each.tokens, each.targets) for each in rendered]
        cut = [(tokens[:length], targets[:length]) for tokens, targets in rendered]
        long += any(len(tokens) > length for tokens, _ in rendered)
        # Of a pair both must keep something, and not the same.
        if any(max(targets) == NO_TARGET for _, targets in cut) or (per_example == 2 and cut[0] == cut[1]):
            lost += 1
            continue
        side = sides["val" if _hashed(question) < data.val_fraction else "train"]
        side += [(np.array(tokens, np.int32), np.array(targets, np.int32)) for tokens, targets in cut]
    for problem in problems[:TOLD]:
        log.warning("%s: left out %s", where, problem)
    if len(problems) > data.max_bad_fraction * count:
        raise DataError(
            f"{where}: {len(problems)} of {count} rows cannot be used, such as {problems[0]}; mend them, or raise "
            "data.max_bad_fraction to leave them out"
        )
    if not sides["train"]:
        raise DataError(
            f"{where}: none of its {count} rows is left to train on ({lost} lost their answer to a cut after {length} "
            f"tokens, {len(sides['val']) // per_example} are held out); give more rows, or lower data.val_fraction"
        )
    train, val = Texts.of(sides["train"]), Texts.of(sides["val"])
    report = (
        f"examples: {len(train) // per_example:,} to train on, {len(val) // per_example:,} held out, "
        f"of {count:,} rows; {len(problems):,} without an answer or of no known form left out; {long:,} longer than "
        f"{length:,} tokens and cut at their end, {lost:,} of them left out because nothing of an answer remained"
    )
    return Examples(train, val, per_example, fingerprint, report)


def rows_of(data: RowsConfig) -> tuple[str, Iterable[Any], str]:
    """Where the rows are, the rows (None for a line that is no JSON), and a fingerprint of them."""
    if not data.examples.endswith(".jsonl"):
        info = sets.info_of(data.url, data.examples)
        return f"{data.url}/sets/{data.examples}.jsonl", sets.read(data.url, data.examples), info.sha256
    content = storage.read_bytes(data.examples)
    return (
        data.examples,
        [_parsed(line) for line in content.splitlines() if line.strip()],
        hashlib.sha256(content).hexdigest(),
    )


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _last_answer_only(tokens: list[int], targets: list[int]) -> tuple[list[int], list[int]]:
    """Earlier answers are the same on both sides, and would cancel out."""
    begin = len(targets)
    while begin and targets[begin - 1] != NO_TARGET:
        begin -= 1
    return tokens, [NO_TARGET] * begin + targets[begin:]


def _hashed(question: str) -> float:
    """In [0, 1), the same everywhere."""
    return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big") / 2**64
