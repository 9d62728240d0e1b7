"""Signals that ask a process to stop: when it does, and with which exit code.

This module imports nothing of the project. docs/reliability.md has the table of exit codes.
"""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REQUEUE = 75
"""The exit code after SIGUSR1, by which Slurm and others warn a job: run it again (EX_TEMPFAIL of sysexits.h)."""
APART = 1.0
"""Signals that come within so many seconds of the first are the same request: a launcher often sends it, too."""
REACTION = 5.0
"""Seconds that the main thread has to notice that it is to stop at once. Code outside Python may keep it longer."""
UNWINDING = 60.0
"""Seconds that it has to end, with what it has to tell its tracking store."""


def exit_code(signum: int) -> int:
    """Return the exit code of a process that a signal stopped."""
    return REQUEUE if signum == signal.SIGUSR1 else 128 + signum


class Stopped(SystemExit):
    """Tell that a signal stops this process. Like other exits, it passes `except Exception`.

    Args:
        signum: the signal.

    Attributes:
        message: the sentence that the user reads; None if nobody knew more than the signal, "" for silence.
    """

    message: str | None = None

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.code = exit_code(signum)

    @property
    def name(self) -> str:
        """Return the name of the signal."""
        return signal.Signals(self.signum).name


class StopSignals:
    """Raise `Stopped` in the main thread when a signal asks this process to stop, as a context manager.

    While `deferred` is true, the first signal is only noted in `received`, and whoever comes to a safe point calls
    `stop`. A second signal stops at once; one more ends the process whatever it does. If the safe point does not come
    within `within` seconds, that counts as a second signal. A thread watches: it ends the process if the main thread
    cannot react, for example because it waits for other ranks outside Python.

    Args:
        within: seconds from the first signal to the safe point.
        notice: what to write to stderr when the first signal is noted; {signal} stands for its name.
        last_words: called with a `Stopped` before the process is ended from outside its main thread.
    """

    def __init__(
        self, within: float = math.inf, notice: str = "", last_words: Callable[[Stopped], None] | None = None
    ) -> None:
        self.within = within
        self.notice = notice
        self.last_words = last_words
        self.deferred = False
        self.received = 0
        self._received_at = 0.0
        self._raised_at: float | None = None

    def __enter__(self) -> "StopSignals":
        self._in_main = threading.current_thread() is threading.main_thread()  # others can set no handler
        if self._in_main:
            self._before = {signum: signal.getsignal(signum) for signum in STOPPING}
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._watcher = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
            self._watcher.start()
            self.install()
        return self

    def __exit__(self, *error: Any) -> None:
        if not self._in_main:
            return
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)
        self._watcher.join()
        os.close(self._reader)

    def install(self) -> None:
        """Set the handlers, again if someone else has set others meanwhile."""
        if self._in_main:
            for signum in STOPPING:
                signal.signal(signum, self._handle)

    def stop(self, signum: int) -> None:
        """Raise `Stopped`."""
        self._raised_at = time.monotonic()
        raise Stopped(signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._received_at < APART:
            return
        if self._raised_at is not None and self.received:
            os._exit(exit_code(signum))
        waits = self.deferred and not self.received
        if not self.received:
            self.received, self._received_at = signum, now
        if not waits:
            self.stop(signum)
        if self.notice:  # not print: this may interrupt another print
            os.write(2, self.notice.format(signal=signal.Signals(signum).name).encode())

    def _watch(self) -> None:
        """End the process if its main thread does not."""
        first, started, at_once, deadline = 0, 0.0, False, math.inf
        while True:
            signum = self._next(deadline)
            now = time.monotonic()
            if signum is None:
                return
            if signum:
                if not first:
                    first, started = signum, now
                at_once = at_once or not self.deferred or now - started >= APART
                deadline = now + REACTION if at_once else started + max(self.within, APART)
            elif self._raised_at is not None and now < self._raised_at + UNWINDING:
                deadline = self._raised_at + UNWINDING
            elif at_once:
                self._end(first)
            else:  # the safe point has not come; this arrives as a second signal
                deadline = math.inf
                signal.pthread_kill(threading.main_thread().ident or 0, first)

    def _next(self, deadline: float) -> int | None:
        """Wait for a signal and return it; 0 at the deadline, None when this context is left."""
        while True:
            seconds = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
            if not select.select([self._reader], [], [], seconds)[0]:
                return 0
            byte = os.read(self._reader, 1)
            if not byte:
                return None
            if byte[0] in STOPPING:
                return byte[0]

    def _end(self, signum: int) -> None:
        """End the process from the watching thread, after its last words."""
        if self.last_words is not None:
            words = threading.Thread(target=self.last_words, args=(Stopped(signum),), daemon=True)
            words.start()
            words.join(10.0)
        os._exit(exit_code(signum))
