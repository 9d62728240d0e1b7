"""The Lightning module around the policy: one training step turns a weighed batch into optimiser steps."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from bae.batch import NumberAdvantages, RolloutBatch, SampledTokens
from bae.method.advantages import spread_over_tokens
from bae.method.losses import Aggregation, block_mean, blockwise_clipped_loss, importance, is_clipped, mismatch
from bae.method.stated_numbers import all_action, candidate_log_probs, expected, token_advantages
from bae.text.blocks import Block
from bae.training.attention import is_shared
from bae.training.forward import ForwardResult, completion_pass, flat_gradient
from bae.training.packing import micro_batches, passes
from bae.training.policy import Policy
from bae.training.sketch import count_sketch

SHARDED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
Optimizer = Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]


def lr_share(step: int, total: int, warmup: int, final: float) -> float:
    """Share of the learning rate at optimiser step `step` (from 0) of `total`: up to 1 over `warmup` steps, then
    linearly down to `final` at the last."""
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - final) * min(1.0, (step + 1 - warmup) / max(1, total - warmup))


@dataclass(frozen=True)
class UpdateInputs:
    """What the optimiser steps of one rollout batch share. block_of, weights, advantages: (N, T). old: (N, T) log-
    probabilities from before the first step, None where they are those of the policy as it is."""

    samples: SampledTokens
    block_of: Tensor
    weights: Tensor
    advantages: Tensor
    numbers: Sequence[NumberAdvantages]
    old: Tensor | None
    entropy_coef: float


class PolicyModule(L.LightningModule):
    """Trains `policy` on batches that callbacks have rolled out and weighed.

    Optimisation is manual: groups stay whole for the baseline, micro-batches are small for memory.

    optimizer: parameters -> optimiser (a partial).
    steps: rollout batches of the whole run.
    warmup_steps: optimiser steps over which the learning rate rises linearly from 0.
    final_lr: what is left of it, as a share, at the last step; it falls linearly after the warm-up.
    clip: epsilon of the clipped surrogate. clip_high: the same for ratios above 1, None for `clip`.
    max_grad_norm: clipping by global norm.
    temperature: of sampling; the loss sees the same distribution that was sampled from.
    micro_batch_tokens: tokens in one forward and backward pass, a prompt counting once for the completions that share
    it.
    optimizer_steps: mini-batches, one optimiser step each, that a rollout batch is cut into.
    aggregation: how tokens are weighed.
    importance_cap: tokens count by how much likelier they are to the policy than to the sampler, up to this; None for
        all alike. See bae.method.losses.importance.
    """

    def __init__(
        self,
        policy: Policy,
        blocks: Iterable[Block],
        optimizer: Optimizer,
        steps: int,
        warmup_steps: int,
        clip: float,
        max_grad_norm: float,
        temperature: float,
        micro_batch_tokens: int,
        optimizer_steps: int = 1,
        final_lr: float = 1.0,
        clip_high: float | None = None,
        aggregation: Aggregation = block_mean,
        importance_cap: float | None = None,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.model = policy.model
        self.block_weights = torch.tensor([block.weight for block in blocks])
        self.optimizer = optimizer
        self.steps = steps
        self.warmup_steps = warmup_steps
        self.clip = clip
        self.clip_high = clip if clip_high is None else clip_high
        self.max_grad_norm = max_grad_norm
        self.temperature = temperature
        self.micro_batch_tokens = micro_batch_tokens
        self.optimizer_steps = optimizer_steps
        self.final_lr = final_lr
        self.aggregation = aggregation
        self.importance_cap = importance_cap

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        total = self.steps * self.optimizer_steps
        schedule = lambda step: lr_share(step, total, self.warmup_steps, self.final_lr)  # noqa: E731
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)}

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> None:
        """Writes batch.metrics: entropy (nats a token), clip_fraction, grad_norm, lr, and, if the engine tells with
        what probability it drew each token, mismatch_kl, mismatch_max and mismatch_capped; means over optimiser
        steps."""
        samples, _ = batch.require_rollouts()
        with batch.timed("update"):
            minis = [
                self._micro_batches(samples, torch.arange(i, len(samples.ended), self.optimizer_steps))
                for i in range(self.optimizer_steps)  # parts of every group in each, however many ranks share
            ]
            # Later mini-batches are off-policy, so they need the log-probabilities from before the first step.
            old = self._old_log_probs(samples, minis) if self.optimizer_steps > 1 else None
            work = self._work(batch, old)
            for mini in minis:
                metrics = self._optimise(work, mini)
                for name, value in metrics.items():
                    batch.metrics[name] = batch.metrics.get(name, 0.0) + value / len(minis)

    def block_gradients(self, batch: RolloutBatch, rows: Tensor, size: int) -> Tensor:
        """(K, size): what each block's tokens among the completions `rows` add to the gradient of the loss, by the
        policy as it is and without the entropy bonus, sketched to `size` numbers
        (bae.fidelity.compare_to_monte_carlo.count_sketch).

        rows: (R,) long, of this rank. size: 0 for the flat gradients themselves. Leaves `grad` alone. All ranks must
        call it, for `aggregation` may need their tokens; it wants whole weights, so it is not for sharded strategies.
        """
        work = self._work(batch, old=None)
        found: list[Any] = [0.0] * len(self.block_weights)
        for part in self._micro_batches(work.samples, rows):
            seen = completion_pass(self.model, work.samples, part, self.temperature)
            block_of, weight = (self._columns(x, part, seen.log_p) for x in (work.block_of, work.weights))
            for k in range(len(found)):
                loss, _, _ = self._surrogate_loss(work, part, seen, weight * (block_of == k))
                gradient = flat_gradient(loss, self.model)
                found[k] += (count_sketch(gradient, size) if size else gradient).cpu()  # a sketch is linear
        return torch.stack(found)

    def _work(self, batch: RolloutBatch, old: Tensor | None) -> UpdateInputs:
        samples, scored = batch.require_rollouts()
        counts = torch.stack([(scored.block_of == k).sum() for k in range(len(self.block_weights))])
        tokens = self._over_ranks(counts).to(self.block_weights)
        return UpdateInputs(
            samples,
            scored.block_of,
            self.aggregation(scored.block_of, self.block_weights, tokens),
            spread_over_tokens(batch.require_advantages().per_block, scored.block_of),
            batch.require_advantages().numbers,
            old,
            batch.entropy_coef,
        )

    def _micro_batches(self, samples: SampledTokens, rows: Tensor) -> list[Tensor]:
        """As many on every rank, for a sharded strategy's passes are those of all."""
        parts = micro_batches(samples, rows, self.micro_batch_tokens)
        most = self._over_ranks(torch.tensor(len(parts)), "max")
        return parts if len(parts) == most else micro_batches(samples, rows, self.micro_batch_tokens, int(most))

    def _optimise(self, work: "UpdateInputs", parts: Sequence[Tensor]) -> dict[str, float]:
        """One optimiser step on the completions of the micro-batches `parts`."""
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        mini = torch.cat(list(parts))
        share = len(work.weights) / len(mini)  # weights are those of the whole batch
        # DDP takes the mean over ranks, so that each divides by the tokens that a rank has on average.
        tokens = float(self._over_ranks(work.samples.completion_mask[mini].sum()))
        sums, furthest = torch.zeros(4), torch.zeros(())
        for part, *prompts in passes(self.model, work.samples, parts, self._prefetches()):
            seen = completion_pass(self.model, work.samples, part, self.temperature, *prompts)
            log_p, entropy = seen.log_p, seen.entropy
            mask, weight = (self._columns(x, part, log_p) for x in (work.samples.completion_mask, work.weights))
            loss, advantage, old_log_p = self._surrogate_loss(work, part, seen, weight)
            loss = share * loss - work.entropy_coef * (entropy * mask).sum() / tokens
            with self._gradients_travel(part is parts[-1]):
                self.manual_backward(loss)
            clipped = is_clipped(log_p.detach(), old_log_p, advantage, self.clip, self.clip_high) & mask
            kl, capped, most = mismatch(
                old_log_p, self._sampled_log_p(work, part, old_log_p), mask, self.importance_cap
            )
            sums += torch.stack([(entropy.detach() * mask).sum(), clipped.sum(), kl, capped]).cpu()
            furthest = torch.maximum(furthest, most.cpu())
        norm = self._clip_gradients()
        optimizer.step()
        optimizer.zero_grad()
        lr = float(scheduler.get_last_lr()[0])
        scheduler.step()
        means = (self._over_ranks(sums) / tokens).tolist()
        metrics = {"entropy": means[0], "clip_fraction": means[1], "grad_norm": norm, "lr": lr}
        if work.samples.log_probs is not None:
            furthest = self._over_ranks(furthest, "max")
            metrics |= {"mismatch_kl": means[2], "mismatch_capped": means[3], "mismatch_max": float(furthest)}
        return metrics

    def _surrogate_loss(
        self, work: UpdateInputs, part: Tensor, seen: ForwardResult, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of the micro-batch `part` whose tokens have these weights, (B, T'); and the (B, T') advantages and
        old log-probabilities that went into it."""
        log_p = seen.log_p
        advantage, block_of = (self._columns(x, part, log_p) for x in (work.advantages, work.block_of))
        old_log_p = log_p.detach() if work.old is None else self._columns(work.old, part, log_p)
        loss = torch.zeros((), device=self.device)
        for numbers in work.numbers:
            change, gain = self._number_advantages(numbers, seen, part, block_of, weight)
            advantage, loss = advantage + change, loss - gain
        if self.importance_cap is not None:
            weight = weight * importance(old_log_p, self._sampled_log_p(work, part, old_log_p), self.importance_cap)
        loss = loss + blockwise_clipped_loss(log_p, old_log_p, advantage, weight, self.clip, self.clip_high)
        return loss, advantage, old_log_p

    def _sampled_log_p(self, work: UpdateInputs, part: Tensor, old_log_p: Tensor) -> Tensor:
        """(B, T'): the engine's log-probabilities; the policy's own where it does not tell."""
        told = work.samples.log_probs
        return old_log_p if told is None else self._columns(told, part, old_log_p)

    def _columns(self, x: Tensor, part: Tensor, like: Tensor) -> Tensor:
        """The rows `part` of (N, T), as wide as `like`: (B, T')."""
        return x[part, : like.shape[1]].to(self.device)

    def _number_advantages(
        self, numbers: NumberAdvantages, seen: ForwardResult, part: Tensor, block_of: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, T') by how much the advantages of one objective's tokens change, now that the policy's distribution over
        its numbers is known; and, with all actions, the expected reward to raise, a scalar, else 0."""
        decisions = numbers.decisions.rows(part).to(self.device)
        reward, before = numbers.reward[part].to(self.device), numbers.advantage[part].to(self.device)
        with torch.set_grad_enabled(numbers.all_action and torch.is_grad_enabled()):
            logits = seen.logits_at(decisions.position)
            log_probs = candidate_log_probs(logits, decisions.ids, self.temperature)
        values = expected(log_probs.detach(), decisions)
        in_block = block_of == numbers.block
        change = token_advantages(before, reward, values, decisions, in_block) - before.unsqueeze(1) * in_block
        if not numbers.all_action:
            return numbers.weight * change, torch.zeros((), device=self.device)
        # The token that was drawn gives way to the expectation over all that might have been.
        decides = decisions.position >= 0
        place = decisions.position.clamp(min=0)
        change = change.scatter_add(1, place, -(before.unsqueeze(1) + change.gather(1, place)) * decides)
        gain = (weight.gather(1, place) * decides * all_action(log_probs, decisions)).sum()
        return numbers.weight * change, numbers.weight * gain

    @torch.no_grad()
    def _old_log_probs(self, samples: SampledTokens, minis: Sequence[Sequence[Tensor]]) -> Tensor:
        """(N, T), in the same micro-batches as the update, so that the first ratio is exactly 1."""
        out = torch.zeros(samples.completion_ids.shape)
        for parts in minis:
            for part, *prompts in passes(self.model, samples, parts, self._prefetches()):
                log_p = completion_pass(self.model, samples, part, self.temperature, *prompts).log_p
                out[part, : log_p.shape[1]] = log_p.cpu()
        return out

    def _prefetches(self) -> bool:
        """Whether a prompt is read ahead for its micro-batches. Under a sharded strategy every pass is one of all
        ranks, who have other prompts."""
        return is_shared(self.model) and not isinstance(self.trainer.strategy, SHARDED)

    def _gradients_travel(self, now: bool) -> Any:
        """Under DDP, ranks exchange gradients with the last micro-batch only."""
        wrapped: Any = self.trainer.strategy.model
        return nullcontext() if now or not hasattr(wrapped, "no_sync") else wrapped.no_sync()

    def _clip_gradients(self) -> float:
        """Clip by global norm; the norm before."""
        return float(torch.nn.utils.clip_grad_norm_(self.parameters(), self.max_grad_norm))

    def _over_ranks(self, value: Tensor, operation: str = "mean") -> Tensor:
        """Of the same shape, in double precision, on the CPU."""
        if self.trainer.world_size > 1:
            value = self.trainer.strategy.reduce(value.double().to(self.device), reduce_op=operation)
        return value.double().cpu()
