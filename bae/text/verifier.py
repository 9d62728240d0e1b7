r"""Decide whether the policy's answer equals the reference.

The answer is hostile text: if some text makes a check slow, big or wrong, the policy will find it and write it.
IntegerVerifier serves generated arithmetic. MathVerifier decides by the text what may be compared (bae.text.answers has
the rules), and compares what is left, single expressions, by their values (bae.text.expressions), in worker processes
that can be killed. Math-Verify, which arXiv 2602.10231 uses, is not asked: it looks for an answer inside a text, folds
the case of variables, solves equations and rounds, and a policy is paid for each of them.

The following answers are CORRECT, although a stricter verifier could reject them:
- an expression with variables in any form, even the form of the question (`(x+1)^2` for x^2+2x+1);
- a constant that could be simplified but is no longer than the reference (`\sqrt{12}` for 2\sqrt3), a fraction that
  is not reduced, a value multiplied or divided by 1;
- a decimal of six or more places for a constant that is no fraction, if it is the constant rounded or cut off;
- a unit of the list where the reference has none (`12 cm` or `12 apples` for 12), a number where the reference has a
  percent sign or vice versa, a clock time without am or pm;
- an inequality where the reference is a pair of numbers, because (1,2) may be the interval.

The following answers are right, but are not accepted: prose around a right answer, the letter of a choice with its
text (`(E) hyperbola`), one-letter units (`540m`) outside \text, things counted that are not in the list (`40 daps` for
40), another unit with its value converted, a second name for an equation's variable.
"""

import multiprocessing
import os
import re
import resource
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import suppress
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from bae.text import answers, expressions
from bae.text.spelling import canonical
from bae.text.verdict import Verdict

Pair = tuple[str, str]
"""(answer, reference)."""
Check = Callable[[str, str], Verdict]
"""Check one answer against one reference, in a worker."""
Pending = Callable[[], list[Verdict]]
"""Verdicts that may not be ready yet. A call waits for them, and a second call returns the same verdicts."""

_soft_limit = 0  # bytes of address space; set in the workers only


class Verifier(Protocol):
    """Compare answers with references, and with each other. Each method returns one result per pair, in order."""

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        """Begin to check (answer, reference) pairs, without waiting.

        Raises:
            ValueError: for a bad reference, either at once or when the verdicts are asked for.
        """

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Check (answer, reference) pairs, and wait for the verdicts. Raises ValueError for a bad reference."""

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        """Tell for each pair of answers of the policy whether they mean the same. Votes among answers need it.

        The relation is symmetric, and True for equal texts, but not transitive: 12 may agree with both `12 cm` and
        `12 km`. It is False if either answer cannot be read or is out of the limits. No content of an answer makes it
        raise.
        """

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference, such as "it is blank"; None if it can be one."""

    def close(self) -> None:
        """Drop the checks that are still running, and free what checks need. A later call starts anew."""


class IntegerVerifier:
    """Compare integers exactly.

    An integer is an optional sign and ASCII digits. Surrounding white space, leading zeros and the sign of zero do not
    matter: "007" equals 7, "-0" equals 0. Any other answer is UNPARSEABLE. Any other reference raises ValueError.

    Args:
        max_digits: the most digits that an integer may have, up to 4300.
    """

    def __init__(self, max_digits: int = 100) -> None:
        self._integer = re.compile(rf"[+-]?[0-9]{{1,{max_digits}}}")

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        """Check the pairs at once, and return the verdicts as pending ones. Raises ValueError for a bad reference."""
        verdicts = [self._compare(answer.strip(), reference.strip()) for answer, reference in pairs]
        return lambda: verdicts

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Check (answer, reference) pairs. Raises ValueError for a bad reference."""
        return self.submit(pairs)()

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        """Tell for each pair of answers whether they are the same text or the same integer."""
        return [self._same(one.strip(), other.strip()) for one, other in pairs]

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it is an integer."""
        return None if self._integer.fullmatch(reference.strip()) else "it is not an integer, or too long"

    def close(self) -> None:
        """Do nothing: no check is ever pending."""

    def _same(self, one: str, other: str) -> bool:
        """Tell whether two texts are equal as texts or as integers."""
        return one == other or (all(map(self._integer.fullmatch, (one, other))) and int(one) == int(other))

    def _compare(self, answer: str, reference: str) -> Verdict:
        """Check one pair of texts without surrounding white space."""
        if not self._integer.fullmatch(reference):
            raise ValueError(f"the reference is not an integer, or too long: {reference!r}")
        if not self._integer.fullmatch(answer):
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if int(answer) == int(reference) else Verdict.WRONG


