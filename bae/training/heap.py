"""Measure the memory of this process, and keep its heap from falling apart. Elsewhere than on Linux much is left out.

bae.commands.process_setup lets malloc keep what was freed. But every step has tensors of other sizes, and small things
that stay lie between them, such as what oneDNN keeps for each shape. So freed pieces do not grow together again, new
tensors need new pages, and the process grows from step to step.
"""

import ctypes
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

GROWTH = 1.1
"""The memory that the process may have, as a multiple of what steps took when the heap was tidy."""
CALLS = 4
"""Calls of `Heap.tidy` that measure what steps take: more than there are in one step."""
PROCESS = Path("/proc/self")


class Heap:
    """Give freed memory back to the system when the process has become larger than its steps need.

    Afterwards the kernel has to clear the pages of one step again. So this is done only when it frees something.
    """

    def __init__(self) -> None:
        self._taken: list[int] = []  # bytes of the process at the calls since the heap was tidy

    def tidy(self) -> bool:
        """Give freed memory back if that is due, and return whether it was. Call it at the same place in every step."""
        now = resident()
        if now and len(self._taken) == CALLS and now > GROWTH * max(self._taken):
            _trim()
            self._taken.clear()
            return True
        if len(self._taken) < CALLS:
            self._taken.append(now)
        return False


def resident() -> int:
    """Return the bytes of memory that this process has now; 0 where that is not known."""
    if not sys.platform.startswith("linux"):
        return 0
    return int((PROCESS / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def most_since_last(device: torch.device) -> int:
    """Return the most bytes in use since this was last asked: of tensors on a GPU, else of the whole process.

    Where the kernel does not let the mark be taken down, it is the most since the process began. It is 0 where nothing
    is known.
    """
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text())
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
    return int(found[1]) * 1024 if found else 0


def _trim() -> None:
    """Give back the pages that hold nothing. Elsewhere than in glibc this does nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
