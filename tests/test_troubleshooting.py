"""docs/troubleshooting.md quotes messages that the programs print."""

import functools
import re

from tests import remedies

PAGE = remedies.ROOT / "docs" / "troubleshooting.md"


def quoted() -> list[str]:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [re.match(r"\| `([^`]+)` \|", row)[1] for row in rows]


@functools.cache
def printed() -> tuple[str, ...]:
    return tuple(" ".join(each.text.split()) for each in (*remedies.messages(), *remedies.sentences()))


def is_printed(quote: str) -> bool:
    """Whether one message holds the literal parts of `quote` in this order."""
    parts = [part for part in quote.split("…") if part.strip(" :;,(")]
    return any(holds(text, parts) for text in printed())


def holds(text: str, parts: list[str]) -> bool:
    at = 0
    for part in parts:
        at = text.find(part, at) + len(part)
        if at < len(part):
            return False
    return True


def test_every_quoted_message_is_one_of_the_programs():
    assert len(quoted()) > 25
    assert [quote for quote in quoted() if not is_printed(quote)] == []


def test_the_check_above_can_fail():
    assert not is_printed("…: this sentence is printed by no program")
