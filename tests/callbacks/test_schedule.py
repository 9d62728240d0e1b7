"""When a callback acts, against a plain loop, and which settings are refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bae.callbacks.schedule import at_least_one, due, not_negative


@given(steps=st.integers(1, 60), every=st.integers(0, 20), at_the_end=st.booleans())
def test_it_is_due_as_in_a_plain_loop(steps, every, at_the_end):
    expected, wait = [], every
    for done in range(1, steps + 1):
        wait -= 1
        if wait == 0 or (at_the_end and done == steps):
            expected.append(done)
        if wait == 0:
            wait = every
    last = steps if at_the_end else None
    assert [done for done in range(1, steps + 1) if due(done, every, last)] == expected


def test_by_hand():
    assert [n for n in range(8) if due(n, 3)] == [0, 3, 6]  # counted from 0, it is due at the start
    assert [n for n in range(1, 8) if due(n, 3, last=7)] == [3, 6, 7]
    assert [n for n in range(8) if due(n, 0)] == [] and [n for n in range(8) if due(n, 0, last=7)] == [7]
    assert due(6, 3, last=6) and not due(7, 3, last=float("inf"))  # a trainer without an end


@given(st.integers(-5, 5), st.integers(-5, 5))
def test_values_below_one_are_refused(every, size):
    if every >= 1 and size >= 1:
        at_least_one("name", every=every, size=size)
        return
    wrong = f"every={every}" if every < 1 else f"size={size}"
    with pytest.raises(ValueError, match=rf"^callbacks\.name\.{wrong}: must be 1 or more$"):
        at_least_one("name", every=every, size=size)


@given(st.integers(-5, 5))
def test_values_below_zero_are_refused(every):
    if every >= 0:
        not_negative("name", every=every)
        return
    with pytest.raises(ValueError, match=rf"^callbacks\.name\.every={every}: must not be negative$"):
        not_negative("name", every=every)
