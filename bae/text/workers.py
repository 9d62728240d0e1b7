"""Check hostile answers in spawned processes that have limits of time and memory."""

import multiprocessing
import os
import resource
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from contextlib import suppress
from typing import Any

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from bae.text.verdict import Verdict

Pair = tuple[str, str]
"""(answer, reference)."""
Check = Callable[[str, str], Verdict]
"""Check one answer against one reference, in a worker. It ends with `within_limits`."""
Pending = Callable[[], list[Verdict]]
"""Verdicts that may not be ready yet. A call waits for them, and a second call returns the same verdicts."""

_soft_limit = 0  # bytes of address space; set in the workers only


class Workers:
    """Run checks in processes that can be killed. They start with the first check.

    Args:
        prepare: imports what checks need, in a worker, outside the limits.
        timeout: the most seconds for one answer.
        memory_mb: the most memory for one answer, in MiB; Linux only.
        workers: the number of processes.
        max_chars: the most characters that an answer may have.

    Raises:
        ValueError: for limits that are not above 0.
    """

    def __init__(
        self, prepare: Callable[[], object], timeout: float, memory_mb: int, workers: int, max_chars: int
    ) -> None:
        self.prepare = prepare
        limits = {"timeout": timeout, "memory_mb": memory_mb, "workers": workers, "max_chars": max_chars}
        for name, value in limits.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"verifier.{name}={value}: must be above 0, and finite")
        self.timeout, self.memory_mb, self.workers, self.max_chars = timeout, memory_mb, workers, max_chars
        self._lock = threading.RLock()
        self._pool: ProcessPool | None = None
        self._stop: weakref.finalize[..., Any] | None = None

    def submit(self, check: Check, pairs: Sequence[Pair], equal_is_right: bool = False, together: int = 1) -> Pending:
        """Begin to check (answer, reference) pairs, without waiting.

        Blank answers and longer ones than `max_chars` are UNPARSEABLE. With equal_is_right, an answer that equals the
        reference as text is CORRECT. No worker is asked about these. `together`: the most pairs that a worker is
        given at once. For checks that take a millisecond, handing them over one by one takes longer than the checks.
        If some pairs together pass a limit, each is checked again alone, so what one of them does harms no other. The
        result raises RuntimeError if the workers break down three times in one call, and what a check raises.
        """
        return _Checks(self, check, pairs, equal_is_right, together)

    def close(self) -> None:
        """Stop the workers and drop their checks. A later call starts new ones."""
        with self._lock:
            if self._stop is not None:
                self._stop()
            self._pool = self._stop = None

    def _schedule(self, check: Check, pairs: Sequence[Pair]) -> tuple[ProcessPool, ProcessFuture[list[Verdict]]]:
        """Put checks into the queue of the workers, as one task. Raises RuntimeError if the workers do not start."""
        with self._lock:
            try:
                if self._pool is not None and not self._pool.active:
                    self.close()  # it broke, for instance after idle workers were killed from outside
                pool = self._running_pool()
                return pool, pool.schedule(_check_all, (check, pairs), timeout=self.timeout)
            except RuntimeError:
                self.close()
                raise

    def _running_pool(self) -> ProcessPool:
        """Return the pool of workers, and start one if there is none."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPool(self.workers, 0, _start_worker, (self.prepare, self.memory_mb), spawn)
            self._stop = weakref.finalize(self, _stop_pool, self._pool)  # runs at exit too
        return self._pool


class _Checks:
    """Hold the checks of some pairs, queued at once, each distinct pair once. A call waits for the verdicts."""

    def __init__(
        self, workers: Workers, check: Check, pairs: Sequence[Pair], equal_is_right: bool, together: int
    ) -> None:
        self._workers, self._check, self._pairs, self._together = workers, check, list(pairs), together
        self._verdicts: dict[Pair, Verdict] = {}
        self._alone: set[Pair] = set()  # together with others they passed a limit
        self._queued: dict[tuple[Pair, ...], tuple[ProcessPool, ProcessFuture[list[Verdict]]]] = {}
        for answer, reference in self._pairs:
            if len(answer) > workers.max_chars or not answer.strip():
                self._verdicts[answer, reference] = Verdict.UNPARSEABLE
            elif equal_is_right and answer.strip() == reference.strip():
                self._verdicts[answer, reference] = Verdict.CORRECT
        with suppress(RuntimeError):  # the call tries again, and then raises
            self._queue()

    def __call__(self) -> list[Verdict]:
        for last_try in (False, False, True):
            try:
                self._queue()
                while self._queued:
                    self._collect()
                    self._queue()
                break
            except BaseException as error:
                # A pool that broke or was closed raises RuntimeError.
                if last_try or not isinstance(error, RuntimeError):
                    self._workers.close()  # drops the checks still queued
                    raise
                self._queued.clear()
        return [self._verdicts[pair] for pair in self._pairs]

    def _queue(self) -> None:
        """Queue each pair that has no verdict and is not in the queue yet."""
        queued = {pair for pairs in self._queued for pair in pairs}
        new = [pair for pair in dict.fromkeys(self._pairs) if pair not in self._verdicts and pair not in queued]
        alone = [(pair,) for pair in new if pair in self._alone]
        others = [pair for pair in new if pair not in self._alone]
        size = max(1, min(self._together, -(-len(others) // self._workers.workers)))  # so that all workers have some
        for pairs in [*alone, *(tuple(others[i : i + size]) for i in range(0, len(others), size))]:
            self._queued[pairs] = self._workers._schedule(self._check, pairs)

    def _collect(self) -> None:
        """Wait for the queued checks and keep their verdicts. Raises RuntimeError if the workers broke down."""
        for pairs, (pool, future) in list(self._queued.items()):
            while not future.done():
                if not pool.active:  # it broke or was closed, so its queue will never be done
                    raise RuntimeError("the worker processes of the verifier broke down")
                wait([future], timeout=1.0)
            error = future.exception()  # expected errors are not raised: a traceback would tie self into a cycle
            if isinstance(error, ProcessExpired) and error.exitcode == -signal.SIGTERM:
                # Not by pebble, which reports a TimeoutError: whoever stops this run signalled its whole group.
                raise RuntimeError("a worker process of the verifier was stopped from outside")
            if isinstance(error, (TimeoutError, ProcessExpired)):
                if len(pairs) > 1:
                    self._alone.update(pairs)
                else:
                    self._verdicts[pairs[0]] = Verdict.TIMEOUT
            elif error is not None:
                raise error
            else:
                self._verdicts.update(zip(pairs, future.result(), strict=True))
            del self._queued[pairs]


def _check_all(check: Check, pairs: Sequence[Pair]) -> list[Verdict]:
    """Check some pairs, in a worker."""
    return [check(*pair) for pair in pairs]


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


def _start_worker(prepare: Callable[[], object], memory_mb: int) -> None:
    """Import what checks need outside the time limit, then limit the memory that a check may add to it."""
    global _soft_limit
    # pebble's signal handler is Python code. A long C call would delay it until pebble sends SIGKILL 3 s later.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm warns every process of a job; the run saves, we go on
    prepare()
    size, more = _peak_address_space(), memory_mb << 20
    if not size:
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))
    # What an answer took may stay with the process, where later answers lack it. So a worker also exits after an answer
    # that took it past a quarter of the limit.
    _soft_limit = size + more // 4


def within_limits(verdict: Verdict) -> Verdict:
    """Return the verdict, or end this worker if it has passed its soft limit of memory."""
    if _soft_limit and _peak_address_space() > _soft_limit:
        os._exit(1)  # pebble reports ProcessExpired
    return verdict
