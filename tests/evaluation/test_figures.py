"""Figures of values that a plot could stumble over."""

import pytest

from bae.evaluation.figures import save, training_curves


@pytest.mark.parametrize("values", [[0.1, 0.1, 0.1], [0.3] * 6, [float("nan"), 0.2]])
def test_seeds_that_agree_are_drawn(tmp_path, values):
    """The mean of three .1 is .10000000000000002, which is above the highest of them."""
    seeds = [{0: 0.5, 100: value} for value in values]
    figure = training_curves({"ECE": {"ocb": seeds}}, "Value on held-out problems")
    assert [path.suffix for path in save(figure, tmp_path / "curves") if path.stat().st_size] == [".png", ".svg"]
