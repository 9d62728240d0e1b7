"""Stop a reward function that does not return."""

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

GRACE = 30.0
"""Seconds that a function has to react to the time limit, before the process is ended."""


class TimeUp(BaseException):
    """Say that a call took too long. A function that catches every Exception does not catch it."""


class Clock:
    """Know which call is being made, and since when.

    Attributes:
        call: what was given to `begin` last; None before.
        begun: when that was, in seconds of `perf_counter`.
    """

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, call: Any) -> None:
        """Note that a call begins."""
        self.call, self.begun = call, perf_counter()


@contextmanager
def time_limit(clock: Clock, seconds: float | None) -> Iterator[None]:
    """Raise TimeUp in the body if a call that the clock was told of takes longer than `seconds`; None for no limit.

    A user's function may hold a model or a cache, or be one that cannot be pickled. So it runs in this process, and not
    in a worker that could be killed. The limit is an alarm signal, whose handler raises where the function is: in
    Python code, in a wait, in a regular expression. It costs one reading of the clock for each call.

    C code that never returns to Python lets no handler run. So if the function has not ended after `GRACE` further
    seconds, the process ends with status 1, and a traceback on stderr shows where it was.

    Signals reach the main thread alone. In other threads, and on systems without alarms, there is no limit.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    limit = seconds

    def arm(left: float) -> None:
        faulthandler.dump_traceback_later(left + GRACE, exit=True, file=2)
        signal.setitimer(signal.ITIMER_REAL, left)

    def ring(*_: Any) -> None:
        left = clock.begun + limit - perf_counter()
        if left <= 0:
            raise TimeUp
        arm(left)

    handler, before = signal.signal(signal.SIGALRM, ring), signal.getitimer(signal.ITIMER_REAL)[0]
    start = perf_counter()
    try:
        arm(limit)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)
        if before:  # somebody else's alarm, such as pytest-timeout's
            signal.setitimer(signal.ITIMER_REAL, max(before - (perf_counter() - start), 1e-3))
