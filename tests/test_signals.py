"""Processes that are signalled: at once, at a safe point, twice, and while they cannot react."""

import pickle
import signal
import subprocess
import sys
import time

import pytest

from bae.signals import Stopped, exit_code

BEGIN = """
import ctypes, signal, sys, time
from bae import signals
from bae.signals import Stopped, StopSignals
signals.APART, signals.REACTION = 0.2, 0.5
said = lambda stop: print("last words", flush=True)
"""
READY = "print('ready', flush=True)\n"


def stopped(body, *signums, pause=0.5):
    """Run a program, send it signals when it is ready; return its exit code, what it wrote, and the seconds it took."""
    process = subprocess.Popen([sys.executable, "-c", BEGIN + body], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        for signum in signums:
            process.send_signal(signum)
            time.sleep(pause)
        out, _ = process.communicate(timeout=60)
        return process.returncode, out, time.monotonic() - start
    finally:
        process.kill()


@pytest.mark.fault("signals")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_a_signal_stops_at_once_and_what_was_begun_is_cleaned_up(signum, code):
    body = f"with StopSignals():\n    try:\n        {READY}        time.sleep(60)\n    finally:\n        print('clean')"
    assert exit_code(signum) == code
    assert stopped(body, signum)[:2] == (code, "clean\n")


SAFE_POINTS = f"""
with StopSignals(within={{within}}, last_words=said) as signals:
    signals.deferred = True
    {READY}
    for step in range({{steps}}):
        {{work}}
        if signals.received:
            print("saved", flush=True)
            signals.stop(signals.received)
"""


@pytest.mark.fault("signals")
def test_the_first_signal_waits_for_the_safe_point():
    code, out, _ = stopped(SAFE_POINTS.format(within=60, steps=60, work="time.sleep(1)"), signal.SIGTERM)
    assert (code, out) == (143, "saved\n")


@pytest.mark.fault("signals")
def test_signals_that_come_together_are_one_request():
    body = SAFE_POINTS.format(within=60, steps=60, work="time.sleep(2)")
    code, out, _ = stopped(body, signal.SIGTERM, signal.SIGTERM, pause=0.01)
    assert (code, out) == (143, "saved\n")


@pytest.mark.fault("signals")
def test_a_second_signal_stops_at_once():
    body = SAFE_POINTS.format(within=60, steps=1, work="time.sleep(60)")
    code, out, seconds = stopped(body, signal.SIGTERM, signal.SIGINT)
    assert (code, out) == (130, "") and seconds < 30


@pytest.mark.fault("signals")
def test_a_safe_point_that_does_not_come_is_not_waited_for():
    body = SAFE_POINTS.format(within=1, steps=1, work="time.sleep(60)")
    code, out, seconds = stopped(body, signal.SIGTERM)
    assert (code, out) == (143, "") and seconds < 30


@pytest.mark.fault("signals")
@pytest.mark.parametrize("signums", [[signal.SIGTERM, signal.SIGTERM], [signal.SIGTERM]])
def test_code_outside_python_cannot_keep_the_process(signums):
    """A mutex that is locked twice waits for ever, and no handler of Python runs: so it is in a collective."""
    work = "mutex = ctypes.create_string_buffer(64); [ctypes.CDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]"
    body = SAFE_POINTS.format(within=1, steps=1, work=work)
    code, out, seconds = stopped(body, *signums)
    assert (code, out) == (143, "last words\n") and seconds < 30


@pytest.mark.fault("signals")
def test_a_second_signal_while_it_unwinds_ends_it():
    body = f"with StopSignals():\n    try:\n        {READY}        time.sleep(60)\n    finally:\n        time.sleep(60)"
    code, _, seconds = stopped(body, signal.SIGTERM, signal.SIGTERM)
    assert code == 143 and seconds < 30


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    from bae.signals import StopSignals

    with StopSignals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_it_travels_between_processes():
    """From a job of a sweep to the process that runs the sweep."""
    stop = Stopped(signal.SIGTERM)
    stop.message = "a sentence"
    again = pickle.loads(pickle.dumps(stop))
    assert (again.code, again.signum, again.message) == (143, signal.SIGTERM, "a sentence")
    assert not isinstance(again, Exception)
