"""Cached decoding in this process, with the very weights that are being trained."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bae.batch import SampledTokens
from bae.rollout.interface import OnFinished, pad_left
from bae.rollout.local.cache import Cache
from bae.rollout.local.prepacked import prepacked
from bae.rollout.local.sampling import Sampler
from bae.training import attention

SLACK = 0.25
"""Share of completions that have ended and still stay, where steps are recorded: every change costs a new recording."""


class LocalEngine:
    """Reads each prompt once for its whole group. A completion that ends leaves at once, and the next one that waits
    takes its place; with CUDA graphs, when some more have ended. For a model that cannot share prompts
    (model.shared_prefix=false): whole groups at a time, by transformers' cache, which finished completions leave once
    they are the majority.

    max_rows: completions decoded at a time, which bounds the memory of the cache. top_k, top_p: see
    bae.rollout.local.sampling.Sampler. cuda_graphs: on a GPU, steps are recorded and replayed
    (bae.rollout.local.cuda_graph).
    """

    def __init__(self, max_rows: int = 512, top_k: int = 0, top_p: float = 1.0, cuda_graphs: bool = True):
        if max_rows < 1:
            raise ValueError(f"rollout.max_rows={max_rows}: must be 1 or more")
        Sampler(1.0, top_k, top_p)  # refused here, not at the first step
        self.max_rows, self.top_k, self.top_p = max_rows, top_k, top_p
        self.cuda_graphs = cuda_graphs

    @torch.compiler.set_stance("force_eager")  # compiled layers would be compiled again for weights in another order
    @torch.no_grad()  # not inference_mode: the ids return in the training pass, which keeps them for backward
    def sample(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        keys: Sequence[tuple[int, ...]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        eos_token_id: int,
        pad_token_id: int,
        on_finished: OnFinished | None = None,
    ) -> SampledTokens:
        uniforms = torch.from_numpy(
            np.concatenate(
                [np.random.default_rng(key).random((group_size, max_new_tokens), np.float32) for key in keys]
            )
        )
        draws = _Draws(
            Sampler(temperature, self.top_k, self.top_p),
            uniforms.to(model.device),
            eos_token_id,
            pad_token_id,
            on_finished,
        )
        if attention.is_shared(model):
            with prepacked(model, min(self.max_rows, len(uniforms))):
                steady = self.cuda_graphs and model.device.type == "cuda"
                _decode(model, [list(prompt) for prompt in prompts], group_size, self.max_rows, draws, steady)
        else:
            for i in range(0, len(prompts), max(1, self.max_rows // group_size)):
                some = prompts[i : i + max(1, self.max_rows // group_size)]
                _decode_plainly(model, some, i * group_size, group_size, draws, pad_token_id)
        prompt_ids, prompt_mask = pad_left(prompts, pad_token_id)
        return draws.samples(prompt_ids.repeat_interleave(group_size, 0), prompt_mask.repeat_interleave(group_size, 0))


class _Draws:
    """What was drawn of N completions; each by its own numbers, so that it does not matter which are decoded
    together."""

    def __init__(self, sampler: Sampler, uniforms: Tensor, eos: int, pad: int, on_finished: OnFinished | None):
        self.sampler, self.uniforms, self.eos, self.on_finished = sampler, uniforms, eos, on_finished
        self.ids = torch.full(uniforms.shape, pad, device=uniforms.device)
        self.log_probs = torch.zeros_like(uniforms)
        self.lengths = torch.zeros(len(uniforms), dtype=torch.long, device=uniforms.device)
        self.ended = torch.zeros(len(uniforms), dtype=torch.bool, device=uniforms.device)

    def draw(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of the completions `rows`, (R,) long, by their (R, V) logits; (R,), and (R,) bool: whether
        each goes on."""
        at = self.lengths[rows]
        token, log_prob = self.sampler.draw(logits, self.uniforms[rows, at])
        self.ids[rows, at], self.log_probs[rows, at] = token, log_prob
        self.lengths[rows] = at + 1
        self.ended[rows] = token == self.eos
        going = (token != self.eos) & (at + 1 < self.ids.shape[1])
        if self.on_finished is not None:
            for n in rows[~going].tolist():
                self.on_finished(n, self.ids[n, : int(self.lengths[n])].tolist(), bool(self.ended[n]))
        return token, going

    def samples(self, prompt_ids: Tensor, prompt_mask: Tensor) -> SampledTokens:
        lengths = self.lengths.cpu()
        width = int(lengths.max())
        mask = torch.arange(width) < lengths.unsqueeze(1)
        return SampledTokens(prompt_ids, prompt_mask, self.ids[:, :width].cpu(), mask, self.ended.cpu(),
                       self.log_probs[:, :width].cpu())  # fmt: skip