class MathVerifier:
    r"""Compare mathematical answers, in spawned processes that have limits of time and memory.

    Answers must be in final form (bae.text.answers has the rules). An answer that equals the reference as text is
    CORRECT. Otherwise an answer is UNPARSEABLE if it is blank, is longer than `max_chars`, has anything foreign in it
    (prose, several boxes, operations that the reference lacks), or is no expression. An answer is WRONG if it has
    another value, or is a sum or power where a number is asked for. `equivalent` takes each answer as the
    reference of the other, and both must be CORRECT, so it is symmetric.

    Each distinct pair is checked once per call. An answer out of its limits costs `timeout` seconds and its worker,
    which takes 1-3 s to replace: n such answers take up to n * (timeout + 3) / workers seconds. A reference that is
    too slow to parse gives TIMEOUT as well. Workers start at the first call that needs them, and end with close(),
    with the object or with the interpreter. A call after close() starts new ones, and so does waiting for checks that
    close() dropped. Calls from several threads share the workers.

    Args:
        timeout: the most seconds for one answer.
        memory_mb: the most memory for one answer, in MiB; Linux only.
        workers: the number of processes.
        max_chars: the most characters that an answer may have.

    Raises:
        ValueError: for limits that are not above 0; from the methods, for a reference that is blank or whose brackets
            do not match. That is a fault of the data, not of the policy.
        RuntimeError: from the methods, if the workers break down three times in one call.
    """

    def __init__(self, timeout: float = 2.0, memory_mb: int = 2048, workers: int = 2, max_chars: int = 1000) -> None:
        limits = {"timeout": timeout, "memory_mb": memory_mb, "workers": workers, "max_chars": max_chars}
        for name, value in limits.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"verifier.{name}={value}: must be above 0, and finite")
        self.timeout, self.memory_mb, self.workers, self.max_chars = timeout, memory_mb, workers, max_chars
        self._lock = threading.RLock()
        self._pool: ProcessPool | None = None
        self._stop: weakref.finalize[..., Any] | None = None

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        """Begin to check (answer, reference) pairs in the workers, without waiting."""
        for _, reference in pairs:
            if not reference.strip():
                raise ValueError(f"the reference is blank: {reference!r}")
        return _Checks(self, _check, pairs)

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Check (answer, reference) pairs, and wait for the verdicts."""
        return self.submit(pairs)()

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        """Tell for each pair of answers whether each is CORRECT when the other is the reference."""
        ordered = [(min(texts), max(texts)) for texts in ((one.strip(), other.strip()) for one, other in pairs)]
        unequal = [pair for pair in ordered if pair[0] != pair[1] and max(map(len, pair)) <= self.max_chars]
        verdicts = dict(zip(unequal, _Checks(self, _check_both_ways, unequal)(), strict=True))
        return [pair[0] == pair[1] or verdicts.get(pair) is Verdict.CORRECT for pair in ordered]

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it can be one."""
        if not reference.strip():
            return "it is blank"
        return None if canonical(reference) else "its brackets do not match, or it has several boxes"

    def close(self) -> None:
        """Stop the workers and drop their checks. A later call starts new ones."""
        with self._lock:
            if self._stop is not None:
                self._stop()
            self._pool = self._stop = None

    def _schedule(self, check: Check, pair: Pair) -> tuple[ProcessPool, ProcessFuture[Verdict]]:
        """Put one check into the queue of the workers. Raises RuntimeError if the workers do not start."""
        with self._lock:
            try:
                if self._pool is not None and not self._pool.active:
                    self.close()  # it broke, for instance after idle workers were killed from outside
                pool = self._running_pool()
                return pool, pool.schedule(check, pair, timeout=self.timeout)
            except RuntimeError:
                self.close()
                raise

    def _running_pool(self) -> ProcessPool:
        """Return the pool of workers, and start one if there is none."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(self.workers, 0, _start_worker, (self.memory_mb,), spawn)
            self._stop = weakref.finalize(self, _stop_pool, self._pool)  # runs at exit too
        return self._pool


class _Checks:
    """Hold the checks of some pairs, queued at once, each distinct pair once. A call waits for the verdicts."""

    def __init__(self, verifier: MathVerifier, check: Check, pairs: Sequence[Pair]) -> None:
        self._verifier, self._check, self._pairs = verifier, check, list(pairs)
        self._verdicts: dict[Pair, Verdict] = {}
        self._queued: dict[Pair, tuple[ProcessPool, ProcessFuture[Verdict]]] = {}
        for answer, reference in self._pairs:
            if len(answer) > verifier.max_chars or not answer.strip():
                self._verdicts[answer, reference] = Verdict.UNPARSEABLE
            elif answer.strip() == reference.strip():
                self._verdicts[answer, reference] = Verdict.CORRECT
        with suppress(RuntimeError):  # the call tries again, and then raises
            self._queue()

    def __call__(self) -> list[Verdict]:
        for last_try in (False, False, True):
            try:
                self._queue()
                self._collect()
                break
            except BaseException as error:
                # A pool that broke or was closed raises RuntimeError.
                if last_try or not isinstance(error, RuntimeError):
                    self._verifier.close()  # drops the checks still queued
                    raise
                self._queued.clear()
        return [self._verdicts[pair] for pair in self._pairs]

    def _queue(self) -> None:
        """Queue each pair that has no verdict and is not in the queue yet."""
        for pair in dict.fromkeys(self._pairs):
            if pair not in self._verdicts and pair not in self._queued:
                self._queued[pair] = self._verifier._schedule(self._check, pair)

    def _collect(self) -> None:
        """Wait for the queued checks and keep their verdicts. Raises RuntimeError if the workers broke down."""
        for pair, (pool, future) in list(self._queued.items()):
            while not future.done():
                if not pool.active:  # it broke or was closed, so its queue will never be done
                    raise RuntimeError("the worker processes of the verifier broke down")
                wait([future], timeout=1.0)
            error = future.exception()  # expected errors are not raised: a traceback would tie self into a cycle
            if isinstance(error, ProcessExpired) and error.exitcode == -signal.SIGTERM:
                # Not by pebble, which reports a TimeoutError: whoever stops this run signalled its whole group.
                raise RuntimeError("a worker process of the verifier was stopped from outside")
            if isinstance(error, (TimeoutError, ProcessExpired)):
                self._verdicts[pair] = Verdict.TIMEOUT
            elif error is not None:
                raise error
            else:
                self._verdicts[pair] = future.result()
            del self._queued[pair]


def _stop_pool(pool: ProcessPool) -> None:
    """Stop the workers and wait until they have ended."""
    pool.stop()
    pool.join()


def _peak_address_space() -> int:
    """Return the peak address space of this process in bytes, or 0 if the system does not tell it.

    Only Linux tells it. Elsewhere only the time limit holds.
    """
    if not os.path.exists("/proc/self/status"):
        return 0
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak"))


def _start_worker(memory_mb: int) -> None:
    """Import what checks need outside the time limit, then limit the memory that a check may add to it."""
    global _soft_limit
    # pebble's signal handler is Python code. A long C call would delay it until pebble sends SIGKILL 3 s later.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm warns every process of a job; the run saves, we go on
    _compare("1+x", "x+2")
    size, more = _peak_address_space(), memory_mb << 20
    if not size:
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))
    # What an answer took may stay with the process, where later answers lack it. So a worker also exits after an answer
    # that took it past a quarter of the limit.
    _soft_limit = size + more // 4


def _check(answer: str, reference: str) -> Verdict:
    """Check one pair, in a worker."""
    return _within_limits(_compare(answer, reference))


def _check_both_ways(one: str, other: str) -> Verdict:
    """Compare two answers, in a worker. The verdict is CORRECT if each is correct with the other as the reference."""
    if canonical(one) == canonical(other) is not None:
        return Verdict.CORRECT
    try:
        verdict = _compare(one, other)
        return _within_limits(_compare(other, one) if verdict is Verdict.CORRECT else verdict)
    except ValueError:  # one of the answers cannot be a reference
        return Verdict.UNPARSEABLE


def _within_limits(verdict: Verdict) -> Verdict:
    """Return the verdict, or end this worker if it has passed its soft limit of memory."""
    if _soft_limit and _peak_address_space() > _soft_limit:
        os._exit(1)  # pebble reports ProcessExpired
    return verdict


def _compare(answer: str, reference: str) -> Verdict:
    """Compare one answer with one reference. Raises ValueError for a bad reference."""
    wanted = canonical(reference)
    if wanted is None:
        raise ValueError(f"the reference is blank or its brackets do not match: {reference!r}")
    found = canonical(answer)
    if found is None:
        return Verdict.UNPARSEABLE
    try:
        equal = answers.matches(found, wanted, expressions.equal)
    except MemoryError:
        return Verdict.TIMEOUT
    except Exception:
        # The answer is no expression (Unreadable), is too deep (RecursionError), has integers of over 4300 digits
        # (ValueError), or hit a gap of mpmath. Hostile text must not end a run, whatever it raises.
        return Verdict.UNPARSEABLE
    if equal:
        return Verdict.CORRECT
    return Verdict.WRONG if answers.readable(found, wanted) else Verdict.UNPARSEABLE
