"""Keys and values of completions that are being decoded: each prompt's once, each completion's own beside them.

R  completions in decoding     P  their prompts     n  completions of a prompt, at most
h, r, D, L: as in bae.training.attention_cpu     C  places for tokens of a completion
"""

from typing import Any

import torch
from torch import Tensor

from bae.rollout.local.cuda_graph import RecordedStep
from bae.training import attention
from bae.training.packing import Prompts, below

GROWTH = 32
"""Places that are added at a time: whole buffers are what matrix products take without a copy."""


class Cache:
    """Grows by `read` and `add`, and shrinks by `keep`; `step` takes one token of every completion in it."""

    def __init__(self, model: Any, rows: int, steady: bool = False):
        """rows: completions that may be in it at a time. steady: changes are few, so that steps between them are worth
        being recorded (bae.rollout.local.cuda_graph)."""
        self.model = model
        self.rows = rows
        self.steady = steady
        self.longest = 0
        self.prompts: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, (P, h, L, D) each
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, (rows, h, C, D) each
        none = torch.zeros(0, dtype=torch.long, device=model.device)
        self.lengths = none  # (P,): of prompts
        self.prompt, self.used = none, none  # (R,): each completion's prompt, and tokens of its own
        self._capacity, self._longest_prompt = 0, 0
        self._most, self._level = 0, True  # tokens of the longest completion, at most; whether all have as many

    def read(self, prompts: list[list[int]]) -> Tensor:
        """Add prompts; (P', V): logits of what follows each."""
        fresh = Prompts(prompts, self.model.device)
        last = fresh.run(self.model)
        self.lengths = torch.cat([self.lengths, torch.tensor(fresh.lengths, device=last.device)])
        for layer, (key, value) in fresh.layers.items():
            before = self.prompts.get(layer)
            self.prompts[layer] = (key, value) if before is None else (below(before[0], key), below(before[1], value))
        return self.model.get_output_embeddings()(last)

    def add(self, prompt: Tensor) -> None:
        """Begin a completion for each of these prompts, (R',) long, by their number."""
        self.prompt = torch.cat([self.prompt, prompt])
        self.used = torch.cat([self.used, torch.zeros_like(prompt)])
        self._arrange()

    def keep(self, going: Tensor) -> Tensor:
        """Let completions go where `going`, (R,) bool, is False; (R',) long: which now stands where. The last take the
        places of those that went, so that few are moved."""
        count = int(going.sum())
        order = torch.arange(count, device=going.device)
        gaps = (~going[:count]).nonzero().squeeze(1)
        order[gaps] = count + going[count:].nonzero().squeeze(1)
        if len(gaps):
            for buffers in self.own.values():
                for buffer in buffers:
                    buffer[gaps] = buffer[order[gaps]]
        self.prompt, self.used = self.prompt[order], self.used[order]
        self._arrange()
        return order

    def drop_prompts(self, keep: Tensor) -> None:
        """Forget all prompts but `keep`, (P',) long and rising; they are numbered anew."""
        number = torch.full_like(self.lengths, -1)
        number[keep] = torch.arange(len(keep), device=keep.device)
        self.prompt, self.lengths = number[self.prompt], self.lengths[keep]
        self._arrange()
        longest = self._longest_prompt
        self.prompts = {
            layer: (k[keep, :, :longest].contiguous(), v[keep, :, :longest].contiguous())
            for layer, (k, v) in self.prompts.items()
        }

    def step(self, tokens: Tensor, going: Tensor) -> Tensor:
        """(R,), (R,) bool -> (R, V): logits of what follows; of no use where not `going`, where nothing is added. They
        may be overwritten by the next step."""
        if not self.steady:
            self._capacity = -(-(self._most + 1) // GROWTH) * GROWTH
        elif self._most >= self._capacity:
            self._most = int(self.used[going].max())  # the longest may have gone
            if self._most >= self._capacity:
                self._capacity = max(GROWTH, 2 * self._capacity)
                self._repeated = RecordedStep()
        # One number where all are at the same place: writing there is then a plain copy. A recorded one would stay.
        self._at = self._most if self._level and not self.steady else self.used
        self.longest = self._longest_prompt + (self._capacity if self.steady else self._most + 1)
        logits = self._repeated(self._forward, tokens) if self.steady else self._forward(tokens)
        self.used += going
        self._most += 1
        return logits

    def _forward(self, tokens: Tensor) -> Tensor:
        length = self.lengths[self.prompt]
        unseen = [torch.arange(x, device=tokens.device) for x in (self._longest_prompt, self._capacity)]
        unseen = [unseen[0] >= length.unsqueeze(1), unseen[1] > self.used.unsqueeze(1)]
        self._unseen = torch.cat(unseen, 1)[:, None, None]  # (R, 1, 1, L + C)
        hidden = attention.run(self.model, tokens.unsqueeze(0), (length + self.used).unsqueeze(0), self)[0]
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        q = (query[0] * scaling).unflatten(0, (key.shape[1], -1)).permute(2, 0, 1, 3)  # (R, h, r, D)
        count = len(q)
        own_key, own_value = (buffer[:count] for buffer in self._buffers(layer, key))
        for buffer, fresh in ((own_key, key), (own_value, value)):
            if isinstance(self._at, int):
                buffer[:, :, self._at] = fresh[0].transpose(0, 1)
            else:
                buffer[torch.arange(count, device=q.device), :, self._at] = fresh[0].transpose(0, 1)
        prompt_key, prompt_value = self.prompts[layer]
        length = prompt_key.shape[2]
        scores = torch.empty(*q.shape[:3], length + own_key.shape[2], device=q.device)
        scores[..., :length] = self._by_row(self._by_prompt(q) @ prompt_key.mT)
        scores[..., length:] = (own_key @ q.mT).mT  # this way round the many keys are read as they lie
        weights = scores.masked_fill_(self._unseen, -torch.inf).softmax(-1)
        out = weights[..., length:].to(q.dtype) @ own_value
        out += self._by_row(self._by_prompt(weights[..., :length].to(q.dtype)) @ prompt_value)
        return out.flatten(1, 2).unsqueeze(0)

    def _buffers(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a layer, with places for the coming token."""
        found = self.own.get(layer)
        if found is None or found[0].shape[2] != self._capacity:
            # Zeros, for what no token has been written to is multiplied, if only with 0.
            fresh = [like.new_zeros(self.rows, like.shape[1], self._capacity, like.shape[3]) for _ in range(2)]
            for old, new in zip(found or (), fresh, strict=False):
                places = min(old.shape[2], self._capacity)
                new[: len(self.used), :, :places] = old[: len(self.used), :, :places]
            self.own[layer] = found = fresh[0], fresh[1]
        return found

    def _arrange(self) -> None:
        """Number the completions of each prompt, for products of all of them with its keys."""
        used = self.used.tolist()
        self._most, self._level = max(used, default=0), len(set(used)) == 1
        self._longest_prompt = int(self.lengths.max()) if len(self.lengths) else 0
        self._repeated = RecordedStep()
        count = torch.bincount(self.prompt, minlength=len(self.lengths))
        self._each = int(count.max()) if len(self.prompt) else 0
        order = self.prompt.argsort(stable=True)
        first = (count.cumsum(0) - count)[self.prompt[order]]
        self._place = torch.empty_like(order)
        self._place[order] = self.prompt[order] * self._each + torch.arange(len(order), device=order.device) - first
        # Then the two orders are one.
        self._full = len(order) == self._each * len(count) and bool((self._place.diff() == 1).all())

    def _by_prompt(self, q: Tensor) -> Tensor:
        """(R, h, r, …) -> (P, h, n * r, …)."""
        if not self._full:
            dense = q.new_zeros(len(self.lengths) * self._each, *q.shape[1:])
            dense[self._place] = q
            q = dense
        return q.unflatten(0, (len(self.lengths), self._each)).transpose(1, 2).flatten(2, 3)

    def _by_row(self, dense: Tensor) -> Tensor:
        """(P, h, n * r, …) -> (R, h, r, …)."""
        rows = dense.unflatten(2, (self._each, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self._full else rows[self._place]
