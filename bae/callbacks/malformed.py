"""A warning if the policy does not keep to the format when training begins."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from bae.batch import RolloutBatch
from bae.callbacks.collectives import gather
from bae.text.visible import quoted

ALMOST_ALL = 0.95
"""The share of malformed completions from which on the warning comes."""


class MalformedStart(L.Callback):
    """Warn, with one completion, if almost all completions of a run's first step are malformed.

    Such a policy has next to nothing to learn from. It needs only the rollouts, so it may stand anywhere after
    Rollouts. A batch of demonstrations has none, and is passed over.
    """

    def __init__(self) -> None:
        self.is_first = True

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: RolloutBatch, batch_idx: int) -> None:
        if not self.is_first or batch.scored is None:
            return
        self.is_first = False
        malformed = batch.scored.malformed.any(1)
        share = gather(trainer, malformed).double().mean().item()
        if share < ALMOST_ALL:
            return
        texts = [c.text for c, bad in zip(batch.scored.completions, malformed.tolist(), strict=True) if bad]
        shown = f"; one of them: {quoted(texts[0])}" if texts else ""
        rank_zero_warn(
            f"{share:.0%} of the completions of step {batch.step + 1} are malformed, so there is little to learn from: "
            "the model does not know the format of these objectives (bae-warmstart teaches it), or "
            f"max_new_tokens cuts it off{shown}"
        )
