"""task=reasoning_gym: the same problems for the same (seed, split, index), and the library's own scorers."""

from collections import defaultdict

import pytest

from bae.batch import Problem
from bae.text.gym_verifier import GymVerifier
from bae.text.verdict import Verdict

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed; make reasoning-gym")
from bae.tasks import reasoning_gym
from bae.tasks.reasoning_gym import ReasoningGym

SPLITS = {"train": {"size": 60, "held_out": False}, "val": {"size": 40, "held_out": True}}
GENERATORS = {"chain_sum": {"max_terms": 3, "max_digits": 2}, "countdown": {}}
CORRECT, WRONG, UNPARSEABLE, TIMEOUT = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE, Verdict.TIMEOUT


def task(**options):
    return ReasoningGym(**({"splits": SPLITS, "generators": GENERATORS} | options))


def problems(of, split):
    return [of.problem(split, i) for i in range(of.size(split))]


def test_a_problem_is_one_of_seed_split_and_index():
    one, again = problems(task(), "train"), problems(task(), "train")
    assert one == again and [p.columns for p in one] == [p.columns for p in again]
    assert one[::-1] == [task().problem("train", i) for i in range(59, -1, -1)]  # whatever was asked for before
    assert problems(task(seed=1), "train") != one
    assert [p.columns["generator"] for p in one[:4]] == ["chain_sum", "countdown"] * 2


def test_no_question_is_in_both_splits():
    train, val = ({p.question for p in problems(task(), split)} for split in ("train", "val"))
    assert len(train) > 50 and len(val) > 30 and not train & val


def test_a_sum_is_right_by_value_and_countdown_by_what_it_makes():
    gym = task(workers=1)
    total, countdown = gym.problem("train", 0), gym.problem("train", 1)
    numbers = countdown.columns["numbers"]
    wrong = "+".join(map(str, numbers)) + "+0"
    pairs = [
        (str(eval(total.columns["expression"])), total.reference),
        (f" {total.answer} ", total.reference),
        (f"it is {total.answer}", total.reference),  # the library gives it a part of 1
        ("", total.reference),
        (countdown.answer, countdown.reference),
        (f"({countdown.answer})", countdown.reference),  # another text for it
        (wrong, countdown.reference),
        ("((", countdown.reference),
    ]
    verdicts = gym.verifier.verify(pairs)
    gym.verifier.close()
    assert verdicts[:6] == [CORRECT, CORRECT, WRONG, UNPARSEABLE, CORRECT, CORRECT]
    assert CORRECT not in verdicts[6:]


def test_the_threshold_decides_what_part_of_a_score_is_right():
    gym = task(threshold=0.05, workers=1)
    total = gym.problem("train", 0)
    assert gym.verifier.verify([(f"= {total.answer}", total.reference), ("x", total.reference)]) == [CORRECT, WRONG]
    gym.verifier.close()


def test_a_slow_answer_does_not_stop_a_run():
    gym = task(workers=1, timeout=1.0)
    countdown = gym.problem("train", 1)
    assert gym.verifier.verify([("9**9**9**9", countdown.reference)]) in ([TIMEOUT], [WRONG], [UNPARSEABLE])
    gym.verifier.close()


def test_a_reference_is_an_address():
    verifier = GymVerifier({"chain_sum": {}})
    assert verifier.fault("chain_sum/0/3") is None
    assert verifier.fault("7") == "there is no generator '7' in task.generators"
    assert verifier.fault("chain_sum/7") == "it must be generator/seed/number"
    with pytest.raises(ValueError, match="the reference '7' is no address of a problem"):
        verifier.submit([("7", "7")])
    assert Problem("p", "q", "7").reference == "7" and Problem("p", "q", "7", {}, "a/0/1").reference == "a/0/1"
    assert verifier.equivalent([("7", " 7"), ("7", "7.0")]) == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generators": {}}, r"task\.generators=\{\}: there is none; name one"),
        ({"generators": {"chain_smu": {}}}, r"task\.generators\.chain_smu=\{\}: .*chain_smu"),
        ({"generators": {"chain_sum": {"terms": 3}}}, r"task\.generators\.chain_sum=.*terms"),
        ({"generators": {"chain_sum": {"min_terms": 9, "max_terms": 2}}}, r"task\.generators\.chain_sum="),
        ({"threshold": 0.0}, r"task\.threshold=0\.0: must be above 0, and 1 at most"),
        ({"splits": {"train": {"size": 0, "held_out": True}}}, r"task\.splits\.train=.*: must have size, 1 or more"),
        ({"splits": {"train": {"size": 5}}}, r"task\.splits\.train=.*held_out"),
    ],
)
def test_what_cannot_work_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message) as refused:
        task(**options)
    assert "\n" not in str(refused.value)


def test_a_generator_with_few_problems_is_named(monkeypatch):
    entry = {"question": "always the same", "answer": "7", "metadata": {}}
    monkeypatch.setattr(reasoning_gym, "generator", lambda name, options, seed: defaultdict(lambda: entry))
    gym, found = task(), []
    for split in SPLITS:  # the question belongs to one of them
        try:
            found.append(gym.problem(split, 0).question)
        except ValueError as error:
            found.append(str(error))
    assert sum("it has few different ones; give it options for harder problems" in text for text in found) == 1
    assert "always the same" in found
