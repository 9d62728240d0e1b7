"""One token a row from logits and a number in [0, 1). Pure torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
"""Tokens whose probabilities are summed before the draw is looked for among them: one sum of all would be a long
chain."""
SLICE = 2**20
"""Logits that are worked on at a time on a CPU: few enough to stay in its cache."""


@dataclass(frozen=True)
class Sampler:
    """temperature: 0 takes the most likely token. top_k: of so many most likely tokens, 0 for all. top_p: of the fewest
    that have at least this probability together. Tokens as likely as the last that is let in are let in, too.

    Raises ValueError for values that make no distribution.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"temperature={self.temperature}, rollout.top_k={self.top_k}, rollout.top_p={self.top_p}: "
                "the first two must be 0 or more, the last above 0 and at most 1"
            )

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """(R, V), (R,) -> (R,) tokens and their log-probabilities in the distribution drawn from, in nats, fp32.

        By inverting the cumulative distribution: a function of the row's logits and number alone.
        """
        if self.temperature == 0:
            return logits.argmax(-1), logits.new_zeros(len(logits), dtype=torch.float)
        rows = max(1, SLICE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        parts = [self._draw(*part) for part in zip(logits.split(rows), uniform.split(rows), strict=True)]
        tokens, log_probs = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(log_probs)

    def _draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        p = logits.to(torch.float, copy=True)
        if self.temperature != 1:
            p.div_(self.temperature)
        p.sub_(p.amax(1, keepdim=True)).exp_()
        if self.top_k or self.top_p < 1:
            p.masked_fill_(p < self._least(p).unsqueeze(1), 0)
        short = -p.shape[1] % BLOCK
        blocks = (torch.nn.functional.pad(p, (0, short)) if short else p).unflatten(1, (-1, BLOCK))
        up_to = blocks.sum(2).cumsum(1)
        total = up_to[:, -1]
        target = uniform * total
        block = _first_above(up_to, target)
        rest = target - torch.where(block > 0, up_to.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0)
        inside = blocks[torch.arange(len(p), device=p.device), block]
        token = block * BLOCK + _first_above(inside.cumsum(1), rest)
        return token, (p.gather(1, token[:, None])[:, 0] / total).log()

    def _least(self, p: Tensor) -> Tensor:
        """(R,): the smallest of the relative probabilities that are let in."""
        top = p.topk(min(self.top_k or p.shape[1], p.shape[1]), 1).values  # sorted, largest first
        before = top.cumsum(1) - top
        within = before < self.top_p * top.sum(1, keepdim=True)
        return top.gather(1, within.sum(1, keepdim=True) - 1)[:, 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(R,): the first place where the cumulative sum is above the target, which rounding may have put at the total."""
    last = cumulative[:, -1]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(cumulative, target.unsqueeze(1), right=True)[:, 0]
