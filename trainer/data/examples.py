"""Reads the examples for fine-tuning as token ids and targets, packs them into rows, and yields micro-batches.

    examples = read_conversations(settings.data, encoding, length=1024)

An example that is longer than a packed row is cut at its end. It is skipped if no token of its answer remains. A row of
the file is skipped if it has no answer or an unknown form; too many skipped rows are an error. Examples with the same
question are all for training or all for validation.

Examples are packed once, the longest first. Each goes into the fullest row that still has room for it (best fit; Krell
et al. 2021, "Efficient Sequence Packing without Cross-contamination"). An epoch visits the rows in a pseudo-random
order, computed from (seed, epoch, number) like the order of windows in `trainer.data.order`. So the rows of any step
can be computed, and no position is stored.
"""

import bisect
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from core import storage, untrusted
from core.data import sets
from core.data.chat_template import NO_TARGET, render
from core.data.sets import conversation, preference, question_of
from core.errors import DataError
from core.settings.tuning import ExamplesConfig
from trainer.data.loader import batch_numbers
from trainer.data.order import derive_key, micro_batch_numbers, permute

log = logging.getLogger("train")

NAMED = 5  # the log shows at most this many of the skipped rows


@dataclass
class Texts:
    """Token ids and targets of many texts in two arrays; text i is [starts[i], starts[i + 1])."""

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
        """Copy text `index` to position `place` of a row. Returns the position after the text."""
        part = slice(self.starts[index], self.starts[index + 1])
        end = place + int(part.stop - part.start)
        tokens[place:end], targets[place:end] = self.tokens[part], self.targets[part]
        return end

    def answers(self) -> np.ndarray:
        """The number of target tokens of each text."""
        counts = np.concatenate([[0], np.cumsum(self.targets != NO_TARGET)])
        return counts[self.starts[1:]] - counts[self.starts[:-1]]


@dataclass(frozen=True)
class Examples:
    """The examples for training and for validation. If `per_example` is 1, an example is one text.

    If it is 2, an example is two texts: the chosen and the rejected answer.
    """

    train: Texts
    val: Texts
    per_example: int
    fingerprint: str
    report: str


def read_conversations(data: ExamplesConfig, encoding, length: int) -> Examples:
    """Examples whose loss covers all answers of a conversation. Raises DataError."""

    def texts_of(row: Any) -> tuple[str, list[list[dict[str, str]]]]:
        messages = conversation(row)["messages"]
        return question_of(messages), [messages]

    return _read(data, encoding, length, 1, texts_of)


def read_preferences(data: ExamplesConfig, encoding, length: int) -> Examples:
    """Pairs of examples (chosen, rejected), whose loss covers the last answer of each. Raises DataError."""

    def texts_of(row: Any) -> tuple[str, list[list[dict[str, str]]]]:
        chosen, rejected = (each["messages"] for each in preference(row))
        return question_of(chosen), [chosen, rejected]

    return _read(data, encoding, length, 2, texts_of)


