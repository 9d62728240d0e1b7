"""Decode with a cache in this process, with the same weights that are being trained."""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bae.batch import SampledTokens
from bae.rollout.interface import SamplingRequest, pad_left
from bae.rollout.local.cache import Cache
from bae.rollout.local.prepacked import prepacked
from bae.rollout.local.sampling import Sampler
from bae.training import attention
from bae.training.causal_lm import CausalLM
from bae.training.heap import Heap
from bae.training.lora import sampling_weights

SLACK = 0.25
"""Share of completions that may have ended and still stay if steps are CUDA graphs: each change costs a new graph."""


class LocalEngine:
    """Sample with the policy itself, and encode each prompt once for its whole group.

    A completion that ends leaves at once, and the next one that waits takes its place. With CUDA graphs this happens
    when a quarter of the completions have ended (SLACK). A model that cannot share prompts (model.shared_prefix=false)
    decodes whole groups with transformers' cache, which finished completions leave once they are the majority.

    Args:
        max_rows: completions that are decoded at a time. This bounds the memory of the cache.
        top_k, top_p: see bae.rollout.local.sampling.Sampler.
        cuda_graphs: whether steps on a GPU are recorded and replayed (bae.rollout.local.cuda_graph).

    Raises:
        ValueError: for values that cannot work.
    """

    def __init__(self, max_rows: int = 512, top_k: int = 0, top_p: float = 1.0, cuda_graphs: bool = True) -> None:
        if max_rows < 1:
            raise ValueError(f"rollout.max_rows={max_rows}: must be 1 or more")
        Sampler(1.0, top_k, top_p)  # refuses wrong values here instead of at the first step
        self.max_rows, self.top_k, self.top_p = max_rows, top_k, top_p
        self.cuda_graphs = cuda_graphs
        self._heap = Heap()

    @torch.compiler.set_stance("force_eager")  # compiled layers would be compiled again for reordered weights
    @torch.no_grad()  # not inference_mode: the training pass takes the ids and keeps them for backward
    def sample(self, model: CausalLM, request: SamplingRequest) -> SampledTokens:
        """Sample the requested completions; see RolloutEngine."""
        self._heap.tidy()  # between the update of one step and the sampling of the next
        draws = _Draws(Sampler(request.temperature, self.top_k, self.top_p), request, model.device)
        with sampling_weights(model):
            self._decode(model, request, draws)
        return draws.samples(*request.padded_prompts())

    def _decode(self, model: CausalLM, request: SamplingRequest, draws: "_Draws") -> None:
        """Draw all tokens of the requested completions."""
        if attention.is_shared(model):
            with prepacked(model, min(self.max_rows, len(draws.ids))):
                cuda_graphs = self.cuda_graphs and model.device.type == "cuda"
                _SharedDecoding(model, request, draws, self.max_rows, cuda_graphs).run()
        else:
            at_a_time = max(1, self.max_rows // request.group_size)
            for first in range(0, len(request.prompts), at_a_time):
                _decode_whole_groups(model, request, draws, range(len(request.prompts))[first : first + at_a_time])


class _Draws:
    """Hold the tokens drawn for N completions.

    Each completion has its own T uniform numbers, so it does not matter which completions are decoded together.
    """

    def __init__(self, sampler: Sampler, request: SamplingRequest, device: torch.device) -> None:
        shape = request.group_size, request.max_new_tokens
        uniforms = np.concatenate([np.random.default_rng(key).random(shape, np.float32) for key in request.keys])
        self.sampler, self.uniforms = sampler, torch.from_numpy(uniforms).to(device)
        self.eos, self.on_finished = request.eos_token_id, request.on_finished
        self.ids = torch.full(self.uniforms.shape, request.pad_token_id, device=device)
        self.log_probs = torch.zeros_like(self.uniforms)
        self.lengths = torch.zeros(len(self.ids), dtype=torch.long, device=device)
        self.ended = torch.zeros(len(self.ids), dtype=torch.bool, device=device)

    def draw(self, rows: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the next token of the completions `rows`, (R,) long, from their (R, V) logits.

        Returns the (R,) tokens, and (R,) bool: whether each completion is still unfinished.
        """
        at = self.lengths[rows]
        token, log_prob = self.sampler.draw(logits, self.uniforms[rows, at])
        self.ids[rows, at], self.log_probs[rows, at] = token, log_prob
        self.lengths[rows] = at + 1
        self.ended[rows] = token == self.eos
        unfinished = (token != self.eos) & (at + 1 < self.ids.shape[1])
        if self.on_finished is not None:
            for n in rows[~unfinished].tolist():
                self.on_finished(n, self.ids[n, : int(self.lengths[n])].tolist(), bool(self.ended[n]))
        return token, unfinished

    def samples(self, prompt_ids: Tensor, prompt_mask: Tensor) -> SampledTokens:
        """Return what was drawn, cut to the longest completion, on the CPU."""
        lengths = self.lengths.cpu()
        width = int(lengths.max())
        return SampledTokens(
            prompt_ids,
            prompt_mask,
            completion_ids=self.ids[:, :width].cpu(),
            completion_mask=torch.arange(width) < lengths.unsqueeze(1),
            ended=self.ended.cpu(),
            log_probs=self.log_probs[:, :width].cpu(),
        )


class _SharedDecoding:
    """Decode completions whose prompts are encoded once (bae.rollout.local.cache).

    rows, tokens: (R,) long, the completions in the cache and the last token of each.
    unfinished: (R,) bool; `left` is the number of those.
    cached: the prompts in the cache. first_logits: (len(cached), V), of the token that follows each prompt.
    """

    def __init__(
        self, model: CausalLM, request: SamplingRequest, draws: _Draws, max_rows: int, cuda_graphs: bool
    ) -> None:
        total = len(draws.ids)
        self.prompts = [list(prompt) for prompt in request.prompts]
        self.group_size, self.draws, self.max_rows = request.group_size, draws, max_rows
        self.cache = Cache(model, min(max_rows, total), cuda_graphs)
        self.slack = SLACK if cuda_graphs else 0
        self.waiting = deque(range(total))
        self.cached: list[int] = []
        self.first_logits = torch.empty(0)
        self.rows = self.tokens = torch.zeros(0, dtype=torch.long, device=model.device)
        self.unfinished, self.left = torch.zeros(0, dtype=torch.bool, device=model.device), 0

    def run(self) -> None:
        """Decode until every completion has ended or reached the token limit."""
        while self.waiting or self.left:
            begun = self._begin()
            if self.left:
                self._step()
            gone = not self.left or self.left < len(self.rows) * (1 - self.slack)
            if gone:
                order = self.cache.keep_completions(self.unfinished)
                self.rows, self.tokens, self.unfinished = self.rows[order], self.tokens[order], self.unfinished[order]
            if gone or begun:
                self._drop_prompts()

    def _begin(self) -> bool:
        """Begin as many waiting completions as there is place for; return False if that is none."""
        count = min(len(self.waiting), self.max_rows - len(self.rows))
        begun = [self.waiting.popleft() for _ in range(count)]
        if not begun:
            return False
        self._encode({n // self.group_size for n in begun})
        device = self.rows.device
        rows = torch.tensor(begun, device=device)
        prompt = torch.tensor([self.cached.index(n // self.group_size) for n in begun], device=device)
        token, unfinished = self.draws.draw(rows, self.first_logits[prompt])
        self.cache.add_completions(prompt[unfinished])
        self.rows = torch.cat([self.rows, rows[unfinished]])
        self.tokens = torch.cat([self.tokens, token[unfinished]])
        self.unfinished = torch.cat([self.unfinished, unfinished[unfinished]])
        self.left += int(unfinished.sum())
        return True

    def _encode(self, prompts: set[int]) -> None:
        """Encode those of the prompts that are not in the cache."""
        wanted = sorted(prompts - set(self.cached))
        if wanted:
            logits = self.cache.add_prompts([self.prompts[p] for p in wanted])
            self.first_logits = torch.cat([self.first_logits, logits]) if self.cached else logits
            self.cached += wanted

    def _step(self) -> None:
        """Draw the next token of every unfinished completion."""
        logits = self.cache.step(self.tokens, self.unfinished)
        here = slice(None) if self.left == len(self.rows) else self.unfinished.nonzero().squeeze(1)
        self.tokens[here], self.unfinished[here] = self.draws.draw(self.rows[here], logits[here])
        self.left = int(self.unfinished.sum())

    def _drop_prompts(self) -> None:
        """Forget prompts that no completion in the cache and not the next one needs."""
        needed = {n // self.group_size for n in self.rows.tolist()}
        if self.waiting:
            needed.add(self.waiting[0] // self.group_size)
        if not needed.issuperset(self.cached):
            keep = [i for i, p in enumerate(self.cached) if p in needed]
            self.cache.keep_prompts(torch.tensor(keep, dtype=torch.long, device=self.rows.device))
            self.cached, self.first_logits = [self.cached[i] for i in keep], self.first_logits[keep]


def _decode_whole_groups(model: CausalLM, request: SamplingRequest, draws: _Draws, prompts: range) -> None:
    """Decode all completions of these prompts with transformers' own cache."""
    group_size, pad = request.group_size, request.pad_token_id
    ids, mask = (x.to(model.device) for x in pad_left([request.prompts[p] for p in prompts], pad))
    logits, cache = _forward(model, ids, mask.long(), (mask.cumsum(1) - 1).clamp(min=0))
    cache.batch_repeat_interleave(group_size)
    logits, mask = logits.repeat_interleave(group_size, 0), mask.long().repeat_interleave(group_size, 0)
    position = mask.sum(1)  # of the next token
    rows = prompts.start * group_size + torch.arange(len(logits), device=logits.device)  # completions in the cache
    unfinished = torch.ones_like(rows, dtype=torch.bool)
    while True:
        token = torch.full_like(rows, pad)
        token[unfinished], unfinished[unfinished.clone()] = draws.draw(rows[unfinished], logits[unfinished])
        if not unfinished.any():
            return
        if unfinished.sum() * 2 < len(rows):
            cache.batch_select_indices(unfinished.nonzero().squeeze(1))
            rows, token, mask, position = (x[unfinished] for x in (rows, token, mask, position))
            unfinished = unfinished[unfinished]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits, _ = _forward(model, token.unsqueeze(1), mask, position.unsqueeze(1), cache)
        position = position + 1


def _forward(model: CausalLM, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """Return the (R, V) logits after the last token of each row, and transformers' cache."""
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1], out.past_key_values
