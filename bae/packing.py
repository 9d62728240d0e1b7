"""Completions and their prompts as one row of tokens without padding, each prompt once.

All but attention works on each token by itself, and attention sees the prompt and the completion's own past
(bae.shared_attention; in half precision on a GPU bae.flash_attention). So hidden states and gradients are those of one
padded row a completion, at the cost of the tokens that differ.
"""

from typing import Any

import torch
from torch import Tensor

from bae import flash_attention
from bae.batch import Samples
from bae.shared_attention import shared_attention


class Packing:
    """The row of some completions: first their prompts, then all tokens that something is predicted from.

    ids, positions: (1, S) long. predicts: (M,) long, for each token of the completions, one completion after the other,
    the place in the row whose hidden state predicts it. longest: tokens of the longest sequence.
    """

    def __init__(self, samples: Samples, rows: Tensor, device: Any):
        """rows: (R,) long; neighbours share a prompt."""
        prompts, mask = samples.prompt_ids[rows], samples.prompt_mask[rows]
        _, which, count = torch.unique_consecutive(
            torch.where(mask, prompts, -1), dim=0, return_inverse=True, return_counts=True
        )
        first = count.cumsum(0) - count
        prompts, mask = prompts[first], mask[first]
        length = mask.sum(1)
        fed = samples.completion_mask[rows].sum(1) - 1  # nothing is predicted from the last token
        width, column = int(fed.max()), torch.arange(len(rows)) - first[which]
        self._prompt = Padded(torch.arange(int(length.max())) < length.unsqueeze(1), 0, device)
        real = torch.zeros(len(count), int(count.max()), width, dtype=torch.bool)
        real[which, column] = torch.arange(width) < fed.unsqueeze(1)
        self._own = Padded(real, int(length.sum()), device)
        own = torch.arange(width) < fed.unsqueeze(1)
        self.ids = torch.cat([prompts[mask], samples.completion_ids[rows, :width][own]]).unsqueeze(0).to(device)
        positions = length[which].unsqueeze(1) + torch.arange(width)
        self.positions = torch.cat([(mask.cumsum(1) - 1)[mask], positions[own]]).unsqueeze(0).to(device)
        begins = int(length.sum()) + fed.cumsum(0) - fed
        place = begins.unsqueeze(1) + torch.arange(-1, width)
        place[:, 0] = (length.cumsum(0) - 1)[which]
        self.predicts = place[torch.arange(-1, width) < fed.unsqueeze(1)].to(device)
        self.longest = int((length[which] + fed).max())
        self._lengths = length.tolist()
        self._widths = torch.zeros_like(length).scatter_reduce(0, which, fed, "amax").tolist()
        together = torch.zeros_like(length).index_add(0, which, fed).tolist()
        each = (self._lengths + fed.tolist(), self._lengths, together)
        self._sequences, self._prompts, self._completions = (flash_attention.Lengths(x, device) for x in each)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if flash_attention.is_usable(query):
            lengths = self._sequences, self._prompts, self._completions
            return flash_attention.row_attention(query[0], key[0], value[0], *lengths, scaling).unsqueeze(0)
        q, k, v = query[0] * scaling, key[0], value[0]
        q = q.unflatten(0, (len(k), -1))  # (h, r, S, D)
        pq, pk, pv = (self._prompt.spread(x) for x in (q, k, v))  # (h, [r,] P, L, D)
        pq, pk, pv = (x.movedim(-3, 0) for x in (pq, pk, pv))  # (P, h, [r,] L, D)
        # To attention, a prompt is one completion of no prompt.
        nothing = pk[:, :, :0]
        alone = [0] * len(pk)
        q1, k1, v1 = (x.unsqueeze(2) for x in (pq, pk, pv))
        prompts = shared_attention(q1, k1, v1, nothing, nothing, alone, self._lengths)
        out = [self._prompt.collect(prompts.squeeze(2).movedim(0, -3))]
        if self._own.slots.numel():
            oq, ok, ov = (self._own.spread(x).movedim(-4, 0) for x in (q, k, v))  # (P, h, [r,] n, T, D)
            completions = shared_attention(oq.transpose(2, 3), ok, ov, pk, pv, self._lengths, self._widths)
            out.append(self._own.collect(completions.transpose(2, 3).movedim(0, -4)))
        return torch.cat(out, 2).flatten(0, 1).transpose(0, 1).unsqueeze(0)


class Padded:
    """Where the tokens of a stretch of the row stand in a padded shape, (…) bool, True for tokens; the stretch begins
    at `start`."""

    def __init__(self, real: Tensor, start: int, device: Any):
        flat = real.flatten()
        self.shape = real.shape
        self.slots = flat.nonzero().squeeze(1).to(device)
        self.source = (start + (flat.cumsum(0) - 1).clamp(min=0)).to(device)  # padding repeats some token

    def spread(self, x: Tensor) -> Tensor:
        """(…, S, D) -> (…, *shape, D)."""
        return x.index_select(-2, self.source).unflatten(-2, self.shape)

    def collect(self, x: Tensor) -> Tensor:
        """(…, *shape, D) -> (…, tokens of the stretch, D)."""
        return x.flatten(-1 - len(self.shape), -2).index_select(-2, self.slots)


def micro_batches(samples: Samples, rows: Tensor, budget: int, at_least: int = 1) -> list[Tensor]:
    """Cut completions into parts of at most `budget` tokens, a prompt counting once in each.

    rows: (R,) long. Completions of a prompt stay together as far as they fit, and lengths that are alike. A completion
    longer than the budget is alone. at_least: parts, where there are as many completions.
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