def _read(
    data: ExamplesConfig,
    encoding,
    length: int,
    per_example: int,
    texts_of: Callable[[Any], tuple[str, list[list[dict[str, str]]]]],
) -> Examples:
    where, rows, fingerprint = rows_of(data)
    sides: dict[str, list] = {"train": [], "val": []}
    problems: list[str] = []
    not_used: Counter[str] = Counter()
    long = lost = count = 0
    for count, row in enumerate(rows, 1):
        try:
            question, conversations = texts_of(row)
            rendered = [render(messages, encoding) for messages in conversations]
        except (ValueError, DataError) as error:
            problems.append(f"row {count} {error}")
            continue
        not_used.update(sets.unused(row, "preferences" if per_example == 2 else "conversations"))
        if per_example == 2:
            rendered = [each.last_answer_only() for each in rendered]
        cut = [(tokens[:length], targets[:length]) for tokens, targets in rendered]
        long += any(len(tokens) > length for tokens, _ in rendered)
        # Both examples of a pair must keep some of their answers, and must still differ.
        if any(max(targets) == NO_TARGET for _, targets in cut) or (per_example == 2 and cut[0] == cut[1]):
            lost += 1
            continue
        side = sides["val" if _hashed(question) < data.val_fraction else "train"]
        side += [(np.array(tokens, np.int32), np.array(targets, np.int32)) for tokens, targets in cut]
    for problem in problems[:NAMED]:
        log.warning("%s: skipped %s", where, problem)
    if len(problems) > data.max_bad_fraction * count:
        raise DataError(
            f"{where}: {len(problems)} of {count} rows cannot be used, such as {problems[0]}; correct them, or raise "
            "data.max_bad_fraction to skip them"
        )
    if not sides["train"]:
        raise DataError(
            f"{where}: none of its {count} rows is left to train on: {lost} lost their answer to a cut after {length} "
            f"tokens, {len(sides['val']) // per_example} are for validation; give more rows, or lower data.val_fraction"
        )
    train, val = Texts.of(sides["train"]), Texts.of(sides["val"])
    columns = ", ".join(f"{name} in {rows:,} rows" for name, rows in sorted(not_used.items()))
    report = (
        f"examples: {len(train) // per_example:,} for training, {len(val) // per_example:,} for "
        f"validation, of {count:,} rows; {len(problems):,} without an answer or of an unknown form skipped; {long:,} "
        f"longer than {length:,} tokens and cut at their end, {lost:,} of them skipped: no part of the answer remained"
        + (f"; columns that are not used: {columns}" if columns else "")
    )
    return Examples(train, val, per_example, fingerprint, report)


def rows_of(data: ExamplesConfig) -> tuple[str, Iterable[Any], str]:
    """The path of the rows, the rows, and their fingerprint. The row of a line that is not JSON is None."""
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
        return untrusted.parse_json(line)
    except ValueError:
        return None


def _hashed(question: str) -> float:
    """A number in [0, 1) from a hash of the question."""
    return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big") / 2**64


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack examples of these lengths into rows of at most `room` tokens. Returns the numbers of each row's examples.

    No length may exceed `room`.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # keys: a number of free tokens; values: the rows with this many free tokens
    rooms: list[int] = []  # the keys of by_room, ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, left = len(rows), room - length
            rows.append([])
        else:
            left = rooms[place]
            row = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[place]
            left -= length
        rows[row].append(index)
        if left:
            if left not in by_room:
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(row)
    return rows


class NumberedBatches:
    """Iterates without end over this rank's micro-batches of numbered items, starting at step `first_step`.

    Steps are counted from 0. `make(step_items, mine)` makes a micro-batch of the items `mine`; `step_items` are the
    items of the step on all ranks. `numbers` are the numbers of this rank's micro-batches within a step.
    """

    def __init__(
        self,
        items: int,
        seed: int,
        first_step: int,
        batch: int,
        micro_batch_size: int,
        rank: int,
        world: int,
        make: Callable[[np.ndarray, np.ndarray], Any],
        skip: Sequence[int] = (),
    ):
        self.is_leaving: Callable[[], bool] = lambda: False  # unused: nothing here waits for data
        self._items = items
        self._seed = seed
        self._step = first_step
        self._batch = batch
        self._micro_batch = micro_batch_size
        self._per_rank = batch // world
        self._offset = rank * self._per_rank
        self.numbers = micro_batch_numbers(rank, world, self._per_rank // micro_batch_size)
        self._make = make
        self._skip = sorted(set(skip))
        self._of_step = np.empty(0, np.int64)
        self._done = self._per_rank

    def __next__(self) -> Any:
        if self._done == self._per_rank:
            number = int(batch_numbers(np.array([self._step]), self._skip)[0])
            self._of_step = in_order(number * self._batch + np.arange(self._batch), self._items, self._seed)
            self._step += 1
            self._done = 0
        first = self._offset + self._done
        self._done += self._micro_batch
        return self._make(self._of_step, self._of_step[first : first + self._micro_batch])

    def close(self) -> None:
        """Does nothing: no thread runs in the background."""


def in_order(numbers: np.ndarray, items: int, seed: int) -> np.ndarray:
    """The items at the positions `numbers` of an endless sequence, in which each epoch is a new permutation.

    Items and positions count from 0.
    """
    found = np.empty_like(numbers)
    epochs = numbers // items
    for epoch in np.unique(epochs):
        here = epochs == epoch
        found[here] = permute(numbers[here] - epoch * items, items, derive_key(seed, int(epoch), 3))
    return found
