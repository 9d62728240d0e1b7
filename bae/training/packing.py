"""Put completions and their prompts into one row of tokens without padding, each prompt once.

Everything but attention works on each token by itself, and attention sees the prompt and the completion's own past
(attention_cpu.py; in half precision on a GPU attention_gpu.py). So hidden states and gradients are those of one padded
row for each completion, at the cost of the tokens that differ.

A prompt whose completions are in several micro-batches is encoded ahead without gradients (`PrefetchedPrompt`). It is
encoded once more with the last of these micro-batches, and the others hand over to that pass what they gave to its keys
and values.

    S  tokens of the row     R  completions     P  prompts     M  completion tokens     W  width of a hidden state
    h, r, n, L, D: as in attention_cpu.py
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from bae.batch import SampledTokens
from bae.training import attention, attention_gpu
from bae.training.attention_cpu import shared_attention
from bae.training.causal_lm import CausalLM


class Packing:
    """Lay out the row of some completions: first their prompts, then all tokens that something is predicted from.

    Args:
        samples: N completions.
        rows: (R,) long; neighbours share a prompt.
        device: of the model.
        prefetched: the last prompt, which is then not in the row.
        to_complete: the first prompt, if passes before this one had it prefetched. Their backward passes were taken.

    Attributes:
        ids, positions: (1, S) long.
        longest: tokens of the longest sequence.
    """

    def __init__(
        self,
        samples: SampledTokens,
        rows: Tensor,
        device: torch.device,
        prefetched: "PrefetchedPrompt | None" = None,
        to_complete: "PrefetchedPrompt | None" = None,
    ) -> None:
        prompts, mask = samples.prompt_ids[rows], samples.prompt_mask[rows]
        _, which, count = torch.unique_consecutive(
            torch.where(mask, prompts, -1), dim=0, return_inverse=True, return_counts=True
        )
        first = count.cumsum(0) - count
        prompts, mask = prompts[first], mask[first]
        length = mask.sum(1)
        self.prefetched, self.to_complete = prefetched, to_complete
        read = len(count) - (prefetched is not None)  # prompts in the row
        fed = samples.completion_mask[rows].sum(1) - 1  # nothing is predicted from the last token
        width, column = int(fed.max()), torch.arange(len(rows)) - first[which]
        self._prompt = Padded(_before(length[:read]), 0, device)
        own, start = torch.arange(width) < fed.unsqueeze(1), int(length[:read].sum())
        real = torch.zeros(len(count), int(count.max()), width, dtype=torch.bool)
        real[which, column] = own
        self._own = Padded(real, start, device)
        ids = torch.cat([prompts[:read][mask[:read]], samples.completion_ids[rows, :width][own]])
        self.ids = ids.unsqueeze(0).to(device)
        positions = length[which].unsqueeze(1) + torch.arange(width)
        positions = torch.cat([(mask.cumsum(1) - 1)[:read][mask[:read]], positions[own]])
        self.positions = positions.unsqueeze(0).to(device)
        place = (start + fed.cumsum(0) - fed).unsqueeze(1) + torch.arange(-1, width)
        last = length.cumsum(0) - 1
        last[read:] = len(ids)  # the state of a prefetched prompt is put below those of the row
        place[:, 0] = last[which]
        self._predicts = place[torch.arange(-1, width) < fed.unsqueeze(1)].to(device)
        self.longest = int((length[which] + fed).max())
        self._lengths, self._read = length.tolist(), read
        self._widths = torch.zeros_like(length).scatter_reduce(0, which, fed, "amax").tolist()
        together = torch.zeros_like(length).index_add(0, which, fed).tolist()
        each = (self._lengths[:read] + fed.tolist(), self._lengths, together)
        self._sequences, self._prompts, self._completions = (attention_gpu.Lengths(x, device) for x in each)

    def states(self, model: CausalLM) -> Tensor:
        """Return (M, W): for each token of the completions in order, the last layer's state that predicts it."""
        if self.ids.numel():
            hidden = attention.run(model, self.ids, self.positions, self)[0]
        else:  # completions of one token each, of a prefetched prompt
            assert self.prefetched is not None
            hidden = self.prefetched.last[:0]
        if self.to_complete is not None:
            self.to_complete.hand_over(hidden, self.to_complete.last, self._lengths[0] - 1)
        if self.prefetched is not None:
            hidden = torch.cat([hidden, self.prefetched.last])
        return hidden.index_select(0, self._predicts)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if self.to_complete is not None:
            for x, leaf in zip((key, value), self.to_complete.layers[layer], strict=True):
                self.to_complete.hand_over(x, leaf)
        q, k, v = query[0], key[0], value[0]
        more = [] if self.prefetched is None else self.prefetched.layers[layer]  # (1, h, L, D) each
        if attention_gpu.is_usable(query):
            row = self._sequences, self._prompts, self._completions
            return attention_gpu.row_attention(q, k, v, *row, scaling, *(x[0] for x in more)).unsqueeze(0)
        q = (q * scaling).unflatten(0, (len(k), -1))  # (h, r, S, D)
        out = []
        pk, pv = (self._prompt.spread(x).movedim(-3, 0) for x in (k, v))  # (P, h, L, D)
        if self._read:
            out.append(_prompts_alone(self._prompt, q, pk, pv, self._lengths[: self._read]))
        if self._own.slots.numel():
            oq, ok, ov = (self._own.spread(x).movedim(-4, 0) for x in (q, k, v))  # (P, h, [r,] n, T, D)
            if more:
                pk, pv = below(pk, more[0]), below(pv, more[1])
            completions = shared_attention(oq.transpose(2, 3), ok, ov, pk, pv, self._lengths, self._widths)
            out.append(self._own.collect(completions.transpose(2, 3).movedim(0, -4)))
        return torch.cat(out, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)


