"""Decide whether a program is right, by what it prints for given inputs. The program is hostile text, and it is run.

It runs in a process of its own that sees no file of this machine but Python's and no network (bubblewrap), has limits
of time, memory and output, and is never told what is expected: its output is compared here. So it cannot read the
expected output, redefine what equality means, or leave early with success.
"""

import ast
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import regex

from bae.errors import UserError
from bae.text.direct import check_reference
from bae.text.verdict import Verdict
from bae.text.workers import Pair, Pending, Workers, within_limits

Sandbox = Literal["bubblewrap", "none"]

RUNNER = """
import resource, sys
for name, most in (("RLIMIT_AS", {memory}), ("RLIMIT_FSIZE", {output}), ("RLIMIT_NOFILE", 64), ("RLIMIT_CORE", 0)):
    resource.setrlimit(getattr(resource, name), (most, most))
source = open({file!r}, encoding="utf-8").read()
names = {{"__name__": "__main__"}}
call = {call!r}
if call is None:
    exec(compile(source, "answer", "exec"), names)
else:
    names["__name__"], out, sys.stdout = "answer", sys.stdout, open("/dev/null", "w")
    exec(compile(source, "answer", "exec"), names)
    out.write(repr(eval(call, names)))
    out.flush()
"""
"""What runs a program, in the sandbox."""
FENCE = regex.compile(r"\s*```(?:python|py)?[ \t]*\n(?P<code>.*?)\n?```\s*", regex.S)


class Limits(NamedTuple):
    """Hold how a program is run.

    Args:
        sandbox: what keeps it from the rest of the machine.
        timeout: the most seconds for all tests of one program.
        memory_mb: the most address space, in MiB.
        output_kb: the most output of one test, in KiB.
    """

    sandbox: Sandbox
    timeout: float
    memory_mb: int
    output_kb: int


class ProgramVerifier:
    r"""Run Python programs in worker processes, and compare what they print with what is expected.

    A reference is a JSON list of tests, all of which must hold. `{"stdin": "3\n", "output": "9\n"}` runs the program
    with this input, and `{"call": "square(3)", "output": "9"}` calls a function of it and takes the repr of its value.
    White space at ends of lines and of the output does not matter; values that are Python literals are compared as
    such. An answer may stand in a Markdown fence.

    An answer that is no Python is UNPARSEABLE; one that takes too long is TIMEOUT; one that ends with an error, or with
    other output, is WRONG.

    Args:
        sandbox: `bubblewrap` (its command is bwrap), or `none`, where programs can read and change whatever you can.
        timeout: the most seconds for all tests of one program.
        memory_mb: the most memory of a program, in MiB.
        output_kb: the most output of one test, in KiB.
        workers: the number of programs that run at a time.
        max_chars: the most characters of a program.

    Raises:
        ValueError: for an option that cannot work; from the methods, for a reference that is no such list.
        UserError: if bubblewrap is asked for, and does not work here.
    """

    def __init__(
        self,
        sandbox: Sandbox = "bubblewrap",
        timeout: float = 10.0,
        memory_mb: int = 512,
        output_kb: int = 1024,
        workers: int = 2,
        max_chars: int = 10_000,
    ) -> None:
        if sandbox not in get_args(Sandbox):
            raise ValueError(f"verifier.sandbox={sandbox}: there are {', '.join(get_args(Sandbox))}")
        if output_kb < 1:
            raise ValueError(f"verifier.output_kb={output_kb}: must be 1 or more")
        self.limits = Limits(sandbox, timeout, memory_mb, output_kb)
        if sandbox == "bubblewrap":
            _check_bubblewrap()
        # The worker sees to the timeout itself. It is killed only if that fails.
        self._workers = Workers(_nothing, timeout + 10, 4 * memory_mb, workers, max_chars)

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        """Begin to run (program, tests) pairs, without waiting. Raises ValueError for a bad reference."""
        for reference in {reference for _, reference in pairs}:
            check_reference(self, reference)
        return self._workers.submit(partial(_check, self.limits), pairs)

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Run (program, tests) pairs, and wait for the verdicts. Raises ValueError for a bad reference."""
        return self.submit(pairs)()

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        """Tell for each pair of programs whether they are the same text. What they do is not compared."""
        return [_code(one) == _code(other) for one, other in pairs]

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it can be one."""
        try:
            tests = json.loads(reference)
        except ValueError:
            return "it is no JSON"
        if not isinstance(tests, list) or not tests:
            return "it is no list of tests"
        for test in tests:
            keys = set(test) if isinstance(test, Mapping) else set()
            if keys not in ({"stdin", "output"}, {"call", "output"}) or not all(isinstance(test[k], str) for k in keys):
                return "a test must have texts `output` and either `stdin` or `call`, and nothing else"
        return None

    def close(self) -> None:
        """Stop the workers, and the programs that run. A later call starts new ones."""
        self._workers.close()


