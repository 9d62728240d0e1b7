"""Rewards that take time: they run beside each other, are given up in time, and are counted apart from 0."""

import asyncio
import math
import time
from concurrent.futures import Future
from functools import partial

import pytest
import torch

from bae.batch import Problem, WrittenCompletion
from bae.errors import NoAnswer, UserError
from bae.objectives import Objective
from bae.objectives.async_rewards import AsyncRewards
from bae.objectives.judged import judged
from bae.text.blocks import Section
from bae.text.judge import Judge
from tests.support.judge_server import judge_server


def written(text, well_formed=True):
    sections = (Section("reasoning", f" {text} "), Section("answer", "4"))
    return WrittenCompletion(Problem("p", "2+2=", "4"), text, sections, (well_formed,), (), 3, False)


def values(reward, texts, **options):
    """Return what a reward gives some texts, and which it did not answer; a text with a parenthesis is malformed."""
    objective = Objective("slow", "solution", worst=-2.0, reward=reward, **options)
    calls = AsyncRewards([objective], [0])
    return calls.values(0, [written(text, not text.startswith("(")) for text in texts])


async def length(completion):
    await asyncio.sleep(0.01)
    return len(completion.text) if completion.text else None


async def sometimes(completion):
    if completion.text == "raises":
        raise NoAnswer("busy")
    await asyncio.sleep(60 * (completion.text == "hangs"))
    return 1


class Slow:
    async def __call__(self, completion):
        return 1.0


def test_what_is_async():
    async def mine(completion, strength):
        return strength

    for reward in (length, Slow(), partial(mine, strength=1), partial(Slow())):
        assert Objective("o", "b", worst=0.0, reward=reward).is_async
    for reward in (len, lambda c: 1.0, partial(max, 1)):
        assert not Objective("o", "b", worst=0.0, reward=reward).is_async


def test_values_and_what_was_not_asked():
    found, unanswered = values(length, ["ab", "", "(abc", "abcd"])
    torch.testing.assert_close(found, torch.tensor([2.0, math.nan, math.nan, 4.0]), equal_nan=True)
    assert not unanswered.any()


@pytest.mark.parametrize(("policy", "value"), [("mask", math.nan), ("zero", 0.0), ("penalise", -2.0)])
def test_what_does_not_answer_is_given_up_and_counted_apart(policy, value):
    start = time.perf_counter()
    found, unanswered = values(sometimes, ["a", "hangs", "raises", "b"], timeout=0.3, unanswered=policy)
    assert time.perf_counter() - start < 5
    torch.testing.assert_close(found, torch.tensor([1.0, value, value, 1.0]), equal_nan=True)
    assert unanswered.tolist() == [False, True, True, False]


def test_it_may_stop_the_run():
    with pytest.raises(UserError, match=r"objectives.rewards.slow: 1 of 2 completions had no answer \(busy\)"):
        values(sometimes, ["a", "raises"], unanswered="fail")


def test_a_batch_without_any_answer_stops_the_run():
    with pytest.raises(UserError, match="8 of 8 completions had no answer"):
        values(sometimes, ["raises"] * 8)
    assert values(sometimes, ["raises"] * 7)[1].all()


def test_equal_completions_are_asked_about_once_and_many_at_a_time():
    running, most, asked = 0, 0, []

    async def reward(completion):
        nonlocal running, most
        running, asked[len(asked) :] = running + 1, [completion.text]
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return 1.0

    values(reward, [str(n // 2) for n in range(20)], at_once=3)
    assert most == 3 and sorted(asked) == [str(n) for n in range(10)]


def test_errors_of_a_function_name_the_objective():
    async def broken(completion):
        return completion.verdicts  # the verifier has not judged yet

    with pytest.raises(AttributeError) as error:
        values(broken, ["a"])
    assert "in objectives.rewards.slow, for problem p and the completion 'a'" in error.value.__notes__

    async def text(completion):
        return "1"

    with pytest.raises(UserError, match="gave a str"):
        values(text, ["a"])


def test_a_function_that_blocks_the_others_stops_the_run(monkeypatch):
    monkeypatch.setattr("bae.objectives.async_rewards.GRACE", 0.1)

    async def blocks(completion):
        time.sleep(1.5)  # in place of await asyncio.sleep
        return 1.0

    with pytest.raises(UserError, match="it must await what it waits for"):
        values(blocks, ["a", "b"], timeout=0.1)
    time.sleep(1.6)  # the loop is free again for other tests


def test_a_call_that_ends_while_it_is_looked_at_is_not_taken_for_a_standstill():
    class EndsNow(Future):
        looks = 0

        def done(self):
            self.looks += 1
            return self.looks > 1 and super().done()

    objective = Objective("slow", "solution", worst=0.0, reward=length)
    calls, call = AsyncRewards([objective], [0]), EndsNow()
    call.set_result(1.0)
    calls._calls = {calls._key(0, written("a")): call}
    assert calls.values(0, [written("a")])[0].tolist() == [1.0]


def test_calls_are_dropped_when_they_are_not_wanted():
    calls = AsyncRewards([Objective("slow", "solution", worst=0.0, reward=sometimes)], [0])
    calls.begin(written("hangs"))
    (future,) = calls._calls.values()
    calls.close()
    assert future.cancelled()


@pytest.mark.parametrize(("wrong", "said"), [({"unanswered": "no"}, "unanswered=no"), ({"at_once": 0}, "at_once=0")])
def test_options_that_cannot_work_are_refused(wrong, said):
    with pytest.raises(ValueError, match=f"objectives.rewards.slow.{said}"):
        Objective("slow", "solution", worst=0.0, reward=length, **wrong)


def test_a_judge_is_a_reward():
    """It sees the sections that its prompt names; where one is missing there is nothing to score."""
    options = {"model": "m", "pattern": r"(\d+)", "highest": 9.0}
    with judge_server(lambda message: str(len(message))) as server:
        judge = Judge(server.url, prompt="{question}|{reasoning}|{reference}", **options)
        found, _ = values(partial(judged, judge=judge), ["a", "ab"])
        assert [body["messages"][0]["content"] for _, body in sorted(server.requests, key=str)] == [
            "2+2=|a|4",
            "2+2=|ab|4",
        ]
        nothing, _ = values(partial(judged, judge=Judge(server.url, prompt="{analysis}", **options)), ["a"])
    torch.testing.assert_close(found, torch.tensor([8 / 9, 1.0]))
    assert nothing.isnan().all()
