"""Files that are whole or absent: written beside and renamed, with checksums, and locked by one process.

This module imports nothing of the project.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

SUMS = "SHA256SUMS"
"""The file of a folder that has the checksums of the others, as `sha256sum -c` reads it."""
PARTIAL = ".partial"
"""The end of the name of a file or folder that is being written."""
FULL = (ENOSPC, EDQUOT, EFBIG)


class DiskFullError(OSError):
    """Say in one sentence that there was no room for a file."""


class DamagedError(ValueError):
    """Say in one sentence that a file is not what was written."""


@contextmanager
def atomically(target: Path) -> Iterator[BinaryIO]:
    """Give a file to write; it is at `target`, whole and on the disk, when the `with` body has ended.

    If the body raises, or the process dies, what was at `target` before is still there. Raises DiskFullError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _sync(target.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _check_room(error, target)
        raise


def write_atomically(target: Path, text: str) -> None:
    """Write a text file as `atomically` does."""
    with atomically(target) as file:
        file.write(text.encode())


@contextmanager
def folder_atomically(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill; it replaces `target`, with checksums, when the `with` body has ended.

    A body that knows the checksums writes them (`write_sums`). If it raises, what was at `target` before is still
    there. A process that dies between the two renames leaves no `target`, but never a part of one. Raises
    DiskFullError.
    """
    partial, before = target.with_name(target.name + PARTIAL), target.with_name(f"{target.name}.before{PARTIAL}")
    for left in (partial, before):
        remove(left)
    try:
        partial.mkdir(parents=True)
        yield partial
        if not (partial / SUMS).exists():
            write_sums(partial, checksums(partial, "*"))
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        if target.exists():
            os.replace(target, before)
        os.replace(partial, target)
        _sync(target.parent)
        shutil.rmtree(before, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        _check_room(error, target)
        raise


def checksums(folder: Path, pattern: str) -> dict[str, str]:
    """Return the checksums of a folder's files that match a pattern, by name."""
    return {str(path.relative_to(folder)): checksum(path) for path in sorted(folder.rglob(pattern)) if path.is_file()}


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the checksums of a folder's files beside them."""
    (folder / SUMS).write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(folder: Path) -> None:
    """Compare the files of a folder with its checksums. Without any, as in a folder made elsewhere, it is accepted.

    Raises:
        DamagedError: one sentence, if a file is missing or is not what was written.
    """
    if not (folder / SUMS).is_file():
        return
    for line in (folder / SUMS).read_text(errors="replace").splitlines():
        value, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or checksum(path) != value:
            raise DamagedError(
                f"{path}: not the file that was written ({SUMS} beside it tells); take another copy, or, if you "
                f"changed it yourself, delete {SUMS}"
            )


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. The system gives it back when this process ends, however that happens.

    Raises:
        ValueError: one sentence with the process and the host that hold it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(folder / "lock"), folder / "lock.holder"
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"{folder}: {_holder(holder)} works on this run; wait for it, or stop it first") from error
    try:
        write_atomically(holder, json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        with suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def _holder(path: Path) -> str:
    """Return in words who holds a lock."""
    try:
        held = json.loads(path.read_text())
        return f"process {held['process']} on {held['host']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock, and is about to write who it is
        return "another process"


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_room(error: BaseException | None, target: Path) -> None:
    """Raise DiskFullError if an error, or one that it came from, says that the disk or a quota is full."""
    first = error
    while error is not None:
        # safetensors is written in Rust, and tells the number in its text alone.
        told = isinstance(error, OSError) and error.errno in FULL
        if told or any(f"(os error {number})" in str(error) for number in FULL):
            raise DiskFullError(ENOSPC, f"there is no room for {target}") from first
        error = error.__cause__ or error.__context__
