r"""Verifiers: does the policy's answer equal the reference?

The answer is hostile text: whatever the policy finds to make a check slow, big or wrong, it will write.
IntegerVerifier serves generated arithmetic. MathVerifier runs github.com/huggingface/Math-Verify on the
answer put in \boxed{}, as arXiv 2602.10231 does, in worker processes that can be killed.

Not guarded yet; each of these may be CORRECT though it should not:
- the question copied back, or an unevaluated form of the value (`2+3` for 5);
- an equation for a value (`4=5` for 5: math-verify takes the last side), several answers in one;
- other or missing units (math-verify drops them), a percent sign elsewhere than at the end;
- text that closes the box and opens another (`1} or \boxed{2`);
- floats that differ after the sixth decimal only.
"""

import enum
import logging
import multiprocessing
import os
import re
import resource
import signal
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from pebble import ProcessExpired, ProcessPool

Pair = tuple[str, str]  # answer, reference

_PERCENT = re.compile(r"\s*(?:\\?%|percent)\s*$")
_soft_limit = 0  # bytes of address space; set in the workers only


class Verdict(enum.Enum):
    """Outcome of one check. TIMEOUT: out of its limits, that is time or memory, or its worker died."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"
    TIMEOUT = "timeout"


class Verifier(Protocol):
    """Compares (answer, reference) pairs: one verdict per pair, in order. Bad references raise ValueError."""

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]: ...

    def close(self) -> None: ...


class IntegerVerifier:
    """Exact comparison of integers: an optional sign and at most `max_digits` (up to 4300) ASCII digits.

    Surrounding white space, leading zeros and the sign of zero do not matter: "007" equals 7, "-0" equals 0.
    Any other answer is UNPARSEABLE; any other reference raises ValueError.
    """

    def __init__(self, max_digits: int = 100) -> None:
        self._integer = re.compile(rf"[+-]?[0-9]{{1,{max_digits}}}")

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        return [self._compare(answer.strip(), reference.strip()) for answer, reference in pairs]

    def close(self) -> None:
        pass

    def _compare(self, answer: str, reference: str) -> Verdict:
        if not self._integer.fullmatch(reference):
            raise ValueError(f"the reference is not an integer, or too long: {reference!r}")
        if not self._integer.fullmatch(answer):
            return Verdict.UNPARSEABLE
        return Verdict.CORRECT if int(answer) == int(reference) else Verdict.WRONG


class MathVerifier:
    r"""math-verify in `workers` spawned processes, at most `timeout` seconds and (on Linux) `memory_mb` MiB per answer.

    UNPARSEABLE are answers that are blank, longer than `max_chars` characters or, unless they equal the
    reference as text, no expression to math-verify. Where just one side ends in a percent sign, it may equal
    the other as printed or as its hundredth (`50\%` equals 50, 0.5, 1/2); two such sides compare as printed.

    Each distinct pair is checked once per call. An answer out of its limits costs `timeout` seconds and its
    worker, 1-3 s to replace: n of them take up to n * (timeout + 3) / workers seconds. A reference too slow
    to parse shows as TIMEOUT as well. Workers start at the first call that needs them and end with close(),
    the object or the interpreter; a call after close() starts new ones. Calls from threads take turns.

    Raises ValueError for a reference that is blank or parses to nothing (the data's fault, not the policy's),
    RuntimeError if the workers break down three times in one call.
    """

    def __init__(self, timeout: float = 2.0, memory_mb: int = 2048, workers: int = 2, max_chars: int = 1000) -> None:
        self.timeout, self.memory_mb, self.workers, self.max_chars = timeout, memory_mb, workers, max_chars
        self._lock = threading.RLock()
        self._pool: ProcessPool | None = None
        self._stop: weakref.finalize[..., Any] | None = None

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        verdicts: dict[Pair, Verdict] = {}
        with self._lock:
            for last_try in (False, False, True):
                try:
                    self._complete(verdicts, pairs)
                    break
                except BaseException as error:
                    self.close()  # drops the checks still queued
                    # RuntimeError is a broken pool, for instance after idle workers were killed from outside.
                    if last_try or not isinstance(error, RuntimeError):
                        raise
        return [verdicts[pair] for pair in pairs]

    def close(self) -> None:
        with self._lock:
            if self._stop is not None:
                self._stop()
            self._pool = self._stop = None

    def _complete(self, verdicts: dict[Pair, Verdict], pairs: Sequence[Pair]) -> None:
        futures = {}
        for answer, reference in dict.fromkeys(pairs):
            pair = answer, reference
            if pair in verdicts:
                continue
            if not reference.strip():
                raise ValueError(f"the reference is blank: {reference!r}")
            if len(answer) > self.max_chars or not answer.strip():
                verdicts[pair] = Verdict.UNPARSEABLE
            elif answer.strip() == reference.strip():
                verdicts[pair] = Verdict.CORRECT
            else:
                futures[pair] = self._running_pool().schedule(_check, pair, timeout=self.timeout)
        for pair, future in futures.items():
            error = future.exception()  # not raised when expected: a traceback would tie self into a cycle
            if isinstance(error, (TimeoutError, ProcessExpired)):
                verdicts[pair] = Verdict.TIMEOUT
            elif error is not None:
                raise error
            else:
                verdicts[pair] = future.result()

    def _running_pool(self) -> ProcessPool:
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(self.workers, 0, _start_worker, (self.memory_mb,), spawn)
            self._stop = weakref.finalize(self, _stop_pool, self._pool)  # runs at exit too
        return self._pool


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
    _compare("1", r"2\%")
    size, more = _peak_address_space(), memory_mb << 20
    if not size:
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))
    # math-verify swallows most MemoryErrors, and big results stay in caches, where they would starve later
    # answers. So a worker also leaves after an answer that took it past a quarter of the limit.
    _soft_limit = size + more // 4


def _check(answer: str, reference: str) -> Verdict:
    """One pair, in a worker."""
    verdict = _compare(answer, reference)
    if _soft_limit and _peak_address_space() > _soft_limit:
        os._exit(1)  # pebble reports ProcessExpired
    return verdict


def _compare(answer: str, reference: str) -> Verdict:
    from math_verify import parse, verify  # heavy, so in the workers only
    from sympy import Expr, Rational

    # Hydra pins antlr 4.9.3, under which latex2sympy2-extended cannot read `50\%` (AtomContext.FUNC_GAMMA is
    # missing) and the comparison is silently false; so the sign is taken off here.
    bare_answer, bare_reference = _PERCENT.sub("", answer), _PERCENT.sub("", reference)
    # Zero turns off math-verify's own alarms, which cannot interrupt C code. parse gives [expression, text];
    # reversed, so that equal texts are equal whatever comparing the expressions raises.
    gold = parse(f"\\boxed{{{bare_reference}}}", parsing_timeout=0)[::-1]
    if not gold:
        raise ValueError(f"math-verify parses the reference to nothing: {reference!r}")
    try:
        found = parse(f"\\boxed{{{bare_answer}}}", parsing_timeout=0, raise_on_error=True)[::-1]
        only_text = all(isinstance(value, str) for value in found)
        equal = verify(gold, found, timeout_seconds=0, raise_on_error=True)
        if not equal and (bare_answer == answer) != (bare_reference == reference):
            side = gold if bare_answer == answer else found  # the one with the percent sign
            side[:] = [value * Rational(1, 100) for value in side if isinstance(value, Expr)]
            equal = verify(gold, found, timeout_seconds=0, raise_on_error=True)
    except MemoryError:
        return Verdict.TIMEOUT
    except Exception:
        # Raised over this answer: too deep (RecursionError), integers of over 4300 digits (ValueError), nan
        # or zoo, orderings of complex numbers (TypeError), gaps of latex2sympy2 (AttributeError, IndexError).
        return Verdict.UNPARSEABLE
    if equal:
        return Verdict.CORRECT
    return Verdict.UNPARSEABLE if only_text else Verdict.WRONG
