"""A policy that does not know the format is named at the first step, with what it wrote."""

from types import SimpleNamespace

import pytest
import torch

from bae.batch import RolloutBatch
from bae.callbacks.malformed import MalformedStart

ALONE = SimpleNamespace(world_size=1)


def begin(callback, malformed, step=0, text="\x1b[2Jno tags" + "." * 400):
    scored = SimpleNamespace(
        malformed=torch.tensor(malformed).unsqueeze(1).repeat(1, 2),
        completions=[SimpleNamespace(text=text) for _ in malformed],
    )
    callback.on_train_batch_start(ALONE, None, RolloutBatch(step, [], 1, scored=scored), 0)


def test_it_warns_once_and_shows_a_completion_that_no_terminal_acts_on():
    callback = MalformedStart()
    with pytest.warns(UserWarning, match="95% of the completions of step 1 are malformed.*one of them") as seen:
        begin(callback, [True] * 19 + [False])
    (warning,) = seen
    assert "\x1b" not in str(warning.message) and "\\x1b[2Jno tags." in str(warning.message)
    assert len(str(warning.message)) < 700
    begin(callback, [True] * 20, step=1)  # filterwarnings would not hide a second one here: it counts them
    assert len(seen) == 1


def test_a_policy_that_knows_the_format_is_not_warned_of(recwarn):
    callback = MalformedStart()
    begin(callback, [True] * 18 + [False] * 2)
    begin(callback, [True] * 20, step=1)  # what comes later is in train/malformed
    assert not len(recwarn)


def test_demonstrations_are_passed_over(recwarn):
    MalformedStart().on_train_batch_start(ALONE, None, RolloutBatch(0, [], 1), 0)
    assert not len(recwarn)
