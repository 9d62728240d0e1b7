"""Decide whether an answer is right by the scorers of the library reasoning-gym."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from bae.text.verdict import Verdict
from bae.text.workers import Pair, Pending, Workers, within_limits

Generators = Mapping[str, Mapping[str, Any]]
"""{name of a generator of reasoning-gym: its options}."""


class GymVerifier:
    """Score answers by the generators that made their problems, in processes that have limits of time and memory.

    Many problems have several right answers, so a reference is not one of them. It is the address of the problem,
    generator/seed/number, from which the problem is made again. A score is a number from 0 to 1. An answer is CORRECT
    if it has `threshold` or more, and WRONG otherwise. It is UNPARSEABLE if it is blank or too long, or if the scorer
    fails on it. Scores do not reach rewards: the library reads some answers as Python expressions, so nothing of them
    is done in the process that trains.

    Args:
        generators: that may have made the problems.
        threshold: the least score of a right answer.
        timeout, memory_mb, workers, max_chars: as in bae.text.verifier.MathVerifier.

    Raises:
        ValueError: for a threshold outside (0, 1], limits that are not above 0; from the methods, for a bad reference.
        RuntimeError: from the methods, if the workers break down three times in one call.
    """

    def __init__(
        self,
        generators: Generators,
        threshold: float = 1.0,
        timeout: float = 5.0,
        memory_mb: int = 2048,
        workers: int = 2,
        max_chars: int = 4000,
    ) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"task.threshold={threshold}: must be above 0, and 1 at most")
        self.generators = generators
        self._workers = Workers(import_library, timeout, memory_mb, workers, max_chars)
        self._check = partial(_check, {name: json.dumps(generators[name]) for name in generators}, threshold)

    def submit(self, pairs: Sequence[Pair]) -> Pending:
        """Begin to score (answer, reference) pairs, without waiting. Raises ValueError for a bad reference."""
        for _, reference in pairs:
            if why := self.fault(reference):
                raise ValueError(f"the reference {reference!r} is no address of a problem: {why}")
        return self._workers.submit(self._check, pairs)

    def verify(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Score (answer, reference) pairs, and wait for the verdicts. Raises ValueError for a bad reference."""
        return self.submit(pairs)()

    def equivalent(self, pairs: Sequence[Pair]) -> list[bool]:
        """Tell for each pair of answers whether they are the same text, but for white space around it."""
        return [one.strip() == other.strip() for one, other in pairs]

    def fault(self, reference: str) -> str | None:
        """Return why a text cannot be a reference; None if it can be one."""
        name, _, rest = reference.partition("/")
        if name not in self.generators:
            return f"there is no generator {name!r} in task.generators"
        numbers = rest.split("/")
        return None if len(numbers) == 2 and all(map(str.isdecimal, numbers)) else "it must be generator/seed/number"

    def close(self) -> None:
        """Stop the workers and drop their checks. A later call starts new ones."""
        self._workers.close()


def import_library() -> Any:
    """Return the library. Raises ValueError, one sentence, if it is not installed."""
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ValueError(
            "task: it needs a package; install it with make reasoning-gym, or with "
            "pip install 'blockwise-advantage[reasoning-gym]'"
        ) from error
    return reasoning_gym


@lru_cache(maxsize=256)
def generator(name: str, options: str, seed: int) -> Any:
    """Make a generator of problems; number i of it is generator[i].

    Args:
        name: of the library.
        options: of the generator, as JSON.
        seed: of its problems.

    Raises:
        ValueError: one sentence, if there is no such generator, or it does not take the options.
    """
    try:
        return import_library().create_dataset(name, seed=seed, **json.loads(options))
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "it refuses them"
        raise ValueError(f"task.generators.{name}={options}: {reason}") from error


def _check(generators: Mapping[str, str], threshold: float, answer: str, reference: str) -> Verdict:
    """Score one answer, in a worker. generators: {name: options as JSON}."""
    name, seed, number = reference.split("/")
    made = generator(name, generators[name], int(seed))
    entry = made[int(number)]
    try:
        score = made.score_answer(answer=answer.strip(), entry=entry)
    except MemoryError:
        return within_limits(Verdict.TIMEOUT)
    except Exception:  # the scorers raise what their parsers raise; hostile text must not end a run
        return within_limits(Verdict.UNPARSEABLE)
    return within_limits(Verdict.CORRECT if score >= threshold else Verdict.WRONG)
