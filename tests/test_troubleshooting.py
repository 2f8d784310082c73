"""docs/troubleshooting.md quotes messages that the programs print."""

import re

from tests import remedies

PAGE = remedies.ROOT / "docs" / "troubleshooting.md"


def quoted() -> list[str]:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [re.match(r"\| `([^`]+)` \|", row)[1] for row in rows]


def is_printed(quote: str) -> bool:
    """Whether one message holds the literal parts of `quote` in this order."""
    parts = [re.escape(part) for part in quote.split("…") if part.strip(" :;,(")]
    pattern = re.compile(".*?".join(parts), re.S)
    return any(
        pattern.search(" ".join(message.text.split())) for message in (*remedies.messages(), *remedies.sentences())
    )


def test_every_quoted_message_is_one_of_the_programs():
    assert len(quoted()) > 25
    assert [quote for quote in quoted() if not is_printed(quote)] == []


def test_the_check_above_can_fail():
    assert not is_printed("…: this sentence is printed by no program")
