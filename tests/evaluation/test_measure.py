"""What an evaluation says of a table in which nothing is right."""

import pandas
import pytest

from bae.evaluation.measure import warn_if_none_is_right


def table(**changes):
    row = {"text": "<answer>B</answer>", "answer": "B\x1b", "reference": "seven", "correct": False}
    return pandas.DataFrame([row | changes, row])


def test_an_evaluation_without_a_right_answer_shows_one():
    with pytest.warns(UserWarning, match=r"val: none of 2 answers is right; one of them is 'B.x1b' where 'seven' is"):
        warn_if_none_is_right("val", table())
    with pytest.warns(UserWarning, match="no completion has an answer section; one of them is '<answer>"):
        warn_if_none_is_right("val", table().assign(answer=None))


def test_one_right_answer_is_enough(recwarn):
    warn_if_none_is_right("val", table(correct=True))
    warn_if_none_is_right("val", table().head(0))
    assert not len(recwarn)
