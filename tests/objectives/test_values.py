"""What a user's reward or score may give, what an error says of it, and what happens if it does not return."""

import math
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

from bae.batch import Completion, Problem
from bae.errors import UserError
from bae.objectives import Objective
from bae.objectives.brier import brier
from bae.objectives.hybrid import hybrid_brier
from bae.objectives.values import reward_values
from bae.text.verdict import Verdict
from tests.support import ROOT


def completion(text="12", confidence=0.9, number=7):
    problem = Problem(f"train/{number}", "5+7=", "12")
    return Completion(problem, text, (), (True,), (confidence,), 3, False, verdicts=(Verdict.CORRECT,))


def rewarded(reward, completions=None, **options):
    objective = Objective("mine", "solution", worst=0.0, reward=reward, **options)
    return reward_values(objective, [completion(), completion("9")] if completions is None else completions)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (1.5, 1.5), (2, 2.0), (True, 1.0), (None, math.nan), (math.inf, math.inf), (-math.inf, -math.inf),
        (Fraction(1, 4), 0.25), (np.float32(0.5), 0.5), (np.int64(3), 3.0), (np.bool_(True), 1.0),
        (np.array(0.5), 0.5), (torch.tensor(0.5), 0.5), (torch.tensor(2), 2.0), (1e39, math.inf),
    ],
)  # fmt: skip
def test_a_reward_is_one_number_or_none(given, value):
    found = rewarded(lambda completion: given)
    assert found.dtype == torch.float32 and found.shape == (2,)
    torch.testing.assert_close(found, torch.tensor([value, value]), equal_nan=True)


def in_groups(group_reward, completions):
    return reward_values(Objective("mine", "solution", worst=-1.0, group_reward=group_reward), completions)


def test_a_group_reward_sees_the_completions_of_one_problem_wherever_they_stand():
    seen = []

    def longest(group):
        seen.append([c.text for c in group])
        return [None if not c.text else float(len(c.text) == max(len(x.text) for x in group)) for c in group]

    mixed = [completion("ab"), completion("x", number=8), completion("abc"), completion("", number=8)]
    torch.testing.assert_close(in_groups(longest, mixed), torch.tensor([0, 1, 1, math.nan]), equal_nan=True)
    assert seen == [["ab", "abc"], ["x", ""]]
    assert in_groups(lambda group: torch.arange(len(group)).float(), mixed).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1.0], "gave 1 rewards for the 2 completions of problem train/7; it must give one number, or None, for each"),
        (1.0, "gave a float for the 2 completions of problem train/7"),
        ([1.0, "a"], "gave a str for problem train/7 and the completion '9'"),
        ([math.nan, 1.0], "gave nan for problem train/7 and the completion '12'"),
    ],
)
def test_a_wrong_group_reward_is_named(given, message):
    with pytest.raises(UserError, match=rf"objectives\.rewards\.mine\.group_reward {message}"):
        in_groups(lambda group: given, [completion(), completion("9")])


def test_the_hybrid_target_by_hand():
    """DCPO: half of one's own outcome, half of the group's accuracy, here 2/4."""
    right, wrong = (Verdict.CORRECT,), (Verdict.WRONG,)
    group = [replace(completion(confidence=q), verdicts=v) for q, v in ((0.75, right), (1.0, right), (0.25, wrong))]
    group.append(replace(completion(confidence=None), verdicts=()))  # no answer and no number: wrong, and not scored
    expected = torch.tensor([0, -(0.25**2), 0, math.nan])
    torch.testing.assert_close(in_groups(partial(hybrid_brier, own=0.5), group), expected, equal_nan=True)
    own = in_groups(partial(hybrid_brier, own=1.0), group[:3])  # its own outcome alone: the Brier score
    torch.testing.assert_close(own, torch.tensor([-(0.25**2), 0, -(0.25**2)]))
    with pytest.raises(ValueError, match="own=2: must be between 0 and 1"):
        in_groups(partial(hybrid_brier, own=2), group)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("1.0", "a str"), ([1.0], "a list"), (1j, "a complex"), (object(), "a object"),
        (np.zeros(2), r"a ndarray of shape \(2,\)"), (torch.zeros(1), r"a Tensor of shape \(1,\)"),
        (torch.zeros(2, 3), r"a Tensor of shape \(2, 3\)"), (np.str_("1"), "a str"),
    ],
)  # fmt: skip
def test_what_is_no_number_names_objective_problem_and_completion(given, kind):
    reward = lambda completion: given if completion.text == "9" else 1.0  # noqa: E731
    with pytest.raises(UserError) as refused:
        rewarded(reward)
    message = str(refused.value)
    assert re.match(
        rf"objectives\.rewards\.mine\.reward gave {kind} for problem train/7 and the completion '9'", message
    )
    assert "\n" not in message