def _decode(model: Any, prompts: list[list[int]], group_size: int, max_rows: int, draws: _Draws, steady: bool) -> None:
    """steady: a completion that has ended stays until there are more such (SLACK)."""
    device, total = model.device, len(prompts) * group_size
    cache = Cache(model, min(max_rows, total), steady)
    waiting = deque(range(total))
    held: list[int] = []  # the prompts in the cache
    first = torch.empty(0)  # logits of what follows each
    rows = tokens = torch.zeros(0, dtype=torch.long, device=device)  # which completions, and the last token of each
    going, left = torch.zeros(0, dtype=torch.bool, device=device), 0  # which have not ended, and how many
    while waiting or left:
        begun = [waiting.popleft() for _ in range(min(len(waiting), max_rows - len(rows)))]
        if begun:
            wanted = sorted({n // group_size for n in begun} - set(held))
            if wanted:
                logits = cache.read([prompts[p] for p in wanted])
                first = torch.cat([first, logits]) if held else logits
                held += wanted
            fresh = torch.tensor(begun, device=device)
            number = torch.tensor([held.index(n // group_size) for n in begun], device=device)
            token, goes = draws.draw(fresh, first[number])
            cache.add(number[goes])
            rows, tokens = torch.cat([rows, fresh[goes]]), torch.cat([tokens, token[goes]])
            going, left = torch.cat([going, goes[goes]]), left + int(goes.sum())
        if left:
            logits = cache.step(tokens, going)
            here = slice(None) if left == len(rows) else going.nonzero().squeeze(1)
            tokens[here], going[here] = draws.draw(rows[here], logits[here])
            left = int(going.sum())
        if not left or left < len(rows) * (1 - SLACK if steady else 1):
            order = cache.keep(going)
            rows, tokens, going = rows[order], tokens[order], going[order]
        elif not begun:
            continue
        needed = {n // group_size for n in rows.tolist()} | ({waiting[0] // group_size} if waiting else set())
        if not needed.issuperset(held):
            keep = [i for i, p in enumerate(held) if p in needed]
            cache.drop_prompts(torch.tensor(keep, dtype=torch.long, device=device))
            held, first = [held[i] for i in keep], first[keep]


def _decode_plainly(
    model: Any, prompts: Sequence[Sequence[int]], start: int, group: int, draws: _Draws, pad: int
) -> None:
    """Whole groups, from completion number `start` on."""
    prompt_ids, prompt_mask = (x.to(model.device) for x in pad_left(prompts, pad))
    out = model(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = out.past_key_values
    cache.batch_repeat_interleave(group)
    logits = out.logits[:, -1].repeat_interleave(group, 0)
    mask = prompt_mask.long().repeat_interleave(group, 0)
    next_position = mask.sum(1)
    held = start + torch.arange(len(logits), device=logits.device)  # rows of the cache
    going = torch.ones_like(held, dtype=torch.bool)  # of these
    token = torch.full_like(held, pad)
    while True:
        token = torch.full_like(held, pad)
        token[going], going[going.clone()] = draws.draw(held[going], logits[going])
        if not going.any():
            return
        if going.sum() * 2 < len(held):
            cache.batch_select_indices(going.nonzero().squeeze(1))
            held, token, mask, next_position = held[going], token[going], mask[going], next_position[going]
            going = going[going]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(
            input_ids=token.unsqueeze(1),
            attention_mask=mask,
            position_ids=next_position.unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits, next_position = out.logits[:, -1], next_position + 1
