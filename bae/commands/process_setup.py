"""Settings of a process that computes. `prepare` makes them; it must run before torch and MLflow are loaded."""

import ctypes
import logging
import os
import sys
from pathlib import Path

ENVIRONMENT = {
    # OpenMP's threads spin for as long as they like while they wait for each other. With another busy process on the
    # same cores that made a step 40 times slower; with this bound it is 4 times slower, and alone no slower.
    "GOMP_SPINCOUNT": "10000",
    # MLflow reports its use to its makers unless told not to.
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # What waits for a server, as bae-report does, gives one up that never answers after three attempts of a minute.
    # MLflow's own values are eight of two minutes. What a run logs is sent again and again anyway.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}

NOISY = ("torchao", "torch.utils._pytree")
"""Loggers that warn, whenever transformers imports torchao, of kernels for other machines and of torchao's own code."""


def program() -> str:
    """Return the name of this command, with which its messages begin."""
    return Path(sys.argv[0]).name


def prepare() -> None:
    """Set the environment, as far as the user has not, and let malloc keep what was freed."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    _keep_memory()


def _keep_memory() -> None:
    """Let malloc keep what was freed. Elsewhere than in glibc this does nothing.

    By default malloc gives large tensors back at once, and every new one is made of pages that the kernel has to clear:
    a fifth of an update's time on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # of malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
