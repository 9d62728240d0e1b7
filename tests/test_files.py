"""Files under faults: a writer that fails or is killed, a full disk, flipped bytes, a second process."""

import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from bae.files import (
    SUMS,
    DamagedError,
    DiskFullError,
    atomically,
    check_folder,
    folder_atomically,
    only_process,
    write_atomically,
)


@contextmanager
def no_file_above(size):
    """Let writing more than `size` bytes to a file raise OSError, as a full disk does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.fault("files")
def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "whole")
    with pytest.raises(RuntimeError), atomically(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "whole" and os.listdir(tmp_path) == ["file"]


@pytest.mark.fault("files")
def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "whole")
    with no_file_above(1000), pytest.raises(DiskFullError, match=r"no room for .*file"), atomically(path) as file:
        file.write(bytes(100_000))
    assert path.read_text() == "whole" and os.listdir(tmp_path) == ["file"]


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(OSError) as raised, atomically(tmp_path / "file"):
        raise OSError(errno.EIO, "input/output error")
    assert not isinstance(raised.value, DiskFullError)


@pytest.mark.fault("files")
def test_a_checkpoint_and_a_policy_meet_a_full_disk(tmp_path, tiny):
    """torch and safetensors write by C++ and Rust, each with its own way to tell."""
    from bae.callbacks.checkpoints import AtomicCheckpointIO

    with no_file_above(2000):
        with pytest.raises(DiskFullError):
            AtomicCheckpointIO().save_checkpoint(dict(tiny.model.state_dict()), tmp_path / "a" / "step_000001.ckpt")
        with pytest.raises(DiskFullError):
            tiny.save(tmp_path / "policy")
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == []


@pytest.mark.fault("files")
def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "policy"
    with folder_atomically(target) as partial:
        (partial / "old").write_text("1")
    with pytest.raises(RuntimeError), folder_atomically(target) as partial:
        (partial / "half").write_text("2")
        raise RuntimeError
    assert sorted(os.listdir(target)) == [SUMS, "old"] and os.listdir(tmp_path) == ["policy"]
    with folder_atomically(target) as partial:
        (partial / "new").write_text("3")
    assert sorted(os.listdir(target)) == [SUMS, "new"] and os.listdir(tmp_path) == ["policy"]


@pytest.mark.fault("damage")
def test_damage_in_a_folder_is_told(tmp_path):
    target = tmp_path / "policy"
    with folder_atomically(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "weights").write_bytes(bytes(1000))
    check_folder(target)
    subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=target, check=True)  # as the documentation says
    (target / "inner" / "weights").write_bytes(bytes(999) + b"\1")
    with pytest.raises(DamagedError, match="weights: not the file that was written"):
        check_folder(target)
    (target / "inner" / "weights").unlink()
    with pytest.raises(DamagedError, match="weights"):
        check_folder(target)
    (target / SUMS).unlink()  # a folder made elsewhere
    check_folder(target)


HOLD = """
import sys, time
from pathlib import Path
from bae.files import only_process
with only_process(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.mark.fault("lock")
def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} on {os.uname().nodename}"), only_process(tmp_path):
            pass
    finally:
        holder.kill()  # SIGKILL: it cleans up nothing
        holder.wait()
    with only_process(tmp_path):
        pass
    with only_process(tmp_path):  # and it can be given back
        pass
