"""Rows for fine-tuning and preference optimisation, checked and stored in one form (core.data.sets)."""

import logging
from typing import Any

from core.data import sets
from core.data.sets import SetInfo, conversation, preference_row
from core.errors import DataError
from data_prep import rows

log = logging.getLogger(__name__)

# Kind of set → schema, and what brings a row into its form.
KINDS = {"instructions": ("conversations", conversation), "preferences": ("preferences", preference_row)}
MAX_BAD_SHARE = 0.01


def store(data_url: str, source: str, name: str, licence: str, kind: str = "instructions") -> SetInfo:
    """Check and store. Raises DataError when more than MAX_BAD_SHARE of the rows are of no known form."""
    schema, form = KINDS[kind]
    found = rows.read(source)
    good: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, row in enumerate(found, 1):
        try:
            good.append(form(row))
        except ValueError as error:
            problems.append(f"row {number}: {error}")
    for problem in problems[:5]:
        log.warning("%s: left out %s", source, problem)
    if not good or len(problems) > MAX_BAD_SHARE * len(found):
        first = f" ({problems[0]})" if problems else ""
        raise DataError(
            f"{source}: {len(problems)} of {len(found)} rows are no {schema}{first}; "
            "see python -m data_prep.sets --help for their form"
        )
    return sets.write(data_url, name, schema, source, licence, rows.lines(good))
