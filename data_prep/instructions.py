"""Instruction data for fine-tuning: conversations, checked row by row and stored in one form (core.conversations)."""

import logging
from typing import Any

from core import sets
from core.conversations import conversation
from core.errors import DataError
from core.sets import SetInfo
from data_prep import rows

log = logging.getLogger(__name__)

SCHEMA = "conversations"
MAX_BAD_SHARE = 0.01


def store(data_url: str, source: str, name: str, licence: str) -> SetInfo:
    """Check and store. Raises DataError when more than MAX_BAD_SHARE of the rows are no conversations."""
    found = rows.read(source)
    good: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, row in enumerate(found, 1):
        try:
            good.append(conversation(row))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    for problem in problems[:5]:
        log.warning("%s: left out %s", source, problem)
    if not good or len(problems) > MAX_BAD_SHARE * len(found):
        first = f" ({problems[0]})" if problems else ""
        raise DataError(
            f"{source}: {len(problems)} of {len(found)} rows are no conversations{first}; "
            "see python -m data_prep.sets --help for their form"
        )
    return sets.write(data_url, name, SCHEMA, source, licence, rows.lines(good))
