"""How far a run is, on a terminal and without one."""

import io
import re
import sys
from types import SimpleNamespace

import pytest

from bae.callbacks import Progress


class Screen(io.StringIO):
    """A terminal of 80 columns that keeps what was written."""

    def isatty(self):
        return True


def show(steps, first=0, metrics=None, **options):
    """Run the callback over all steps of a run that begins at step `first`."""
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=first - 1))
    trainer = SimpleNamespace(
        fit_loop=loops, is_global_zero=True, progress_bar_metrics=metrics or {"ece": 0.0314, "accuracy": 0.4821},
        num_training_batches=steps, max_epochs=1, max_steps=-1,
    )  # fmt: skip
    progress = Progress(**options)
    progress.setup(trainer, None, "fit")
    progress.on_fit_start(trainer, None)
    progress.on_train_start(trainer, None)
    for step in range(first, steps):
        progress.on_train_batch_end(trainer, None, None, SimpleNamespace(step=step), step)
    progress.teardown(trainer, None, "fit")


def test_without_a_terminal_there_are_dated_lines(capsys):
    show(300, lines=20)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "\r" not in out and len(lines) == 21
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  step 0/300", lines[0])
    assert re.fullmatch(r"[-\d]+ [:\d]+  step 15/300  ECE 0.031, accuracy 0.482  left \d\d:\d\d", lines[1])
    assert "step 300/300" in lines[-1] and all(len(line) <= 80 for line in lines)


def test_a_short_run_has_a_line_for_each_step(capsys):
    show(3)
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "step 0/3", "step 1/3", "step 2/3", "step 3/3"
    ]  # fmt: skip


def test_the_bar_fits_80_columns(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    show(9999, first=9990)
    drawn = screen.getvalue().replace("\x1b[A", "").split("\r")
    last = drawn[-1].rstrip()
    assert last.startswith("step 9999/9999 |") and last.endswith("ECE 0.031, accuracy 0.482")
    assert max(map(len, drawn)) <= 80


def test_the_time_that_is_left_ignores_steps_of_an_earlier_process(capsys, monkeypatch):
    clock = iter([0.0, *range(10, 1000, 10)])
    monkeypatch.setattr("bae.callbacks.progress.time.monotonic", lambda: next(clock))
    show(12, first=8, lines=100)
    lines = capsys.readouterr().out.splitlines()
    assert "step 8/12" in lines[0] and "left 00:30" in lines[1] and "left 00:20" in lines[2]


def test_a_rank_that_is_not_the_first_shows_nothing(capsys):
    progress = Progress()
    progress.setup(SimpleNamespace(is_global_zero=False), None, "fit")
    progress.on_train_batch_end(SimpleNamespace(progress_bar_metrics={}), None, None, SimpleNamespace(step=0), 0)
    assert capsys.readouterr().out == ""


def test_no_lines_are_refused():
    with pytest.raises(ValueError, match=r"callbacks.progress.lines=0: must be 1 or more"):
        Progress(lines=0)