@pytest.mark.parametrize("given", [math.nan, np.float32("nan"), torch.tensor(math.nan)])
def test_nan_is_no_reward(given):
    with pytest.raises(UserError, match=r"objectives\.rewards\.mine\.reward gave nan for problem train/7 .* give None"):
        rewarded(lambda completion: given, [completion("x" * 5000 + "\n")])
    try:
        rewarded(lambda completion: given, [completion("x" * 5000)])
    except UserError as error:
        assert len(str(error)) < 400


def test_an_error_of_the_function_says_for_which_completion():
    with pytest.raises(ZeroDivisionError) as raised:
        rewarded(lambda completion: 1 / (completion.text == "12"))
    assert raised.value.__notes__ == ["in objectives.rewards.mine, for problem train/7 and the completion '9'"]


@pytest.mark.parametrize(
    ("score", "gave"),
    [
        (lambda q, c: 0.5, "float"), (lambda q, c: (q - c).mean(), r"torch.float32 \(\)"),
        (lambda q, c: q > c, "torch.bool"), (lambda q, c: torch.zeros(3), r"torch.float32 \(3,\)"),
    ],
)  # fmt: skip
def test_a_score_of_another_shape_or_type_is_refused_before_training(score, gave):
    with pytest.raises(UserError, match=rf"objectives\.rewards\.mine\.score gave {gave}"):
        Objective("mine", "confidence", score=score)


def test_a_score_that_is_nan_somewhere_is_named():
    rule = lambda q, c: torch.where((q - 0.12345).abs() < 1e-6, torch.nan, brier(q, c))  # noqa: E731
    objective = Objective("mine", "confidence", score=rule)
    stated = [completion(confidence=q) for q in (0.5, None, 0.12345)]
    assert reward_values(objective, stated[:2]).isnan().tolist() == [False, True]
    with pytest.raises(UserError, match=r"mine\.score gave nan for the confidence 0.12345 of problem train/7"):
        reward_values(objective, stated)


# Functions that do not return.


def loops(completion):
    while completion.text == "9":
        pass
    return 1.0


def swallows(completion):
    while completion.text == "9":
        try:
            time.sleep(0.01)
        except Exception:
            continue
    return 1.0


def backtracks(completion):
    return float(re.fullmatch("(a|a)*b", "a" * (60 if completion.text == "9" else 1)) is None)


@pytest.mark.parametrize("function", [loops, swallows, backtracks])
def test_a_reward_that_hangs_is_stopped(function):
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"objectives\.rewards\.mine did not return within 0.2 seconds .*train/7.*'9'"):
        rewarded(function, timeout=0.2)
    assert 0.2 <= time.perf_counter() - start < 10


def test_a_score_that_hangs_is_stopped():
    asleep = []
    rule = lambda q, c: (time.sleep(60) if asleep else None) or brier(q, c)  # noqa: E731
    objective = Objective("mine", "confidence", score=rule, timeout=0.2)
    asleep.append(True)
    with pytest.raises(UserError, match=r"mine did not return within 0\.2 seconds for the confidences of a batch"):
        reward_values(objective, [completion()])


def test_the_limit_is_of_each_call_and_leaves_nothing_behind():
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    left = signal.setitimer(signal.ITIMER_REAL, 1000)  # of pytest-timeout
    try:
        many = [completion() for _ in range(12)]
        assert rewarded(lambda completion: time.sleep(0.1) or 1.0, many, timeout=0.6).tolist() == [1.0] * 12
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        time.sleep(0.05)
        assert rang
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)


def test_other_threads_have_no_limit():
    found = []
    thread = threading.Thread(target=lambda: found.append(rewarded(lambda c: time.sleep(0.05) or 1.0, timeout=0.01)))
    thread.start()
    thread.join()
    assert found[0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("timeout", [0, -1.0, math.inf, math.nan])
def test_a_timeout_that_cannot_work_is_refused(timeout):
    with pytest.raises(ValueError, match=r"objectives\.rewards\.mine\.timeout="):
        Objective("mine", "solution", worst=0.0, reward=loops, timeout=timeout)


def test_c_code_that_never_returns_ends_the_process():
    code = (
        "import itertools\n"
        "from bae.objectives import time_limit\n"
        "time_limit.GRACE = 0.5\n"
        "from tests.objectives.test_values import rewarded\n"
        "def endless(completion): return sum(itertools.repeat(0))\n"
        "rewarded(endless, timeout=0.2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "endless" in done.stderr
