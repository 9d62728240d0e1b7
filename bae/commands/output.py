"""Go on where nobody reads the output any more."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)
"""What a write gives if the reader of a pipe has ended, and if a terminal was closed."""


class Output:
    """Pass on what is written to a stream, and nothing more once its reader is gone.

    So a run is not lost because `head` has seen enough, a `tee` was killed or a terminal was closed. Other errors, such
    as a full disk, are raised.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, and return its length."""
        with self._unless_gone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is held back."""
        with self._unless_gone():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """Send the stream to nowhere, what it holds back with it, if its reader is gone."""
        try:
            yield
        except OSError as error:
            if error.errno not in GONE:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """Let the readers of stdout and stderr leave while the `with` body goes on."""
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            setattr(sys, name, Output(stream))
            stack.callback(setattr, sys, name, stream)
            stack.callback(getattr(sys, name).flush)  # here, where it is caught, and not when the interpreter ends
        yield
