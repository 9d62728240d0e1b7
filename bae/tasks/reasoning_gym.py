"""Generate problems of logic, algorithms, arithmetic and games by the library reasoning-gym."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bae.batch import Problem
from bae.tasks.arithmetic import is_held_out
from bae.text.gym_verifier import GymVerifier, generator
from bae.text.verifier import Verifier

DRAWS = 200
"""The draws in which a problem for a split must be found."""


@dataclass(frozen=True)
class Draw:
    """Hold how many problems a split has, and whether it takes those that are kept from training."""

    size: int
    held_out: bool


class ReasoningGym:
    """Generate problems by several generators in turn: problem i of a split comes from generator i modulo their number.

    A problem is a function of the seed, the split and the index alone. No question is in both a split that is held out
    and one that is not. The columns of a problem are the generator's metadata.

    Args:
        splits: {split: {size, held_out}}.
        generators: {name of a generator: its options}; reasoning-gym has more than a hundred.
        seed: of the problems; not the run's, so that runs with other seeds have the same problems.
        threshold, timeout, memory_mb, workers: see GymVerifier.

    Raises:
        ValueError: one sentence, if the library is not installed, for a split that is not described so, for a generator
            that is not there or does not take its options; or as GymVerifier does.
    """

    def __init__(
        self,
        splits: Mapping[str, Mapping[str, Any]],
        generators: Mapping[str, Mapping[str, Any]],
        seed: int = 0,
        threshold: float = 1.0,
        timeout: float = 5.0,
        memory_mb: int = 2048,
        workers: int = 2,
    ) -> None:
        if not generators:
            raise ValueError("task.generators={}: there is none; name one, as in task.generators.chain_sum={}")
        self.splits = {name: _draw(name, given) for name, given in splits.items()}
        self.generators = {name: json.dumps(dict(options or {})) for name, options in generators.items()}
        self.seed = seed
        self.verifier: Verifier = GymVerifier(
            {name: dict(options or {}) for name, options in generators.items()}, threshold, timeout, memory_mb, workers
        )
        for name, options in self.generators.items():
            generator(name, options, 0)  # refuses what cannot work

    def size(self, split: str) -> int:
        """Return the number of problems in a split. Raises ValueError for an unknown split."""
        return self._split(split).size

    def problem(self, split: str, index: int) -> Problem:
        """Return problem number `index` of a split.

        Raises ValueError for an unknown split, and if the generator has too few different problems.
        """
        draw, names = self._split(split), list(self.generators)
        name, number = names[index % len(names)], index // len(names)
        # Generators add the number of a problem to their seed, so seeds must be far apart.
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{split}/{name}".encode()).digest()[:4]) >> 1
        made = generator(name, self.generators[name], seed)
        for at in range(number, number + DRAWS * draw.size, draw.size):
            entry = made[at]
            question = str(entry["question"])
            if is_held_out(question) == draw.held_out:
                columns = {"generator": name, **entry["metadata"]}
                return Problem(f"{split}/{index}", question, str(entry["answer"]), columns, f"{name}/{seed}/{at}")
        raise ValueError(
            f"task.generators.{name}: in {DRAWS} draws it made no problem for {split}, so it has few different ones; "
            "give it options for harder problems, or leave it out"
        )

    def _split(self, split: str) -> Draw:
        """Return what a split draws. Raises ValueError for an unknown one."""
        if split not in self.splits:
            raise ValueError(f"task reasoning_gym has no split {split!r}; it has {', '.join(self.splits)}")
        return self.splits[split]


def _draw(split: str, given: Mapping[str, Any]) -> Draw:
    """Make a Draw of what the configuration has. Raises ValueError."""
    size, held_out = given.get("size"), given.get("held_out")
    if set(given) != {"size", "held_out"} or type(size) is not int or size < 1 or type(held_out) is not bool:
        raise ValueError(f"task.splits.{split}={dict(given)}: must have size, 1 or more, and held_out, true or false")
    return Draw(size, held_out)
