"""Keep the policy that held-out problems speak best of, beside the last one."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bae.errors import UserError
from bae.evaluation.direction import low_is_good
from bae.training.policy import Policy

FOLDER = "policy_best"
"""The folder of a run that has the policy."""
RECORD = "best.json"
"""The file in it that says which step's it is."""


@dataclass(frozen=True)
class Record:
    """Tell after which step a policy was saved, and why.

    Attributes:
        metric: its full name, such as val/ece.
        step: steps that were done.
        value: of the metric.
    """

    metric: str
    step: int
    value: float

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.3f} after step {self.step}"


class Best:
    """Save the policy whenever a metric of held-out problems is better than it was after any earlier step.

    What is known of the best one is in its folder, so that the two cannot disagree, and a resumed run goes on with it.

    Args:
        policy: that is trained.
        folder: of the run.
        metric: its full name, such as val/ece.

    Raises:
        ValueError: for a metric of which it is not known whether low or high is good.
    """

    def __init__(self, policy: Policy, folder: Path, metric: str) -> None:
        self.policy, self.folder, self.metric = policy, folder, metric
        self.sign = 1 if low_is_good("callbacks.checkpoints.best", metric, metric.partition("/")[0]) else -1

    def see(self, held_out: Mapping[str, float], step: int, is_first: bool) -> None:
        """Save the policy if it is the best so far.

        Args:
            held_out: metrics that were measured after this step; empty if none were.
            step: steps that are done.
            is_first: whether this is the first rank, which alone saves.

        Raises:
            UserError: if the metric was not measured with the others.
        """
        if not held_out:
            return
        if self.metric not in held_out:
            names = ", ".join(sorted(held_out))
            raise UserError(
                f"callbacks.checkpoints.best={self.metric}: this run does not measure it; there are {names}"
            )
        if not is_first:
            return
        value, before = held_out[self.metric], best_of(self.folder)
        if before is not None and (before.metric != self.metric or before.step >= step):
            before = None  # of a step that a stopped run had done, and that is done anew
        if not math.isnan(value) and (before is None or self.sign * value < self.sign * before.value):
            record = json.dumps(asdict(Record(self.metric, step, value)))
            self.policy.save(self.folder / FOLDER, {RECORD: f"{record}\n"})


def best_of(folder: Path) -> Record | None:
    """Return what is known of the best policy of a run, None if it has none; folder: the run's."""
    file = folder / FOLDER / RECORD
    return Record(**json.loads(file.read_text())) if file.is_file() else None
