"""A run whose output nobody reads any more goes on."""

import errno
import io
import subprocess
import sys

import pytest

from bae.commands.output import Output, readers_may_leave
from tests.support import ROOT

SHORT = [
    "steps=3", "group_size=4", "prompts_per_step=4", "callbacks.held_out.prompts=4", "callbacks.held_out.samples=2",
    "callbacks.checkpoints.log_policy=false",
]  # fmt: skip


def unread(command, *arguments):
    """Run a command whose output is closed at once; returns its exit code and what it said on stderr."""
    code = f"from bae.commands.{command} import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        process.stdout.close()
        said = process.stderr.read()
    return process.returncode, said


def test_a_help_that_is_read_in_part_gives_no_traceback():
    assert unread("score", "--help") == (0, "")


def test_a_run_trains_to_its_end(tmp_path):
    outputs = tmp_path / "outputs"
    code, said = unread("train", f"outputs={outputs}", *SHORT)
    assert code == 0 and "Traceback" not in said
    assert list(outputs.glob("runs/*/policy/model.safetensors"))


class Failing(io.StringIO):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def write(self, text):
        raise OSError(self.number, "no")


def test_a_full_disk_is_no_reader_that_left():
    with pytest.raises(OSError, match="no"):
        Output(Failing(errno.ENOSPC)).write("a table that somebody waits for")


def test_streams_are_put_back_and_are_what_they_were(capsys):
    before = sys.stdout, sys.stderr
    with readers_may_leave():
        assert sys.stdout.isatty() == before[0].isatty() and sys.stdout.encoding == before[0].encoding
        print("seen")
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "seen\n"
