"""Test bae.text.verifier: verdicts, percent signs, equivalence, hostile answers and their limits."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bae.text import expressions, verifier, workers
from bae.text.verdict import Verdict
from bae.text.verifier import IntegerVerifier, MathVerifier

CORRECT, WRONG, UNPARSEABLE, TIMEOUT = Verdict.CORRECT, Verdict.WRONG, Verdict.UNPARSEABLE, Verdict.TIMEOUT
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
RESPAWN = 15.0  # seconds to replace a worker on a busy machine; 1-3 on an idle one

HOSTILE = {
    "three powers": r"9^{9^{9^9}}",
    "five powers": r"2^{3^{4^{5^{6}}}}",
    "binomial": r"\binom{10^9}{5\cdot10^8}",
    "fractions": r"\frac{1}{" * 2000 + "1" + "}" * 2000,
    "braces": "{" * 10**5,
    "polynomial": r"(x+y+z+w)^{200}",
    "big power": r"2^{10^{10}}",
    "small power": r"10^{-10^9}",
    "symbols": "+".join(f"x_{{{i}}}" for i in range(2000)),
    "flat powers": "9^9^9^9",
}
OPEN = r"x+\binom{x}{2}"  # a reference to which each of these is in form, so that its value is computed
HANG, MEMORY, GROWTH = (("x+7", OPEN), ("x+8", OPEN), ("x+9", OPEN))  # faults of `_faulty`


def _faulty(answer, reference):
    """Check a pair, in a worker, with a comparison that hangs in a C call or takes memory for certain answers."""
    equal = expressions.equal

    def faulty(one, other):
        if one == HANG[0]:
            sum(range(10**13))
        if one == MEMORY[0]:
            bytearray(1 << 40)
        if one == GROWTH[0]:
            bytearray(64 << 20)
        return equal(one, other)

    with patch.object(expressions, "equal", faulty):
        return verifier._check(answer, reference)


@pytest.fixture
def faults(monkeypatch):
    """Let the workers run `_faulty`."""
    monkeypatch.setattr(verifier, "_check", _faulty)


@pytest.fixture(scope="module")
def maths():
    """Make a MathVerifier with ample time, shared by the tests of ordinary answers."""
    with_time = MathVerifier(timeout=20.0)
    yield with_time
    with_time.close()


# IntegerVerifier


@given(st.text())
def test_integer_any_text_gives_a_verdict(text):
    assert IntegerVerifier().verify([(text, "7")])[0] in (CORRECT, WRONG, UNPARSEABLE)


@given(st.integers(-(10**99), 10**99), st.integers(-(10**99), 10**99))
def test_integer_equality(number, other):
    expected = CORRECT if number == other else WRONG
    assert IntegerVerifier().verify([(str(number), str(number)), (f" {number}\n", str(other))]) == [
        CORRECT,
        expected,
    ]


@given(st.integers(101, 10**6))
def test_integer_length_is_bounded(length):
    assert IntegerVerifier().verify([("9" * length, "9")]) == [UNPARSEABLE]


def test_integer_forms():
    answers = ["007", "+7", " 7 ", "8", "-7", "7.0", "7 7", "1_0", "\u0667", "", "+", "7\x00", "0x7", "{7}"]
    expected = [CORRECT] * 3 + [WRONG] * 2 + [UNPARSEABLE] * 9
    assert IntegerVerifier().verify([(answer, "7") for answer in answers]) == expected
    assert IntegerVerifier().verify([("-0", "0"), ("0", "-0"), ("0" * 100, "0")]) == [CORRECT] * 3
    assert IntegerVerifier(max_digits=2).verify([("12", "12"), ("123", "12")]) == [CORRECT, UNPARSEABLE]


@pytest.mark.parametrize("reference", ["", "x", "7.0", "9" * 101])
def test_integer_bad_reference(reference):
    with pytest.raises(ValueError, match="reference"):
        IntegerVerifier().verify([("7", reference)])


def test_integer_equivalent():
    pairs = [("7", "007"), ("+7", " 7 "), ("-0", "0"), ("x", " x "), ("", ""), ("7", "8"), ("7", "7.0"), ("x", "7")]
    assert IntegerVerifier().equivalent(pairs) == [True] * 5 + [False] * 3
    assert IntegerVerifier().equivalent([("9" * 101, "9" * 101), ("9" * 101, "0" + "9" * 101)]) == [True, False]


# MathVerifier: ordinary answers


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("5", "5.0"),
        ("1/2", r"\frac{1}{2}"),
        (r"\frac12", "0.5"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("x=5", "5"),
        (r"\{2, 1\}", r"\{1, 2\}"),
        (r"\left(1, 2\right)", "(1,2)"),
        ("1,234", "1234"),
        (r"\text{east}", "east"),
        (r"\dfrac{\pi}{4}", r"\pi/4"),
    ],
)
def test_equal(maths, answer, reference):
    assert maths.verify([(answer, reference)]) == [CORRECT]


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("5", "6"),
        ("-5", "5"),
        (r"\frac{1}{3}", "0.5"),
        ("x+1", "x-1"),
        ("(2,1)", "(1,2)"),
        (r"\{1, 2, 3\}", r"\{1, 2\}"),
        (r"\text{west}", r"\text{east}"),
        ("5", r"\text{east}"),
    ],
)
def test_unequal(maths, answer, reference):
    assert maths.verify([(answer, reference)]) == [WRONG]


@pytest.mark.parametrize("sign", [r"\%", "%", r" \%", r"\,\%", " percent"])
def test_percent(maths, sign):
    equal = ["50" + sign, r"50\%", "50%", "50", "50.0", "0.5", ".5", "1/2", r"\frac{1}{2}"]
    unequal = ["5", "0.05", "500", "5000", r"0.5\%", r"5\%", r"5000\%", "(50, 1)"]
    for text in equal:
        assert maths.verify([(text, "50" + sign), ("50" + sign, text)]) == [CORRECT] * 2, text
    for text in unequal:
        assert maths.verify([(text, "50" + sign), ("50" + sign, text)]) == [WRONG] * 2, text


def test_percent_of_other_values(maths):
    pairs = [(r"12.5\%", "1/8"), (r"\frac{1}{2}\%", "0.005"), (r"-20\%", "-0.2"), (r"33.333333\%", "1/3")]
    assert maths.verify(pairs) == [CORRECT] * 4
    pairs = [(r"(1,2)\%", "0.5"), ("0.5", r"(1,2)\%"), ("%", "0.5")]
    assert maths.verify(pairs) == [WRONG, WRONG, UNPARSEABLE]


def test_unparseable(maths):
    answers = ["", " \n", "}", "@#!", "答案", "\x00", "\ud800", "((((", "5" + " " * 1000, "1" * 1001]
    assert maths.verify([(answer, "5") for answer in answers]) == [UNPARSEABLE] * len(answers)


def test_bad_reference(maths):
    assert maths.verify([("}", "}"), ("5", "5")]) == [CORRECT, CORRECT]  # literally equal
    with pytest.raises(ValueError, match=r"reference.*'}'"):
        maths.verify([("5", "}"), ("5.0", "5")])
    with pytest.raises(ValueError, match="blank"):
        maths.verify([("", " ")])
    assert maths.verify([("5.0", "5")]) == [CORRECT]  # still of use


def test_equivalent(maths):
    same = [
        *[
            ("1/2", "0.5"),
            ("x=5", "5"),
            ("12 cm", "12"),
            (r"\sqrt{12}", r"2\sqrt{3}"),
            ("1,2", r"\{2,1\}"),
            ("B", "(B)"),
        ],
        *[("@", "@ "), ("", " "), ("}", "}"), ("9" * 2000, "9" * 2000), ("The answer is 5", "The  answer is 5.")],
    ]
    other = [
        *[
            ("1/2", "1/3"),
            ("12 cm", "12 km"),
            ("(1,2)", "(2,1)"),
            ("2+3", "5"),
            ("x=5", "y=5"),
            ("The answer is 5", "5"),
        ],
        *[("", "5"), ("}", "5"), ("5", "@"), ("9" * 2000, "9" * 2001), ("\ud800", "5"), ("答案", "5")],
    ]
    for pairs, expected in ((same, True), (other, False)):
        for one, another in pairs:
            assert maths.equivalent([(one, another), (another, one)]) == [expected] * 2, (one, another)
    assert maths.equivalent((same + other) * 2) == ([True] * len(same) + [False] * len(other)) * 2
    assert maths.equivalent([]) == []


def test_equivalent_of_hostile_answers():
    one = MathVerifier(timeout=1.0, workers=1)
    pairs = [("10^{10^{9}}", "x+1"), ("x+1", "10^{10^{9}}"), ("x+1", "1+x")]
    assert one.equivalent(pairs) == [False, False, True]
    one.close()


@pytest.fixture
def scheduled(monkeypatch):
    """The pairs of each task that the workers are given."""
    tasks, schedule = [], workers.ProcessPool.schedule

    def noted(self, function, args=(), **options):
        tasks.append(args[1])
        return schedule(self, function, args, **options)

    monkeypatch.setattr(workers.ProcessPool, "schedule", noted)
    return tasks


def test_order_and_duplicates(maths, scheduled):
    pairs = [("1.0", "1"), ("2", "1"), ("", "1"), ("1.0", "1"), ("1", "1"), ("1", "2"), ("@", "1")] * 50
    expected = [CORRECT, WRONG, UNPARSEABLE, CORRECT, CORRECT, WRONG, UNPARSEABLE] * 50
    assert maths.verify(pairs) == expected
    assert sorted(pair for pairs in scheduled for pair in pairs) == sorted(
        {("1.0", "1"), ("2", "1"), ("1", "2"), ("@", "1")}
    )
    assert maths.verify([]) == []


def test_a_worker_is_given_several_at_once_and_what_kills_it_harms_no_other(scheduled, monkeypatch):
    monkeypatch.setattr(verifier, "_check", _exit_hard)
    one = MathVerifier(timeout=20.0, workers=1)
    pairs = [(str(n), "0") for n in range(1, 18)] + [("die", "0")]
    assert one.verify(pairs) == [CORRECT] * 17 + [TIMEOUT]
    assert [len(pairs) for pairs in scheduled] == [16, 2, 1, 1]  # the last two again, each alone
    one.close()


def test_from_threads(maths):
    results = {}

    def work(number):
        results[number] = maths.verify([(f"{number}.0", str(number)), (str(number), "77")])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [CORRECT, WRONG] for number in range(4)}


def test_batch(maths):
    pairs = [(f"{i}.0", str(i + i % 2)) for i in range(2048)]
    maths.verify([("1.0", "1")])
    start = time.monotonic()
    assert maths.verify(pairs) == [CORRECT, WRONG] * 1024
    assert time.monotonic() - start < 60  # 3-4 s on two idle cores


# Checks that are begun now and waited for later


def test_integers_are_submitted():
    pending = IntegerVerifier().submit([("7", "7"), ("8", "7"), ("x", "7")])
    assert pending() == pending() == [CORRECT, WRONG, UNPARSEABLE]
    with pytest.raises(ValueError, match="reference"):
        IntegerVerifier().submit([("7", "x")])


def test_submitted_in_one_order_and_asked_for_in_another(maths):
    pending = [maths.submit([(f"{n}.0", str(n)), (f"{n}.0", "77"), ("", "1")]) for n in range(20)]
    for one in reversed(pending):
        assert one() == one() == [CORRECT, WRONG, UNPARSEABLE]
    assert maths.submit([])() == []


def test_bad_references_are_submitted(maths):
    with pytest.raises(ValueError, match="blank"):
        maths.submit([("5.0", "5"), ("", " ")])
    bad, good = maths.submit([("5", "}")]), maths.submit([("5.0", "5")])
    with pytest.raises(ValueError, match=r"reference.*'}'"):
        bad()
    assert good() == [CORRECT]


# MathVerifier: workers


def _workers():
    return {process.pid for process in multiprocessing.active_children()}


def test_life_of_the_workers():
    before = _workers()
    one = MathVerifier(timeout=20.0, workers=1)
    assert one.verify([("1", "1"), ("", "1")]) == [CORRECT, UNPARSEABLE]
    assert _workers() == before  # no work, no process
    assert one.verify([("1.0", "1")]) == [CORRECT]
    (worker,) = _workers() - before
    assert one.verify([("2.0", "2")]) == [CORRECT]
    assert _workers() - before == {worker}  # reused
    os.kill(worker, signal.SIGKILL)
    assert one.verify([("3.0", "3")]) == [CORRECT]  # a broken pool is rebuilt
    one.close()
    one.close()
    assert _workers() == before
    other = MathVerifier(timeout=20.0, workers=1)
    assert other.verify([("4.0", "4")]) == [CORRECT]
    assert len(_workers() - before) == 1
    del other  # the workers end with the object
    assert _workers() == before


@pytest.mark.parametrize("noticed", [0.0, 0.5])
def test_workers_that_die_between_two_submissions(noticed):
    """noticed: seconds for the pool to see that workers died; without them, the queue is lost with the pool."""
    before = _workers()
    one = MathVerifier(timeout=20.0, workers=2)
    first = one.submit([("1.0", "1")])
    assert first() == [CORRECT]
    for worker in _workers() - before:
        os.kill(worker, signal.SIGKILL)
    time.sleep(noticed)
    pending = [one.submit([(f"{n}.0", str(n))]) for n in range(2, 30)]
    assert [check() for check in (first, *pending)] == [[CORRECT]] * 29
    one.close()
    assert _workers() == before


def test_closing_drops_what_is_under_way(faults):
    before = _workers()
    one = MathVerifier(timeout=60.0, workers=1)
    pending = [one.submit([pair]) for pair in (HANG, ("1.0", "1"))]
    start = time.monotonic()
    one.close()
    assert time.monotonic() - start < 5.0
    assert _workers() == before
    assert pending[1]() == [CORRECT]  # whoever waits for it still gets it
    one.close()
    assert _workers() == before


def test_a_wait_outlives_a_close_in_another_thread():
    one, verdicts = MathVerifier(timeout=20.0, workers=1), []
    waiting = threading.Thread(target=lambda: verdicts.extend(one.verify([("1.0", "1"), ("2.0", "1")])))
    waiting.start()
    time.sleep(0.3)  # the worker is still importing
    one.close()
    waiting.join()
    one.close()
    assert verdicts == [CORRECT, WRONG]


def _exit_at_once(prepare, memory_mb):
    os._exit(1)


def test_workers_that_break_down_again_and_again(monkeypatch):
    monkeypatch.setattr(workers, "_start_worker", _exit_at_once)
    one = MathVerifier(memory_mb=1, workers=1)
    pending = one.submit([("1.0", "1")])
    with pytest.raises(RuntimeError):
        pending()
    one.close()


def test_import_is_light():
    code = "import sys, bae.text.verifier; print({'torch', 'lightning', 'sympy', 'mpmath'} & {*sys.modules})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=ENVIRONMENT) == "set()\n"


def test_exit_without_close_is_prompt(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from bae.text.verifier import MathVerifier\n"
        "if __name__ == '__main__':\n"
        "    keep = MathVerifier(timeout=20.0, workers=1)\n"
        "    print(keep.verify([('1.0', '1')])[0].value)\n"
    )
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stdout, done.stderr) == (0, "correct\n", "")


# MathVerifier: hostile answers


def test_hostile_answers_to_a_number_cost_nothing():
    hostile = MathVerifier(timeout=20.0)
    assert hostile.verify([("1.0", "1")]) == [CORRECT]
    start = time.monotonic()
    verdicts = hostile.verify([(answer, "5") for answer in HOSTILE.values()])
    assert time.monotonic() - start < 5.0  # 0.1 s on an idle machine
    hostile.close()
    assert set(verdicts) == {WRONG, UNPARSEABLE}


def test_a_hostile_answer_holds_up_nobody(faults):
    before = _workers()
    two = MathVerifier(timeout=60.0, workers=2)
    two.verify([("1.0", "1")])
    start = time.monotonic()
    two.submit([HANG])
    others = [two.submit([(f"{n}.0", str(n))]) for n in range(20)]
    assert time.monotonic() - start < 1.0  # nothing waits before it is asked
    assert [check() for check in others] == [[CORRECT]] * 20
    assert time.monotonic() - start < 30.0
    two.close()
    assert _workers() == before


@pytest.mark.fault("verifier")
def test_a_timeout_passes_while_others_work(faults):
    one = MathVerifier(timeout=0.5, workers=1)
    one.verify([("1.0", "1")])
    pending = one.submit([HANG])
    time.sleep(2.0)
    start = time.monotonic()
    assert pending() == [TIMEOUT]
    assert time.monotonic() - start < 0.5
    one.close()


def test_hostile_answers_to_an_expression_cost_little():
    """Nothing is expanded or solved, so no text needs the time limit."""
    hostile = MathVerifier(timeout=20.0, max_chars=10**6)
    assert hostile.verify([("1.0", "1")]) == [CORRECT]
    start = time.monotonic()
    verdicts = hostile.verify([(answer, OPEN) for answer in HOSTILE.values()])
    assert time.monotonic() - start < 15.0  # 1 s on an idle machine
    hostile.close()
    assert set(verdicts) <= {WRONG, UNPARSEABLE}


@pytest.mark.fault("verifier")
def test_answers_that_hang_in_one_batch(faults):
    timeout, workers = 1.0, 2
    pairs = [("5.0", "5"), HANG, ("1.0", "1"), MEMORY, GROWTH, ("x+7+0", OPEN), ("10/4", "2.5")]
    hostile = MathVerifier(timeout=timeout, workers=workers)
    assert hostile.verify([("1.0", "1")]) == [CORRECT]
    start = time.monotonic()
    verdicts = hostile.verify(pairs)
    elapsed = time.monotonic() - start
    assert hostile.verify([("6.0", "6")]) == [CORRECT]
    hostile.close()
    assert verdicts == [CORRECT, TIMEOUT, CORRECT, TIMEOUT, WRONG, WRONG, CORRECT]
    assert elapsed < 2 * math.ceil(2 / workers) * (timeout + RESPAWN)  # together with others, then alone


def test_a_long_c_call_is_killed_at_once(faults):
    """The SIGTERM handler of pebble would wait 3 s for the end of the call."""
    one = MathVerifier(timeout=0.5, workers=1)
    one.verify([("1.0", "1")])
    start = time.monotonic()
    assert one.verify([HANG]) == [TIMEOUT]
    assert time.monotonic() - start < 3.0
    one.close()


def test_memory_limit(faults):
    """GROWTH stays below the limit, but its worker is replaced, so that the next answer has all the memory again."""
    one = MathVerifier(timeout=60.0, memory_mb=128, workers=1)
    assert one.verify([MEMORY, ("5.0", "5"), GROWTH, ("6.0", "6")]) == [TIMEOUT, CORRECT, TIMEOUT, CORRECT]
    one.close()


def _exit_hard(answer, reference):
    if answer == "die":
        os._exit(3)
    return CORRECT


@pytest.mark.fault("verifier")
def test_death_of_a_worker_is_timeout(monkeypatch):
    monkeypatch.setattr(verifier, "_check", _exit_hard)
    one = MathVerifier(timeout=20.0, workers=1)
    assert one.verify([("die", "5"), ("5.0", "5")]) == [TIMEOUT, CORRECT]
    one.close()
