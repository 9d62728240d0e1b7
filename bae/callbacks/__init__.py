"""The training step, in order, and what measures it: each callback does one thing to the batch.

This room imports the rooms up to `bae.fidelity`. Start with writers.py, which holds the two callbacks that write on the
batch before the training step reads it. conf/callbacks/default.yaml lists all callbacks in order.
"""

from bae.callbacks.block_telemetry import BlockTelemetry
from bae.callbacks.checkpoints import Checkpoints
from bae.callbacks.collapse import ConfidenceCollapse
from bae.callbacks.completion_page import CompletionPage
from bae.callbacks.completions import CompletionTable
from bae.callbacks.demonstrations import OwnDemonstrations, WarmStartTelemetry, WrittenDemonstrations
from bae.callbacks.dynamic_sampling import DynamicSampling
from bae.callbacks.entropy import AdaptiveEntropy
from bae.callbacks.evaluation import Evaluation
from bae.callbacks.fidelity import Fidelity
from bae.callbacks.held_out import HeldOut
from bae.callbacks.interference import Interference
from bae.callbacks.own_fidelity import OwnFidelity
from bae.callbacks.pictures import Pictures
from bae.callbacks.progress import Progress
from bae.callbacks.skipped_steps import SkippedSteps
from bae.callbacks.telemetry import Telemetry
from bae.callbacks.throughput import Throughput
from bae.callbacks.writers import BlockwiseAdvantages, Rollouts

__all__ = [
    "AdaptiveEntropy",
    "BlockTelemetry",
    "BlockwiseAdvantages",
    "Checkpoints",
    "CompletionPage",
    "CompletionTable",
    "ConfidenceCollapse",
    "DynamicSampling",
    "Evaluation",
    "Fidelity",
    "HeldOut",
    "Interference",
    "OwnDemonstrations",
    "OwnFidelity",
    "Pictures",
    "Progress",
    "Rollouts",
    "SkippedSteps",
    "Telemetry",
    "Throughput",
    "WarmStartTelemetry",
    "WrittenDemonstrations",
]