def _nothing() -> None:
    """Prepare nothing in a worker."""


def _code(answer: str) -> str:
    """Return a program without the Markdown fence around it."""
    fenced = FENCE.fullmatch(answer)
    return fenced["code"] if fenced else answer.strip()


def _check(limits: Limits, answer: str, reference: str) -> Verdict:
    """Run one program on its tests, in a worker, until the first that fails."""
    code, end = _code(answer), time.monotonic() + limits.timeout
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Verdict.UNPARSEABLE
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "answer.py").write_text(code, encoding="utf-8")
        for test in json.loads(reference):
            try:
                printed = _run(limits, folder, test, end - time.monotonic())
            except subprocess.TimeoutExpired:
                return Verdict.TIMEOUT
            if printed is None or not _same(printed, test["output"], literal="call" in test):
                return within_limits(Verdict.WRONG)
    return within_limits(Verdict.CORRECT)


def _run(limits: Limits, folder: str, test: Mapping[str, str], seconds: float) -> str | None:
    """Return what a program prints in one test; None if it ends with an error. Raises TimeoutExpired."""
    place = "/box" if limits.sandbox == "bubblewrap" else folder
    runner = RUNNER.format(
        memory=limits.memory_mb << 20, output=limits.output_kb << 10, file=f"{place}/answer.py", call=test.get("call")
    )
    inner = [_interpreter(), "-I", "-S", "-B", "-c", runner]
    command = [*_bubblewrap(folder), *inner] if limits.sandbox == "bubblewrap" else inner
    with tempfile.TemporaryFile() as printed:
        done = subprocess.run(
            command,
            input=test.get("stdin", "").encode(),
            stdout=printed,
            stderr=subprocess.DEVNULL,
            timeout=max(seconds, 0.01),
            env={},
            cwd=folder,
            check=False,
        )
        printed.seek(0)
        return printed.read().decode(errors="replace") if done.returncode == 0 else None


def _interpreter() -> str:
    """Return the Python that runs programs, without the packages of this environment."""
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def _bubblewrap(folder: str) -> list[str]:
    """Return the command before a command: it sees Python and `folder`, as /box, and has no network."""
    seen = ["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix]
    reads = [part for path in dict.fromkeys(seen) for part in ("--ro-bind-try", path, path)]
    command = shutil.which("bwrap") or "bwrap"
    own = ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--ro-bind", folder, "/box", "--chdir", "/tmp"]
    return [command, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", *reads, *own, "--"]


def _check_bubblewrap() -> None:
    """Refuse a machine on which bubblewrap does not work. Raises UserError."""
    if shutil.which("bwrap") is None:
        said = "its command bwrap is not installed"
    else:
        tried = subprocess.run([*_bubblewrap("/usr"), "/bin/true"], capture_output=True, text=True, check=False)
        if tried.returncode == 0:
            return
        said = " ".join(tried.stderr.split())[:200]
    raise UserError(
        f"verifier.sandbox=bubblewrap: it does not work here ({said}); install bubblewrap, or set "
        "verifier.sandbox=none where programs may do whatever you may, as in a container of their own"
    )


def _same(printed: str, expected: str, literal: bool) -> bool:
    """Compare outputs; literal: whether both may be Python literals."""
    ours, theirs = ([line.rstrip() for line in text.strip().split("\n")] for text in (printed, expected))
    if ours == theirs or not literal:
        return ours == theirs
    value, other = _value(printed), _value(expected)
    return value is not None and type(value) is type(other) and value == other


def _value(text: str) -> Any:
    """Return the value of a Python literal, or None."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
