import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import figures

AMOUNTS = st.lists(st.none() | st.floats(0, 1e6), max_size=40)


@given(AMOUNTS, st.sampled_from([2, 4]))
def test_parts_add_up_to_the_rounded_total_and_stay_next_to_their_value(amounts, places):
    shown = figures.apportion(amounts, places)
    exact = [value for value in amounts if value is not None]
    assert [value is None for value in shown] == [value is None for value in amounts]
    total = math.fsum(value for value in shown if value is not None)
    assert total == pytest.approx(math.fsum(exact), abs=0.51 * 10**-places)
    for value, rounded in zip(amounts, shown, strict=True):
        if value is not None:
            assert abs(rounded - value) < 10**-places * 1.000001


def test_three_thirds_of_a_dollar_are_a_dollar():
    assert figures.apportion([1 / 3] * 3, 2) == [0.34, 0.33, 0.33]


def test_what_is_not_known_prints_a_question_mark():
    assert figures.dollars(None) == "?"
    assert figures.dollars(1234.5, 2, complete=False) == "1,234.50 + ?"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (4.25, "4.2 s"),
        (59.97, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7499, "2 h 05 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations_have_two_units(seconds, text):
    assert figures.duration(seconds) == text
