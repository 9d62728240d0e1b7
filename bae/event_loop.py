"""Run coroutines beside training, all in one thread. They wait for others most of the time, so one is enough."""

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def start(coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
    """Start a coroutine in the background, and return its future. To cancel the future cancels the coroutine."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="event loop", daemon=True).start()
    return asyncio.run_coroutine_threadsafe(coroutine, _loop)


def _forget() -> None:
    """Let a forked process start a loop of its own, because threads are not copied."""
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
