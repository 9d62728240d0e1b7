"""A judge behind a server: what it is asked, how its reply is read, and what happens if it does not answer."""

import asyncio
import json
import time

import pytest

from bae.errors import NoAnswer, UserError
from bae.text.judge import Judge, JudgeVerifier
from bae.text.templates import filled
from bae.text.verdict import Verdict
from tests.support.judge_server import judge_server

OPTIONS = {"model": "m", "prompt": "Is {answer} like {reference}?", "pattern": r"(?i)score:\s*(\d+)", "highest": 10.0}
NOWHERE = "http://127.0.0.1:9/v1"


def ask(judge, **values):
    return asyncio.run(judge.score({"answer": "a", "reference": "b"} | values))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("bae.text.judge.PAUSE", 0.01)


def test_braces_in_a_text_are_not_places():
    assert filled("{a} {b} {c}", {"a": "{b}", "b": "2"}) == "{b} 2 {c}"


@pytest.mark.parametrize(
    ("reply", "score"),
    [("Score: 5", 0.5), ("score:10", 1.0), ("Score: 3, no: Score: 0", 0.0), ("I think SCORE:\n 7.", 0.7)],
)
def test_the_last_number_of_a_reply_counts(reply, score):
    with judge_server(lambda message: reply) as server:
        assert ask(Judge(server.url, **OPTIONS)) == score
        ((_, body),) = server.requests
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Is a like b?"}],
        "max_tokens": 256,
        "temperature": 0.0,
    }


@pytest.mark.parametrize("reply", ["no number", "Score: 11", "Score: ", (200, "{}"), (200, "no JSON"), (503, "busy")])
def test_a_reply_without_a_score_is_no_answer(reply):
    with judge_server(lambda message: reply) as server, pytest.raises(NoAnswer):
        ask(Judge(server.url, **OPTIONS, tries=2))
    assert len(server.requests) == (2 if reply == (503, "busy") else 1)


def test_a_server_that_is_busy_is_asked_again():
    replies = [(503, "busy"), (429, "slower"), "Score: 4"]
    with judge_server(lambda message: replies.pop(0)) as server:
        assert ask(Judge(server.url, **OPTIONS)) == 0.4


def test_a_server_that_is_away_is_no_answer():
    with pytest.raises(NoAnswer, match=r"http://127.0.0.1:9/v1 did not answer \(ClientConnector"):
        ask(Judge(NOWHERE, **OPTIONS))


def test_a_refusal_is_one_sentence():
    with judge_server(lambda message: (404, "no model m")) as server, pytest.raises(UserError) as error:
        ask(Judge(server.url, **OPTIONS))
    assert str(error.value) == (
        f"judge.url={server.url}: the server refused the request (status 404: no model m); correct judge.url, "
        "judge.model=m or the key in $JUDGE_API_KEY"
    )
    assert len(server.requests) == 1


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with judge_server(lambda message: "Score: 1") as server:
        ask(Judge(server.url, **OPTIONS, key_variable="MY_KEY"))
    assert server.requests[0][0]["Authorization"] == "Bearer secret"


def test_replies_are_logged_and_not_asked_for_again(tmp_path):
    log = tmp_path / "run" / "judge.jsonl"
    with judge_server(lambda message: "Score: 8") as server:
        judge = Judge(server.url, **OPTIONS, log=str(log))
        assert [ask(judge), ask(judge), ask(judge, answer="c")] == [0.8] * 3
        log.write_text(log.read_text() + '{"key": "cut o')  # the run was killed here
        assert ask(Judge(server.url, **OPTIONS, log=str(log))) == 0.8  # a run that goes on
    assert len(server.requests) == 2
    first = json.loads(log.read_text().splitlines()[0])
    assert first | {"key": None} == {"key": None, "score": 0.8, "reply": "Score: 8", "answer": "a", "reference": "b"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"lowest": 10.0}, "judge.lowest=10.0"),
        ({"url": "localhost:8000"}, "must begin with http"),
        ({"pattern": "score"}, "must have a group"),
        ({"pattern": "("}, "judge.pattern"),
        ({"prompt": "Well?"}, "no place"),
        ({"tries": 0}, "judge.tries=0"),
    ],
)
def test_options_that_cannot_work_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Judge(**({"url": NOWHERE} | OPTIONS | wrong))


def test_a_judge_verifies():
    """It is asked only about what a comparison of texts leaves open."""
    with judge_server(lambda message: f"Score: {10 * ('big' in message)}") as server:
        verifier = JudgeVerifier(Judge(server.url, **OPTIONS), max_chars=20)
        pairs = [("a big city", "town"), ("small", "town"), (" Town", "town"), ("", "town"), ("big" * 9, "town")]
        assert verifier.verify(pairs) == [
            Verdict.CORRECT, Verdict.WRONG, Verdict.CORRECT, Verdict.UNPARSEABLE, Verdict.UNPARSEABLE,
        ]  # fmt: skip
    assert len(server.requests) == 2
    assert verifier.equivalent([("A b", "a  B"), ("a", "b")]) == [True, False]
    with pytest.raises(ValueError, match="it is blank"):
        verifier.submit([("a", " ")])


def test_verdicts_that_do_not_come_are_timeouts():
    with judge_server(lambda message: time.sleep(5 * ("slow" in message)) or "Score: 10") as server:
        verifier = JudgeVerifier(Judge(server.url, **OPTIONS), timeout=0.5)
        start = time.perf_counter()
        pending = verifier.submit([("slow", "x"), ("fast", "x"), ("slower", "x")])
        assert time.perf_counter() - start < 0.3  # nobody has waited
        assert pending() == [Verdict.TIMEOUT, Verdict.CORRECT, Verdict.TIMEOUT]
        assert time.perf_counter() - start < 3
        dropped = verifier.submit([("slow", "y")])
        verifier.close()
        assert dropped() == [Verdict.TIMEOUT] and not verifier._running
    assert JudgeVerifier(Judge(NOWHERE, **OPTIONS)).verify([("a", "b")]) == [Verdict.TIMEOUT]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"threshold": 0.0}, "threshold"), ({"timeout": 0}, "timeout"), ({"at_once": 0}, "at_once")],
)
def test_verifier_options_that_cannot_work_are_refused(wrong, said):
    with pytest.raises(ValueError, match=f"verifier.{said}"):
        JudgeVerifier(Judge(NOWHERE, **OPTIONS), **wrong)
    with pytest.raises(ValueError, match="must have the places"):
        JudgeVerifier(Judge(NOWHERE, **OPTIONS | {"prompt": "{question} {answer} {reference}"}))
