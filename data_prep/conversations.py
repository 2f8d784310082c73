"""Measures the rows of a set for tuning: turns, lengths, duplicates, and the tokens that carry loss.

    figures = measure(rows, "conversations", encoding, length=1024)

Rows become conversations and tokens in the same way as in training (core.data.sets, core.data.chat_template), so the
figures describe the training data.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from core.data import chat_template, sets
from core.data.chat_template import NO_TARGET
from core.errors import DataError
from core.output import visible

LONGEST = 5  # rows that are named
PROBLEMS = 3  # number of unusable rows that are named
SHOWN = 70  # characters of a question


@dataclass
class Figures:
    """The results of `measure`.

    A pair counts as one row and as two texts: one with the chosen answer, one with the rejected answer. For `tokens`
    and `loss_tokens`, each text is cut after `length` tokens. `lengths` holds the length of each text before the cut.
    `turns` holds the number of rows for each number of answers.
    """

    length: int
    rows: int = 0
    problems: list[str] = field(default_factory=list)
    not_used: Counter[str] = field(default_factory=Counter)
    with_system: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    tokens: int = 0
    loss_tokens: int = 0
    too_long: int = 0
    without_answer: int = 0
    same_rows: int = 0
    same_questions: int = 0
    # For each of the longest rows: tokens, number of the row, question.
    longest: list[tuple[int, int, str]] = field(default_factory=list)


def measure(rows: Iterable[Any], schema: str, encoding, length: int) -> Figures:
    """The figures of some rows. `schema` is "conversations" or "preferences". Texts are cut after `length` tokens."""
    found = Figures(length)
    questions: Counter[str] = Counter()
    wholes: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        found.rows += 1
        try:
            texts = sets.preference(row) if schema == "preferences" else (sets.conversation(row),)
            conversations = [text["messages"] for text in texts]
            rendered = [chat_template.render(messages, encoding) for messages in conversations]
        except (ValueError, DataError) as error:
            found.problems.append(f"row {number} {error}")
            continue
        if schema == "preferences":
            rendered = [each.last_answer_only() for each in rendered]
        found.not_used.update(sets.unused(row, schema))
        first = conversations[0]
        found.with_system += first[0]["role"] == "system"
        found.turns[sum(message["role"] == "assistant" for message in first)] += 1
        question = sets.question_of(first)
        questions[question] += 1
        wholes["\n".join([question, *(messages[-1]["content"] for messages in conversations)])] += 1
        most = max(len(each.tokens) for each in rendered)
        found.longest.append((most, number, first[-2]["content"]))
        found.too_long += most > length
        found.without_answer += any(max(each.targets[:length]) == NO_TARGET for each in rendered)
        for each in rendered:
            found.lengths.append(len(each.tokens))
            found.tokens += len(each.tokens[:length])
            found.loss_tokens += sum(target != NO_TARGET for target in each.targets[:length])
    found.longest = sorted(found.longest, key=lambda row: (-row[0], row[1]))[:LONGEST]
    found.same_rows, found.same_questions = (sum(counts.values()) - len(counts) for counts in (wholes, questions))
    return found


def classes(lengths: Iterable[int]) -> list[int]:
    """Counts of lengths by class: 1, 2 to 3, 4 to 7, and so on."""
    counts = Counter(length.bit_length() - 1 for length in lengths)
    return [counts[index] for index in range(max(counts, default=-1) + 1)]


def tables(title: str, found: Figures, is_pairs: bool) -> Iterator[RenderableType]:
    """The figures as tables of a terminal, without the distribution of lengths."""
    overview = Table(title=visible(title), show_header=False, title_justify="left")
    overview.add_column(style="bold")
    overview.add_column()
    good = found.rows - len(found.problems)
    for name, value in _overview(found, good, is_pairs):
        overview.add_row(name, Text(visible(value)))
    yield overview
    if found.longest:
        longest = Table(title="longest rows", title_justify="left", box=None)
        for head, justify in (("row", "right"), ("tokens", "right"), ("last question", "left")):
            longest.add_column(head, justify=justify)
        for tokens, number, question in found.longest:
            short = " ".join(question.split())
            longest.add_row(f"{number:,}", f"{tokens:,}", Text(visible(short[:SHOWN] + "…" * (len(short) > SHOWN))))
        yield longest


def _overview(found: Figures, good: int, is_pairs: bool) -> Iterator[tuple[str, str]]:
    yield "rows", f"{found.rows:,}, of which {len(found.problems):,} cannot be used"
    for problem in found.problems[:PROBLEMS]:
        yield "", problem
    if not good:
        return
    yield "answers per row", ", ".join(f"{turns}: {rows:,} rows" for turns, rows in sorted(found.turns.items()))
    yield "system text", f"in {found.with_system:,} rows"
    ordered = sorted(found.lengths)
    median = ordered[(len(ordered) - 1) // 2]
    kind = "texts, two per row" if is_pairs else "rows"
    mean = sum(ordered) / len(ordered)
    spread = f"mean {mean:,.0f}, median {median:,}, most {ordered[-1]:,}"
    yield "tokens", f"{sum(ordered):,} in {len(ordered):,} {kind}; {spread}"
    cut = f"{found.too_long:,} rows; no part of an answer remains in {found.without_answer:,} rows"
    yield f"longer than {found.length:,}", cut
    share = 100 * found.loss_tokens / found.tokens
    yield "tokens with loss", f"{found.loss_tokens:,} of {found.tokens:,} ({share:.1f} %), after the cut"
    yield "repeated rows", f"{found.same_rows:,}"
    yield "repeated questions", f"{found.same_questions:,}, with the same or another answer"
    for name, rows in sorted(found.not_used.items()):
        yield "not used", f"{name}, in {rows:,} rows"