class Prompts:
    """Lay out the row of prompts alone.

    Attributes:
        ids, positions: (1, S) long.
        lengths, longest: tokens of each prompt, and of the longest.
        layers: once it was run, the keys and values of every layer, (P, h, L, D) each.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self.lengths = [len(prompt) for prompt in prompts]
        self.longest = max(self.lengths)
        real = _before(torch.tensor(self.lengths))
        self._padded = Padded(real, 0, device)
        self.ids = torch.tensor([[token for prompt in prompts for token in prompt]], device=device)
        self.positions = (real.cumsum(1) - 1)[real].unsqueeze(0).to(device)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._each, self._none = (attention_gpu.Lengths(x, device) for x in (self.lengths, []))

    def run(self, model: CausalLM) -> Tensor:
        """Return (P, W): the last layer's hidden state of each prompt's last token."""
        hidden = attention.run(model, self.ids, self.positions, self)[0]
        return hidden[torch.tensor(self.lengths).cumsum(0).to(hidden.device) - 1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        k, v = (self._padded.spread(x[0]).movedim(-3, 0).contiguous() for x in (key, value))
        self.layers[layer] = k, v
        if attention_gpu.is_usable(query):
            lengths = self._each, self._each, self._none
            return attention_gpu.row_attention(query[0], key[0], value[0], *lengths, scaling).unsqueeze(0)
        q = (query[0] * scaling).unflatten(0, (key.shape[1], -1))
        out = _prompts_alone(self._padded, q, k, v, self.lengths)
        return out.flatten(0, 1).transpose(0, 1).unsqueeze(0)


class PrefetchedPrompt:
    """Encode a prompt ahead for passes over some of its completions.

    The backward passes of these give gradients to its keys, values and last state. The gradients gather there, and are
    handed over to the pass that encodes the prompt with the rest of its completions.

    Attributes:
        layers: keys and values of every layer, (1, h, L, D) each.
        last: (1, W), the last layer's last hidden state.
    """

    def __init__(self, model: CausalLM, prompt: Sequence[int]) -> None:
        prompts = Prompts([prompt], model.device)
        with torch.no_grad():
            self.last = prompts.run(model)
        self.layers = prompts.layers
        for leaf in (self.last, *chain(*self.layers.values())):
            leaf.requires_grad_(torch.is_grad_enabled())

    def hand_over(self, x: Tensor, leaf: Tensor, begin: int = 0) -> None:
        """Add what the leaf, (…, l, W), has gathered to the gradient of x, (…, S, W), from token `begin` on."""

        def added(gradient: Tensor) -> Tensor:
            if leaf.grad is not None:  # else no completion fed a token
                gradient = gradient.clone()
                gradient[..., begin : begin + leaf.shape[-2], :] += leaf.grad
            return gradient

        if x.requires_grad:
            x.register_hook(added)


def passes(
    model: CausalLM, samples: SampledTokens, parts: Sequence[Tensor], prefetch: bool
) -> Iterator[tuple[Tensor, "PrefetchedPrompt | None", "PrefetchedPrompt | None"]]:
    """Yield each micro-batch with what its `Packing` takes as prefetched and to_complete.

    The backward pass of each must be taken before the next is asked for. prefetch: False for neither, because a
    prefetch is a pass that other ranks would not take part in.
    """

    def prompt(row: Tensor) -> list[int]:
        ids: list[int] = samples.prompt_ids[row][samples.prompt_mask[row]].tolist()
        return ids

    before: PrefetchedPrompt | None = None
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        prefetched = None
        if prefetch and after is not None and prompt(part[-1]) == prompt(after[0]):
            goes_on = before is not None and prompt(part[0]) == prompt(part[-1])
            prefetched = before if goes_on else PrefetchedPrompt(model, prompt(part[-1]))
        yield part, prefetched, None if before is prefetched else before
        before = prefetched


class Padded:
    """Map the tokens of a stretch of the row to a padded shape and back.

    Args:
        real: the padded shape, bool, True for tokens.
        start: where the stretch begins in the row.
        device: of the model.
    """

    def __init__(self, real: Tensor, start: int, device: torch.device) -> None:
        flat = real.flatten()
        self.shape = real.shape
        self.slots = flat.nonzero().squeeze(1).to(device)
        self.source = (start + (flat.cumsum(0) - 1).clamp(min=0)).to(device)  # padding repeats some token

    def spread(self, x: Tensor) -> Tensor:
        """Spread the row over the padded shape: (…, S, D) -> (…, *shape, D)."""
        spread: Tensor = x.index_select(-2, self.source).unflatten(-2, self.shape)
        return spread

    def collect(self, x: Tensor) -> Tensor:
        """Collect the tokens again: (…, *shape, D) -> (…, tokens of the stretch, D)."""
        return x.flatten(-1 - len(self.shape), -2).index_select(-2, self.slots)


def micro_batches(samples: SampledTokens, rows: Tensor, budget: int, at_least: int = 1) -> list[Tensor]:
    """Cut completions into parts of at most `budget` tokens. A prompt counts once in each part.

    Completions of a prompt stay together as far as they fit, and so do lengths that are alike. A completion longer than
    the budget is alone.

    Args:
        samples: N completions.
        rows: (R,) long.
        budget: tokens of a part.
        at_least: the least number of parts, if there are as many completions.
    """
    if not len(rows):
        return []
    prompt, length = samples.prompt_mask[rows].sum(1), samples.completion_mask[rows].sum(1)
    _, group = torch.unique(
        torch.where(samples.prompt_mask[rows], samples.prompt_ids[rows], -1), dim=0, return_inverse=True
    )
    longest = torch.zeros_like(length).scatter_reduce(0, group, prompt + length, "amax")
    order = length.argsort(stable=True)
    for key in (group, longest[group]):  # the last one counts most
        order = order[key[order].argsort(stable=True)]
    parts: list[list[int]] = []
    used, last = budget, -1
    for n in order.tolist():
        used += int(length[n]) + (int(prompt[n]) if group[n] != last else 0)
        if used > budget or not parts:
            parts.append([])
            used = int(prompt[n] + length[n])
        parts[-1].append(n)
        last = int(group[n])
    while len(parts) < min(at_least, len(rows)):
        largest = max(parts, key=len)
        parts.remove(largest)
        parts += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return [rows[torch.tensor(part)] for part in parts]


def _prompts_alone(padded: Padded, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return (h, r, tokens, D): attention of prompts, each taken as one completion of no prompt.

    query: (h, r, S, D), scaled, of the row. key, value: (P, h, L, D).
    """
    q, nothing = padded.spread(query).movedim(-3, 0), key[:, :, :0]
    q1, k1, v1 = (x.unsqueeze(2) for x in (q, key, value))
    out = shared_attention(q1, k1, v1, nothing, nothing, [0] * len(key), lengths)
    return padded.collect(out.squeeze(2).movedim(0, -3))


def below(*parts: Tensor) -> Tensor:
    """Put the keys or values of prompts below each other: (P, h, L, D) each, filled up with zeros."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[2] for part in parts)
    return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, width - x.shape[2])) for x in parts])


def _before(lengths: Tensor) -> Tensor:
    """Tell which places are before the end of each sequence: (N,) -> (N, L) bool."""
    return torch.arange(int(lengths.max()) if len(lengths) else 0) < lengths.unsqueeze(1)
