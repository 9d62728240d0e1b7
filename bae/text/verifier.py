r"""Verifiers: does the policy's answer equal the reference?

The answer is hostile text: whatever the policy finds to make a check slow, big or wrong, it will write.
IntegerVerifier serves generated arithmetic. MathVerifier decides by the text what may be compared (bae.text.answers
has the
rule) and has github.com/huggingface/Math-Verify, as arXiv 2602.10231 does, compare the expressions in it, in worker
processes that can be killed.

Not guarded, so CORRECT though one might wish it were not:
- an expression with variables in any form, also that of the question (`(x+1)^2` for x^2+2x+1);
- a constant that could be simplified but is no longer than the reference (`\sqrt{12}` for 2\sqrt3), a fraction that is
  not reduced, a value times or over 1;
- a decimal for a constant that is no fraction, if they agree to the sixth place;
- a unit where the reference has none (`12 cm` for 12), a number where the reference has a percent sign or vice versa;
- an inequality where the reference is a pair of numbers, as (1,2) may be the interval.
Right, but not accepted: prose around a right answer, a mark of a choice with its text (`(E) hyperbola`), inequalities
joined by `or` for a union, one-letter units (`540m`) outside \text, Markdown.
"""

import logging
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

from bae.text import answers
from bae.text.verdict import Verdict

Pair = tuple[str, str]  # answer, reference

_soft_limit = 0  # bytes of address space; set in the workers only


Check = Callable[[str, str], Verdict]
Pending = Callable[[], list[Verdict]]
"""Verdicts that may still be in the making; a call waits for them, a further call gives the same again."""


