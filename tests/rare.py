"""Parameters of which the fast tests use a few, and the slow tests the others."""

from collections.abc import Collection, Iterable

import pytest


def fast_only(names: Iterable[str], fast: Collection[str]) -> list:
    """pytest's parameters `names`. Those that `fast` does not name are marked as slow."""
    found = list(names)
    assert set(fast) <= set(found), f"{sorted(set(fast) - set(found))}: no such parameter"
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in found]
