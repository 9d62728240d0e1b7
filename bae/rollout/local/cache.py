"""Keep keys and values of completions that are being decoded: each prompt's once, each completion's own beside them.

R  completions in the cache     P  their prompts     n  completions of a prompt, at most
C  places for tokens of a completion     h, r, D, L: as in bae.training.attention_cpu
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bae.rollout.local.cuda_graph import CudaGraphRunner
from bae.training import attention
from bae.training.causal_lm import CausalLM
from bae.training.packing import Prompts, below

GROWTH = 32
"""Places that are added at a time. Matrix products take whole buffers without a copy."""
PASS_TOKENS = 4096
"""Tokens of prompts that are encoded at a time: enough for products at full speed, and a bound on their memory."""


class Cache:
    """Hold the keys and values of some prompts and of their completions.

    `add_prompts` and `add_completions` let it grow, `keep_completions` and `keep_prompts` let it shrink, and `step`
    gives one more token to every completion in it.

    Args:
        model: the policy.
        rows: completions that may be in the cache at a time.
        cuda_graphs: whether changes are so few that steps between them are worth being recorded as a CUDA graph on a
            GPU (bae.rollout.local.cuda_graph).
    """

    def __init__(self, model: CausalLM, rows: int, cuda_graphs: bool = False) -> None:
        self.model, self.rows, self.cuda_graphs = model, rows, cuda_graphs
        self.longest = 0  # tokens of the longest sequence; bae.training.attention reads it
        self.prompt_layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, (P, h, L, D) each
        self.own_layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, (rows, h, C, D) each
        none = torch.zeros(0, dtype=torch.long, device=model.device)
        self.prompt_lengths = none  # (P,)
        self.prompt_of, self.own_lengths = none, none  # (R,): each completion's prompt, and the number of its tokens
        self._capacity, self._longest_prompt = 0, 0  # C and L
        self._longest_own, self._same_length = 0, True  # an upper bound; whether all completions have as many tokens

    def add_prompts(self, prompts: list[list[int]]) -> Tensor:
        """Encode P' more prompts, and return (P', V): the logits of the token that follows each."""
        passes = [Prompts(part, self.model.device) for part in _parts(prompts)]
        last = torch.cat([fresh.run(self.model) for fresh in passes])
        lengths = [length for fresh in passes for length in fresh.lengths]
        self.prompt_lengths = torch.cat([self.prompt_lengths, torch.tensor(lengths, device=last.device)])
        for layer in list(passes[0].layers):
            old = self.prompt_layers.pop(layer, None)
            every = [*([] if old is None else [old]), *(fresh.layers.pop(layer) for fresh in passes)]
            keys, values = zip(*every, strict=True)
            self.prompt_layers[layer] = below(*keys), below(*values)
        return self._logits(last)

    def add_completions(self, prompt: Tensor) -> None:
        """Begin a completion for each of these prompts, (R',) long, given by their numbers in the cache."""
        self.prompt_of = torch.cat([self.prompt_of, prompt])
        self.own_lengths = torch.cat([self.own_lengths, torch.zeros_like(prompt)])
        self._arrange()

    def keep_completions(self, keep: Tensor) -> Tensor:
        """Drop the completions where `keep`, (R,) bool, is False.

        The last ones take the places of those that went, so that few are moved.

        Returns:
            (R',) long: the old place of the completion that is now at each place.
        """
        count = int(keep.sum())
        order = torch.arange(count, device=keep.device)
        gaps = (~keep[:count]).nonzero().squeeze(1)
        order[gaps] = count + keep[count:].nonzero().squeeze(1)
        if len(gaps):
            for buffers in self.own_layers.values():
                for buffer in buffers:
                    buffer[gaps] = buffer[order[gaps]]
        self.prompt_of, self.own_lengths = self.prompt_of[order], self.own_lengths[order]
        self._arrange()
        return order

    def keep_prompts(self, keep: Tensor) -> None:
        """Drop all prompts but `keep`, (P',) long and rising, and number them anew."""
        number = torch.full_like(self.prompt_lengths, -1)
        number[keep] = torch.arange(len(keep), device=keep.device)
        self.prompt_of, self.prompt_lengths = number[self.prompt_of], self.prompt_lengths[keep]
        self._arrange()
        longest = self._longest_prompt
        self.prompt_layers = {
            layer: (key[keep, :, :longest].contiguous(), value[keep, :, :longest].contiguous())
            for layer, (key, value) in self.prompt_layers.items()
        }

    def step(self, tokens: Tensor, unfinished: Tensor) -> Tensor:
        """Give every completion its last token and return the logits of the next one.

        Args:
            tokens: (R,) long.
            unfinished: (R,) bool. Where it is False nothing is added, and the logits are of no use.

        Returns:
            (R, V). The next step may overwrite them.
        """
        self._reserve(unfinished)
        # If all are at the same place, one number says it, and writing there is a plain copy. A CUDA graph would keep
        # the number as it was.
        self._write_at = self._longest_own if self._same_length and not self.cuda_graphs else self.own_lengths
        self.longest = self._longest_prompt + (self._capacity if self.cuda_graphs else self._longest_own + 1)
        logits = self._runner(self._forward, tokens) if self.cuda_graphs else self._forward(tokens)
        self.own_lengths += unfinished
        self._longest_own += 1
        return logits

    def _reserve(self, unfinished: Tensor) -> None:
        """See that there is a place for the next token of every completion."""
        if not self.cuda_graphs:
            self._capacity = -(-(self._longest_own + 1) // GROWTH) * GROWTH
        elif self._longest_own >= self._capacity:
            self._longest_own = int(self.own_lengths[unfinished].max())  # the longest may have ended
            if self._longest_own >= self._capacity:
                self._capacity = max(GROWTH, 2 * self._capacity)
                self._runner = CudaGraphRunner()

    def _forward(self, tokens: Tensor) -> Tensor:
        """Return the (R, V) logits that follow these tokens."""
        length = self.prompt_lengths[self.prompt_of]
        in_prompt, in_own = (torch.arange(x, device=tokens.device) for x in (self._longest_prompt, self._capacity))
        unseen = [in_prompt >= length.unsqueeze(1), in_own > self.own_lengths.unsqueeze(1)]
        self._unseen = torch.cat(unseen, 1)[:, None, None]  # (R, 1, 1, L + C)
        positions = (length + self.own_lengths).unsqueeze(0)
        return self._logits(attention.run(self.model, tokens.unsqueeze(0), positions, self)[0])

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return (…, V) from (…, width)."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the keys and values of the new tokens, and attend to them, to earlier ones and to the prompts.

        See bae.training.attention.Layout; here B is 1, and S is R.
        """
        q = (query[0] * scaling).unflatten(0, (key.shape[1], -1)).permute(2, 0, 1, 3)  # (R, h, r, D)
        own_key, own_value = self._store(layer, key, value)
        prompt_key, prompt_value = self.prompt_layers[layer]
        length = prompt_key.shape[2]
        scores = torch.empty(*q.shape[:3], length + own_key.shape[2], device=q.device)
        scores[..., :length] = self._by_row(self._by_prompt(q) @ prompt_key.mT)
        scores[..., length:] = (own_key @ q.mT).mT  # in this order the many keys are read as they lie in memory
        weights = scores.masked_fill_(self._unseen, -torch.inf).softmax(-1)
        out = weights[..., length:].to(q.dtype) @ own_value
        out += self._by_row(self._by_prompt(weights[..., :length].to(q.dtype)) @ prompt_value)
        return out.flatten(1, 2).unsqueeze(0)

    def _store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the new tokens, (1, h, R, D), and return all, (R, h, C, D)."""
        count = key.shape[2]
        own_key, own_value = (buffer[:count] for buffer in self._buffers(layer, key))
        for buffer, fresh in ((own_key, key), (own_value, value)):
            if isinstance(self._write_at, int):
                buffer[:, :, self._write_at] = fresh[0].transpose(0, 1)
            else:
                buffer[torch.arange(count, device=key.device), :, self._write_at] = fresh[0].transpose(0, 1)
        return own_key, own_value

    def _buffers(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the buffers of a layer, with places for the coming token."""
        found = self.own_layers.get(layer)
        if found is None or found[0].shape[2] != self._capacity:
            # Zeros, because places without a token are multiplied, too, even if only with 0.
            fresh = [like.new_zeros(self.rows, like.shape[1], self._capacity, like.shape[3]) for _ in range(2)]
            for old, new in zip(found or (), fresh, strict=False):
                places = min(old.shape[2], self._capacity)
                new[: len(self.own_lengths), :, :places] = old[: len(self.own_lengths), :, :places]
            self.own_layers[layer] = found = fresh[0], fresh[1]
        return found

    def _arrange(self) -> None:
        """Number the completions of each prompt, so that one product takes all of them with the prompt's keys."""
        own = self.own_lengths.tolist()
        self._longest_own, self._same_length = max(own, default=0), len(set(own)) == 1
        self._longest_prompt = int(self.prompt_lengths.max()) if len(self.prompt_lengths) else 0
        self._runner = CudaGraphRunner()
        count = torch.bincount(self.prompt_of, minlength=len(self.prompt_lengths))
        self._most_of_a_prompt = int(count.max()) if len(self.prompt_of) else 0  # n
        order = self.prompt_of.argsort(stable=True)
        first = (count.cumsum(0) - count)[self.prompt_of[order]]
        number = torch.arange(len(order), device=order.device) - first
        self._slot = torch.empty_like(order)  # (R,): the place of each completion among P * n
        self._slot[order] = self.prompt_of[order] * self._most_of_a_prompt + number
        # Whether the completions lie prompt by prompt, n of each, so that nothing has to be moved.
        self._in_order = len(order) == self._most_of_a_prompt * len(count) and bool((self._slot.diff() == 1).all())

    def _by_prompt(self, rows: Tensor) -> Tensor:
        """Turn (R, h, r, …) into (P, h, n * r, …)."""
        if not self._in_order:
            dense = rows.new_zeros(len(self.prompt_lengths) * self._most_of_a_prompt, *rows.shape[1:])
            dense[self._slot] = rows
            rows = dense
        by_prompt: Tensor = rows.unflatten(0, (len(self.prompt_lengths), self._most_of_a_prompt))
        return by_prompt.transpose(1, 2).flatten(2, 3)

    def _by_row(self, dense: Tensor) -> Tensor:
        """Turn (P, h, n * r, …) into (R, h, r, …)."""
        rows: Tensor = dense.unflatten(2, (self._most_of_a_prompt, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self._in_order else rows[self._slot]


def _parts(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Cut prompts into runs of at most PASS_TOKENS tokens. A prompt that is longer is alone."""
    part: list[list[int]] = []
    used = 0
    for prompt in prompts:
        if part and used + len(prompt) > PASS_TOKENS:
            yield part
            part, used = [], 0
        part.append(prompt)
        used += len(prompt)
    yield part