class Verifier(Protocol):
    """Compares answers with references, and with each other; one result per pair, in order."""

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        """Begin to check (answer, reference) pairs, without waiting.

        Raises ValueError for a bad reference, at once or when the verdicts are asked for.
        """

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """`submit`, and wait for the verdicts."""

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether two answers of the policy mean the same, for votes among them.

        Symmetric, and True for equal texts, but not transitive: 12 may agree with both `12 cm` and `12 km`. False
        if either cannot be read or is out of the limits: raises nothing for what answers contain.
        """

    def close(self) -> None:
        """Drop what is still being checked, and free what checks need; a later call starts anew."""


class IntegerVerifier:
    """Exact comparison of integers: an optional sign and at most `max_digits` (up to 4300) ASCII digits.

    Surrounding white space, leading zeros and the sign of zero do not matter: "007" equals 7, "-0" equals 0.
    Any other answer is UNPARSEABLE; any other reference raises ValueError.
    """

    def __init__(self, max_digits: int = 100) -> None:
        self._integer = re.compile(rf"[+-]?[0-9]{{1,{max_digits}}}")

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        verdicts = [self._compare(answer.strip(), reference.strip()) for answer, reference in pairs]
        return lambda: verdicts

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return self.submit(pairs)()

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        return [self._same(one.strip(), other.strip()) for one, other in pairs]

    def close(self) -> None:
        pass

    def _same(self, one: str, other: str) -> bool:
        return one == other or (all(map(self._integer.fullmatch, (one, other))) and int(one) == int(other))

    def _compare(self, answer: str, reference: str) -> Verdict:
        if not self._integer.fullmatch(reference):
            raise ValueError(f"the reference is not an integer, or too long: {reference!r}")
        if not self._integer.fullmatch(answer):
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if int(answer) == int(reference) else Verdict.WRONG


class MathVerifier:
    r"""math-verify in `workers` spawned processes, at most `timeout` seconds and (on Linux) `memory_mb` MiB per answer.

    Answers must be in final form; bae.text.answers has the rule. UNPARSEABLE are, unless they equal the reference as
    text,
    those that are blank, longer than `max_chars` characters, have anything foreign in them (prose, several boxes,
    operations that the reference lacks), or are no expression to math-verify. WRONG are other values, and a sum or
    power where a number is asked for. `equivalent` takes either answer as the reference of the other, and both must
    be CORRECT, which makes it symmetric.

    Each distinct pair is checked once per call. An answer out of its limits costs `timeout` seconds and its
    worker, 1-3 s to replace: n of them take up to n * (timeout + 3) / workers seconds. A reference too slow
    to parse shows as TIMEOUT as well. Workers start at the first call that needs them and end with close(),
    the object or the interpreter; a call after close() starts new ones, as does a wait for checks that it dropped.
    Calls from threads share the workers.

    Raises ValueError for a reference that is blank or has brackets that do not match (the data's fault, not the
    policy's), RuntimeError if the workers break down three times in one call.
    """

    def __init__(self, timeout: float = 2.0, memory_mb: int = 2048, workers: int = 2, max_chars: int = 1000) -> None:
        self.timeout, self.memory_mb, self.workers, self.max_chars = timeout, memory_mb, workers, max_chars
        self._lock = threading.RLock()
        self._pool: ProcessPool | None = None
        self._stop: weakref.finalize[..., Any] | None = None

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        for _, reference in pairs:
            if not reference.strip():
                raise ValueError(f"the reference is blank: {reference!r}")
        return _Checks(self, _check, pairs)

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return self.submit(pairs)()

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        ordered = [(min(texts), max(texts)) for texts in ((one.strip(), other.strip()) for one, other in pairs)]
        unequal = [pair for pair in ordered if pair[0] != pair[1] and max(map(len, pair)) <= self.max_chars]
        verdicts = dict(zip(unequal, _Checks(self, _check_both_ways, unequal)(), strict=True))
        return [pair[0] == pair[1] or verdicts.get(pair) is Verdict.CORRECT for pair in ordered]

    def close(self) -> None:
        with self._lock:
            if self._stop is not None:
                self._stop()
            self._pool = self._stop = None

    def _schedule(self, check: Check, pair: Pair) -> tuple[ProcessPool, ProcessFuture[Verdict]]:
        """One check, in the queue of the workers. Raises RuntimeError if they cannot be had."""
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
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(self.workers, 0, _start_worker, (self.memory_mb,), spawn)
            self._stop = weakref.finalize(self, _stop_pool, self._pool)  # runs at exit too
        return self._pool


class _Checks:
    """The checks of some pairs, queued at once; a call waits for the verdicts. Each distinct pair is checked once."""

    def __init__(self, verifier: MathVerifier, check: Check, pairs: Sequence[Pair]) -> None:
        self._verifier, self._check, self._pairs = verifier, check, list(pairs)
        self._verdicts: dict[Pair, Verdict] = {}
        self._queued: dict[Pair, tuple[ProcessPool, ProcessFuture[Verdict]]] = {}
        for answer, reference in self._pairs:
            if len(answer) > verifier.max_chars or not answer.strip():
                self._verdicts[answer, reference] = Verdict.UNPARSEABLE
            elif answer.strip() == reference.strip():
                self._verdicts[answer, reference] = Verdict.CORRECT
        with suppress(RuntimeError):  # the call will try again, and tell
            self._queue()

    def __call__(self) -> list[Verdict]:
        for last_try in (False, False, True):
            try:
                self._queue()
                self._collect()
                break
            except BaseException as error:
                # RuntimeError is a pool that broke or was closed.
                if last_try or not isinstance(error, RuntimeError):
                    self._verifier.close()  # drops the checks still queued
                    raise
                self._queued.clear()
        return [self._verdicts[pair] for pair in self._pairs]

    def _queue(self) -> None:
        for pair in dict.fromkeys(self._pairs):
            if pair not in self._verdicts and pair not in self._queued:
                self._queued[pair] = self._verifier._schedule(self._check, pair)

    def _collect(self) -> None:
        for pair, (pool, future) in list(self._queued.items()):
            while not future.done():
                if not pool.active:  # it broke or was closed, and what it had in its queue is never done
                    raise RuntimeError("the worker processes of the verifier broke down")
                wait([future], timeout=1.0)
            error = future.exception()  # not raised when expected: a traceback would tie self into a cycle
            if isinstance(error, (TimeoutError, ProcessExpired)):
                self._verdicts[pair] = Verdict.TIMEOUT
            elif error is not None:
                raise error
            else:
                self._verdicts[pair] = future.result()
            del self._queued[pair]


def _stop_pool(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _peak_address_space() -> int:
    """Bytes; 0 where the system does not tell (anywhere but Linux), so that there only the time limit holds."""
    if not os.path.exists("/proc/self/status"):
        return 0
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmPeak"))


def _start_worker(memory_mb: int) -> None:
    """Import and warm up math-verify outside the time limit, then limit the memory on top of it."""
    global _soft_limit
    # pebble's handler is Python code, so a long C call would hold it up until pebble sends SIGKILL 3 s later.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    _compare("1+x", "x+2")
    size, more = _peak_address_space(), memory_mb << 20
    if not size:
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))
    # math-verify swallows most MemoryErrors, and big results stay in caches, where they would starve later
    # answers. So a worker also leaves after an answer that took it past a quarter of the limit.
    _soft_limit = size + more // 4


def _check(answer: str, reference: str) -> Verdict:
    """One pair, in a worker."""
    return _within_limits(_compare(answer, reference))


def _check_both_ways(one: str, other: str) -> Verdict:
    """Two answers, in a worker. CORRECT if each would be, were the other the reference."""
    if answers.canonical(one) == answers.canonical(other) is not None:
        return Verdict.CORRECT
    try:
        verdict = _compare(one, other)
        return _within_limits(_compare(other, one) if verdict is Verdict.CORRECT else verdict)
    except ValueError:  # one that is no reference
        return Verdict.UNPARSEABLE


def _within_limits(verdict: Verdict) -> Verdict:
    if _soft_limit and _peak_address_space() > _soft_limit:
        os._exit(1)  # pebble reports ProcessExpired
    return verdict


def _compare(answer: str, reference: str) -> Verdict:
    wanted = answers.canonical(reference)
    if wanted is None:
        raise ValueError(f"the reference is blank or its brackets do not match: {reference!r}")
    found = answers.canonical(answer)
    if found is None:
        return Verdict.UNPARSEABLE
    try:
        equal = answers.matches(found, wanted, _equal)
    except MemoryError:
        return Verdict.TIMEOUT
    except Exception:
        # Raised over this answer: too deep (RecursionError), integers of over 4300 digits (ValueError), nan
        # or zoo, orderings of complex numbers (TypeError), gaps of latex2sympy2 (AttributeError, IndexError).
        return Verdict.UNPARSEABLE
    if equal:
        return Verdict.CORRECT
    return Verdict.WRONG if answers.readable(found, wanted) else Verdict.UNPARSEABLE


def _equal(answer: str, reference: str) -> bool:
    """Whether two expressions have the same value. Raises ValueError for an answer that is none."""
    from latex2sympy2_extended import NormalizationConfig  # heavy, so in the workers only
    from math_verify import LatexExtractionConfig, parse, verify

    # Nothing is cut off: bae.text.answers has dealt with units.
    config = [LatexExtractionConfig(normalization_config=NormalizationConfig(malformed_operators=True, nits=True))]
    # Zero turns off math-verify's own alarms, which cannot interrupt C code. parse gives [expression, text];
    # reversed, so that equal texts are equal whatever comparing the expressions raises.
    gold = parse(f"\\boxed{{{reference}}}", config, parsing_timeout=0)[::-1]
    found = parse(f"\\boxed{{{answer}}}", config, parsing_timeout=0, raise_on_error=True)[::-1]
    equal = verify(gold, found, timeout_seconds=0, raise_on_error=True, allow_set_relation_comp=True)
    if not equal and all(isinstance(value, str) for value in found):
        raise ValueError(f"no expression: {answer!r}")
    return equal
