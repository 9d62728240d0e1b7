"""The training step, in order: each callback does one thing to the batch. conf/callbacks/default.yaml lists them."""

from bae.callbacks.checkpoints import Checkpoints
from bae.callbacks.completions import CompletionTable
from bae.callbacks.entropy import AdaptiveEntropy
from bae.callbacks.evaluation import Evaluation
from bae.callbacks.fidelity import Fidelity
from bae.callbacks.held_out import HeldOut
from bae.callbacks.progress import ProgressBar
from bae.callbacks.telemetry import Telemetry
from bae.callbacks.writers import BlockwiseAdvantages, Rollouts

__all__ = [
    "AdaptiveEntropy",
    "BlockwiseAdvantages",
    "Checkpoints",
    "CompletionTable",
    "Evaluation",
    "Fidelity",
    "HeldOut",
    "ProgressBar",
    "Rollouts",
    "Telemetry",
]
