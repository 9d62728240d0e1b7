"""What a process that computes is told before torch is loaded. Importing this does it."""

import ctypes
import os
import sys

# OpenMP's threads spin for as long as they like while they wait for each other. With another busy process on the same
# cores that made a step 40 times slower; with this bound 4 times, and alone no slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _keep_memory() -> None:
    """Let malloc keep what was freed. By default it gives large tensors back at once, and every new one is made of
    pages that the kernel has to clear: a fifth of an update's time on a CPU. Elsewhere than in glibc this does
    nothing."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


_keep_memory()
