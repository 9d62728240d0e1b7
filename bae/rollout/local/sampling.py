"""Draw one token for each row of logits from a number in [0, 1). Pure torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 256
"""Tokens whose probabilities are summed before the draw is looked for among them. One sum over all tokens would be a
long chain of additions."""
SLICE = 2**20
"""Logits that are worked on at a time on a CPU: few enough to stay in its cache."""


@dataclass(frozen=True)
class Sampler:
    """Hold the settings of the distribution that tokens are drawn from, and draw from it.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: draw among this many of the most likely tokens; 0 for all.
        top_p: draw among the fewest tokens that have at least this probability together. With top_k and top_p, tokens
            as likely as the last one that is allowed are allowed, too.

    Raises:
        ValueError: for values that make no distribution.
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
        """Draw a token for each row by inverting the cumulative distribution.

        The token of a row depends on the row's logits and number alone.

        Args:
            logits: (R, V).
            uniform: (R,), numbers in [0, 1).

        Returns:
            tokens: (R,) long.
            log_probs: (R,) fp32, their log-probabilities in the distribution that they were drawn from, in nats.
        """
        if self.temperature == 0:
            return logits.argmax(-1), logits.new_zeros(len(logits), dtype=torch.float)
        rows = max(1, SLICE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        parts = [self._draw_slice(*part) for part in zip(logits.split(rows), uniform.split(rows), strict=True)]
        tokens, log_probs = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(log_probs)

    def _draw_slice(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Draw for some rows: find the chunk of tokens first, and then the token in it."""
        p = self._relative_probabilities(logits)
        missing = -p.shape[1] % CHUNK
        chunks = (torch.nn.functional.pad(p, (0, missing)) if missing else p).unflatten(1, (-1, CHUNK))
        up_to = chunks.sum(2).cumsum(1)
        total = up_to[:, -1]
        target = uniform * total
        chunk = _first_above(up_to, target)
        rest = target - torch.where(chunk > 0, up_to.gather(1, (chunk - 1).clamp(min=0)[:, None])[:, 0], 0)
        inside = chunks[torch.arange(len(p), device=p.device), chunk]
        token = chunk * CHUNK + _first_above(inside.cumsum(1), rest)
        return token, (p.gather(1, token[:, None])[:, 0] / total).log()

    def _relative_probabilities(self, logits: Tensor) -> Tensor:
        """Return (R, V) fp32: probabilities relative to that of the most likely token, 0 for tokens not allowed."""
        p = logits.to(torch.float, copy=True)
        if self.temperature != 1:
            p.div_(self.temperature)
        p.sub_(p.amax(1, keepdim=True)).exp_()
        if self.top_k or self.top_p < 1:
            p.masked_fill_(p < self._smallest_allowed(p).unsqueeze(1), 0)
        return p

    def _smallest_allowed(self, p: Tensor) -> Tensor:
        """Return (R,): the smallest of the relative probabilities that top_k and top_p allow."""
        top = p.topk(min(self.top_k or p.shape[1], p.shape[1]), 1).values  # sorted, largest first
        before = top.cumsum(1) - top
        within = before < self.top_p * top.sum(1, keepdim=True)
        return top.gather(1, within.sum(1, keepdim=True) - 1)[:, 0]


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """Return (R,): the first place where the cumulative sum is above the target.

    Rounding may have put the target at the total, where nothing is above it; so it is lowered to just below.
    """
    last = cumulative[:, -1]
    target = torch.minimum(target, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(cumulative, target.unsqueeze(1), right=True)[:, 0]
