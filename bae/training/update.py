"""The update: from a batch that has advantages to optimiser steps. Plain PyTorch.

`Update.step` is the second half of the algorithm; the first half, which writes the advantages, is in
bae/callbacks/writers.py. Groups stay whole for the baseline, and micro-batches are small for memory, so the two cuts of
a batch differ. bae/training/stepper.py has what this update shares with others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bae.batch import Advantages, ForwardResult, RolloutBatch, SampledTokens
from bae.method import losses
from bae.method.advantages import spread_over_tokens
from bae.method.losses import Aggregation, block_mean, blockwise_clipped_loss, importance, is_clipped, mismatch
from bae.text.blocks import Block
from bae.training.attention import is_shared
from bae.training.causal_lm import CausalLM
from bae.training.forward import completion_pass, flat_gradient
from bae.training.options import UpdateOptions
from bae.training.packing import passes
from bae.training.reference import Reference
from bae.training.sharding import is_sharded
from bae.training.sketch import count_sketch
from bae.training.stepper import Loop, MakeOptimizer, Stepper


@dataclass(frozen=True)
class UpdateInputs:
    """Hold what the optimiser steps of one rollout batch share.

    Attributes:
        samples: N completions.
        block_of: (N, T) long, the block of each token.
        weights: (N, T), the token weights of the aggregation.
        token_advantages: (N, T), without what refinements add.
        advantages: of the N completions.
        applied: (N, J), the advantages that were really applied; the steps fill it in.
        old_log_p: (N, T), log-probabilities from before the first step. None if they are those of the policy as it is.
        reference_log_p: (N, T), those of the reference; None if the loss has no divergence from it.
        entropy_coef: the coefficient of the entropy bonus.
    """

    samples: SampledTokens
    block_of: Tensor
    weights: Tensor
    token_advantages: Tensor
    advantages: Advantages
    applied: Tensor
    old_log_p: Tensor | None
    reference_log_p: Tensor | None
    entropy_coef: float


class Update:
    """Train a policy on batches that were rolled out and have advantages.

    Args:
        model: the policy. What is trained is `stepper.model`.
        blocks: the blocks of the format, for their weights in the loss.
        temperature: of sampling. The loss sees the same distribution that was sampled from.
        options: how a batch becomes optimiser steps.
        aggregation: how the tokens of a batch are weighted.
        loop: what the loop around the update provides.

    Attributes:
        stepper: has the optimiser.
    """

    def __init__(
        self,
        model: CausalLM,
        blocks: Iterable[Block],
        temperature: float,
        options: UpdateOptions,
        aggregation: Aggregation = block_mean,
        loop: Loop | None = None,
    ) -> None:
        self.model = model
        self.block_weights = torch.tensor([block.weight for block in blocks])
        self.temperature = temperature
        self.options = options
        self.clips = options.clip, options.clip if options.clip_high is None else options.clip_high
        self.aggregation = aggregation
        self.reference = Reference(model) if options.kl_coef else None
        self.estimate_kl = getattr(losses, options.kl_estimator)
        self.stepper = Stepper(model, options, loop)

    def configure(self, make_optimizer: MakeOptimizer, steps: int) -> None:
        """Make the optimiser and its learning-rate schedule; steps: rollout batches of the whole run."""
        self.stepper.configure(make_optimizer, steps * self.options.optimizer_steps)

    def step(self, batch: RolloutBatch) -> None:
        """Train on a batch.

        Writes into `batch.metrics` the means over optimiser steps of entropy (nats a token), clip_fraction, and what
        `Stepper.step` returns; if the loss has the divergence from the reference, of kl (nats a token); and, if the
        engine reports with what probability it drew each token, of mismatch_kl, mismatch_max and mismatch_capped. If a
        baseline has a refinement, it writes the advantages that were really applied.
        """
        samples, _ = batch.require_rollouts()
        with batch.timed("update"):
            count = self.options.optimizer_steps
            # Each mini-batch has parts of every group, however many ranks share them.
            minis = [
                self.stepper.micro_batches(samples, torch.arange(i, len(samples.ended), count)) for i in range(count)
            ]
            # Later mini-batches are off-policy, so they need the log-probabilities from before the first step.
            old_log_p = self._log_probs(self.stepper.model, samples, minis) if count > 1 else None
            inputs = self._inputs(batch, old_log_p, self._reference_log_probs(samples, minis))
            for mini in minis:
                for name, value in self._optimizer_step(inputs, mini).items():
                    batch.metrics[name] = batch.metrics.get(name, 0.0) + value / len(minis)
            batch.advantages = _as_applied(inputs)

    def block_gradients(self, batch: RolloutBatch, rows: Tensor, size: int) -> Tensor:
        """Return what each block's tokens among the completions `rows` add to the gradient of the loss.

        The gradients are those of the policy as it is, without the entropy bonus and the divergence from a reference.
        `grad` of the weights is left alone. All ranks must call it, because the aggregation may need their tokens.

        Args:
            batch: a batch that has advantages.
            rows: (R,) long, of this rank.
            size: numbers that each gradient is sketched to (bae.training.sketch); 0 for the flat gradients themselves.

        Returns:
            (K, size).
        """
        inputs = self._inputs(batch, old_log_p=None)
        found: list[Any] = [0.0] * len(self.block_weights)
        for part in self.stepper.micro_batches(inputs.samples, rows):
            forward = completion_pass(self.model, inputs.samples, part, self.temperature)
            block_of, weight = (self._columns(x, part, forward.log_p) for x in (inputs.block_of, inputs.weights))
            for k in range(len(found)):
                loss, _, _ = self._surrogate_loss(inputs, part, forward, weight * (block_of == k))
                gradient = flat_gradient(loss, self.model)
                found[k] += (count_sketch(gradient, size) if size else gradient).cpu()  # a sketch is linear
        return torch.stack(found)

    def _inputs(
        self, batch: RolloutBatch, old_log_p: Tensor | None, reference_log_p: Tensor | None = None
    ) -> UpdateInputs:
        samples, scored = batch.require_rollouts()
        advantages = batch.require_advantages()
        counts = torch.stack([(scored.block_of == k).sum() for k in range(len(self.block_weights))])
        tokens = self.stepper.loop.over_ranks(counts).to(self.block_weights)
        return UpdateInputs(
            samples=samples,
            block_of=scored.block_of,
            weights=self.aggregation(scored.block_of, self.block_weights, tokens),
            token_advantages=spread_over_tokens(advantages.per_block, scored.block_of),
            advantages=advantages,
            applied=advantages.per_objective.clone(),
            old_log_p=old_log_p,
            reference_log_p=reference_log_p,
            entropy_coef=batch.entropy_coef,
        )

    def _optimizer_step(self, inputs: UpdateInputs, parts: Sequence[Tensor]) -> dict[str, float]:
        """Take one optimiser step on the completions of the micro-batches `parts`, and measure it."""
        mini = torch.cat(list(parts))
        share = len(inputs.weights) / len(mini)  # the token weights are those of the whole batch
        # DDP takes the mean over ranks, so each divides by the tokens that a rank has on average.
        tokens = float(self.stepper.loop.over_ranks(inputs.samples.completion_mask[mini].sum()))
        sums, total, furthest, divergence = torch.zeros(4), torch.zeros(()), torch.zeros(()), torch.zeros(())
        model = self.stepper.model
        for part, *prompts in passes(model, inputs.samples, parts, self._prefetches()):
            forward = completion_pass(model, inputs.samples, part, self.temperature, *prompts)
            mask, weight = (
                self._columns(x, part, forward.log_p) for x in (inputs.samples.completion_mask, inputs.weights)
            )
            loss, advantage, old_log_p = self._surrogate_loss(inputs, part, forward, weight, record=True)
            loss = share * loss - inputs.entropy_coef * (forward.entropy * mask).sum() / tokens
            if inputs.reference_log_p is not None:
                reference_log_p = self._columns(inputs.reference_log_p, part, forward.log_p)
                kl = self.estimate_kl(forward.log_p, reference_log_p)
                loss = loss + share * self.options.kl_coef * (weight * kl).sum()
                divergence += (kl.detach() * mask).sum().cpu()
            with self.stepper.loop.gradients_travel(part is parts[-1]):
                self.stepper.loop.backward(loss)
            clipped = is_clipped(forward.log_p.detach(), old_log_p, advantage, *self.clips) & mask
            sampled_log_p = self._sampled_log_p(inputs, part, old_log_p)
            off, capped, most = mismatch(old_log_p, sampled_log_p, mask, self.options.importance_cap)
            sums += torch.stack([(forward.entropy.detach() * mask).sum(), clipped.sum(), off, capped]).cpu()
            total += loss.detach().cpu()
            furthest = torch.maximum(furthest, most.cpu())
        metrics = self.stepper.step(float(total))
        means = (self.stepper.loop.over_ranks(sums) / tokens).tolist()
        metrics |= {"entropy": means[0], "clip_fraction": means[1]}
        if inputs.reference_log_p is not None:
            metrics["kl"] = float(self.stepper.loop.over_ranks(divergence) / tokens)
        if inputs.samples.log_probs is not None:
            furthest = self.stepper.loop.over_ranks(furthest, "max")
            metrics |= {"mismatch_kl": means[2], "mismatch_capped": means[3], "mismatch_max": float(furthest)}
        return metrics

    def _surrogate_loss(
        self, inputs: UpdateInputs, part: Tensor, forward: ForwardResult, weight: Tensor, record: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of a micro-batch, and the advantages and old log-probabilities that went into it.

        part: (B,) long, its completions. weight: (B, T'), of the tokens. record: whether the advantages are noted as
        applied. Returns a scalar and two of (B, T').
        """
        log_p = forward.log_p
        advantage, block_of = (self._columns(x, part, log_p) for x in (inputs.token_advantages, inputs.block_of))
        old_log_p = log_p.detach() if inputs.old_log_p is None else self._columns(inputs.old_log_p, part, log_p)
        loss = torch.zeros((), device=log_p.device)
        for refinement in inputs.advantages.refinements:
            j = refinement.objective
            change, gain = refinement.apply(forward, part, weight)
            factor = inputs.advantages.weights[j]
            advantage, loss = advantage + factor * change, loss - factor * gain
            if record:
                in_block = block_of == inputs.advantages.block_of_objective[j]
                inputs.applied[part, j] += (change.sum(1) / in_block.sum(1).clamp(min=1)).cpu()
        cap = self.options.importance_cap
        if cap is not None:
            weight = weight * importance(old_log_p, self._sampled_log_p(inputs, part, old_log_p), cap)
        loss = loss + blockwise_clipped_loss(log_p, old_log_p, advantage, weight, *self.clips)
        return loss, advantage, old_log_p

    def _sampled_log_p(self, inputs: UpdateInputs, part: Tensor, old_log_p: Tensor) -> Tensor:
        """Return (B, T'): the engine's log-probabilities; the policy's own if the engine does not report them."""
        reported = inputs.samples.log_probs
        return old_log_p if reported is None else self._columns(reported, part, old_log_p)

    def _columns(self, x: Tensor, part: Tensor, like: Tensor) -> Tensor:
        """Return (B, T'): the rows `part` of (N, T), as wide as `like` and on its device."""
        return x[part, : like.shape[1]].to(like.device)

    def _reference_log_probs(self, samples: SampledTokens, minis: Sequence[Sequence[Tensor]]) -> Tensor | None:
        """Return (N, T), of the reference; None if the loss has no divergence from it."""
        if self.reference is None:
            return None
        with self.reference.model() as model:
            return self._log_probs(model, samples, minis)

    @torch.no_grad()
    def _log_probs(self, model: CausalLM, samples: SampledTokens, minis: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return (N, T), in the same micro-batches as the update, so that the first ratio is exactly 1."""
        out = torch.zeros(samples.completion_ids.shape)
        for parts in minis:
            for part, *prompts in passes(model, samples, parts, self._prefetches()):
                log_p = completion_pass(model, samples, part, self.temperature, *prompts).log_p
                out[part, : log_p.shape[1]] = log_p.cpu()
        return out

    def _prefetches(self) -> bool:
        """Tell whether a prompt is encoded ahead for its micro-batches; a rank with shards cannot take a pass alone."""
        return is_shared(self.model) and not is_sharded(self.stepper.model)


def _as_applied(inputs: UpdateInputs) -> Advantages:
    """Return the advantages as they were applied; the same where no baseline has a refinement."""
    given = inputs.advantages
    per_block = given.per_block.clone()
    for j in {refinement.objective for refinement in given.refinements}:
        change = inputs.applied[:, j] - given.per_objective[:, j]
        per_block[:, given.block_of_objective[j]] += given.weights[j] * change
    return replace(given, per_objective=inputs.applied, per_block=per_block)
