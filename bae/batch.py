"""The records that flow through a training step, and the dimension legend of the whole project.

    P  prompts of a step on this rank        G  completions of one prompt (a group)
    N  completions, N = P * G, group by group: completion n belongs to prompt n // G
    J  objectives       K  blocks            L  prompt tokens       T  completion tokens       V  vocabulary
    B  completions of a micro-batch          T' tokens of the longest of them

The batch is the only channel between callbacks. Each stage writes its own fields, and later stages read them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bae.text.blocks import ANSWER, Section
from bae.text.number import Number
from bae.text.verdict import Verdict

Record = TypeVar("Record", "SampledTokens", "Scored")


@dataclass(frozen=True)
class Problem:
    """Hold a question and a reference answer that a verifier can check.

    Attributes:
        answer: a right answer.
        columns: the row of the data set that the problem came from; empty if it came from none.
        address: what the verifier is given instead of the answer, where that alone does not tell which answers are
            right; None for the answer.
    """

    id: str
    question: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    address: str | None = None

    @property
    def reference(self) -> str:
        """Return what the verifier compares answers with."""
        return self.answer if self.address is None else self.address


@dataclass(frozen=True)
class WrittenCompletion:
    """Hold what the policy wrote, as it is known before the verifier has judged it.

    Attributes:
        problem: the problem that was answered.
        text: the decoded completion.
        sections: the sections that were read, in order, up to the place where the format broke.
        well_formed: K flags, one for each block.
        confidences: the number in each `confidence` section that was begun; None if it is no number in [0, 1].
        length: number of tokens, with the end of sequence.
        truncated: whether the token limit came before the end of sequence.
        tokens: number of tokens of each block, by name; they add up to the length.
    """

    problem: Problem
    text: str
    sections: tuple[Section, ...]
    well_formed: tuple[bool, ...]
    confidences: tuple[float | None, ...]
    length: int
    truncated: bool
    tokens: Mapping[str, int] = field(default_factory=dict)

    def answer(self, which: int = 0) -> str | None:
        """Return the text of an answer, or None if the completion did not get there. Answers are counted from 0."""
        answers = [section.content for section in self.sections if section.tag == ANSWER]
        return answers[which] if which < len(answers) else None

    def stated(self, which: int = 0) -> float | None:
        """Return a stated confidence, or None if there is none that can be read. They are counted from 0."""
        return self.confidences[which] if which < len(self.confidences) else None

    @property
    def confidence(self) -> float | None:
        return self.stated()


@dataclass(frozen=True)
class Completion(WrittenCompletion):
    """Hold one completion as objectives see it: what the policy wrote, and what the verifier says of it.

    Attributes:
        verdicts: one for each `answer` section.
        repeats: for each `answer` section, whether the verifier finds it equal to the first one.
        token_log_probs: (length,), the log-probability of each token in the distribution that it was drawn from, in
            nats; None if the engine does not report it, and for text that was not sampled here.
        token_block: (length,), the number of the block of each token; None as above.
    """

    verdicts: tuple[Verdict, ...] = field(kw_only=True)
    repeats: tuple[bool, ...] = ()
    token_log_probs: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    token_block: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    def is_correct(self, which: int = 0) -> bool:
        """Tell whether there is such an answer and the verifier accepts it."""
        return self.verdicts[which : which + 1] == (Verdict.CORRECT,)

    @property
    def correct(self) -> bool:
        return self.is_correct()

    def log_probs(self, block: str) -> NDArray[np.float32] | None:
        """Return the log-probabilities of a block's tokens, in nats, empty if it was not reached; None if unknown.

        In training the sampler's distribution is the policy's, at the sampling temperature. Raises ValueError if there
        is no such block.
        """
        if block not in self.tokens:
            raise ValueError(f"there is no block {block!r}; there are {', '.join(self.tokens)}")
        if self.token_log_probs is None or self.token_block is None:
            return None
        mine = self.token_block == list(self.tokens).index(block)
        found: NDArray[np.float32] = self.token_log_probs[mine]
        return found


@dataclass(frozen=True)
class SampledTokens:
    """Hold the token ids that a rollout engine sampled.

    Attributes:
        prompt_ids, prompt_mask: (N, L), padded on the left.
        completion_ids, completion_mask: (N, T), padded on the right. The mask covers every sampled token, up to and
            with the first end of sequence.
        ended: (N,) bool, whether the end of sequence was sampled.
        log_probs: (N, T), the log-probability of each token in the distribution that it was drawn from, in nats, 0
            outside the mask. None if the engine does not report it.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    ended: Tensor
    log_probs: Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """Hold completions that were read, verified and rewarded.

    Attributes:
        completions: N completions.
        block_of: (N, T) long, the block of each token, -1 outside the completion.
        rewards: (N, J), after the policy for malformed output was applied.
        present: (N, J) bool, whether the objective counts for this completion: its block was reached, and is not
            masked because it is malformed. Where it is False the reward is 0 and enters no mean.
        malformed: (N, J) bool, whether the block was reached but is not in form, or held nothing to score.
        numbers: for each completion, where the tokens of each of its confidences lie, as far as they were begun.
        unanswered: (N, J) bool, whether an async reward was asked and did not answer; None if nobody looked.
    """

    completions: list[Completion]
    block_of: Tensor
    rewards: Tensor
    present: Tensor
    malformed: Tensor
    numbers: Sequence[Sequence[Number]] = ()
    unanswered: Tensor | None = None


class ForwardResult(NamedTuple):
    """Hold what a forward pass over B completions found, on the model's device.

    Attributes:
        log_p: (B, T'), the log-probability of each token in nats, at the sampling temperature.
        entropy: (B, T'), the entropy of the distribution of each token, in nats. Outside the mask both hold some
            finite numbers.
        logits_at: (B, D) positions, negative for none -> (B, D, V) logits, not yet divided by the temperature.
        temperature: of sampling.
    """

    log_p: Tensor
    entropy: Tensor
    logits_at: Callable[[Tensor], Tensor]
    temperature: float


class Refinement(Protocol):
    """Finish the advantages of one objective in the training pass, where the policy's own distribution is known."""

    @property
    def objective(self) -> int:
        """Return the number j of the objective."""
        ...

    @property
    def unrefined(self) -> Tensor:
        """Return (N,) bool: the completions of this rank whose advantages it leaves as they are."""
        ...

    def apply(self, forward: ForwardResult, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return how the token advantages change, and an expected reward to raise directly.

        Args:
            forward: the forward pass over the completions `rows`.
            rows: (B,) long, the completions of this rank that are in the micro-batch.
            weights: (B, T'), the token weights of the loss, zero outside the completion.

        Returns:
            change: (B, T'), to be added to the objective's advantage of each token. It must be an affine function of
                that advantage, and zero outside the objective's block.
            gain: a scalar that the loss raises, differentiable in the policy; 0 if there is none.
        """
        ...


@dataclass(frozen=True)
class Advantages:
    """Hold the advantages of N completions.

    Attributes:
        per_objective: (N, J), zero where not present.
        per_block: (N, K), the weighted sum of the advantages of each block's objectives.
        refinements: what the training pass adds. After the update, `per_objective` and `per_block` hold what was really
            applied: for a refined objective the mean over the tokens of its block.
        weights: J factors of the objectives' advantages; needed only with refinements.
        block_of_objective: J numbers of blocks; needed only with refinements.
        baselines: (N, J), with which the rewards were compared, for people to read. None if nobody wrote them down.
        outcomes: (N, J), the outcomes of the prefixes, 0 for objectives that condition on none; None as above.
    """

    per_objective: Tensor
    per_block: Tensor
    refinements: Sequence[Refinement] = ()
    weights: Sequence[float] = ()
    block_of_objective: Sequence[int] = ()
    baselines: Tensor | None = None
    outcomes: Tensor | None = None


@dataclass(frozen=True)
class Demonstrations:
    """Hold completions that the policy is to imitate.

    Attributes:
        samples: N completions and their prompts.
        learnt: (N, T) bool, the tokens that the policy is taught to write. The others it only reads.
    """

    samples: SampledTokens
    learnt: Tensor


@dataclass
class RolloutBatch:
    """Carry one step from stage to stage. The comment beside each field says which stages write it."""

    step: int  # loader; the others below, too, where nothing is said
    problems: list[Problem]  # loader; DynamicSampling replaces some
    group_size: int
    samples: SampledTokens | None = None  # Rollouts; DynamicSampling
    scored: Scored | None = None  # Rollouts; DynamicSampling
    advantages: Advantages | None = None  # BlockwiseAdvantages; the update, where a baseline has a refinement
    entropy_coef: float = 0.0  # AdaptiveEntropy
    metrics: dict[str, float] = field(default_factory=dict)  # every callback that measures, and the update
    held_out: dict[str, float] = field(default_factory=dict)  # HeldOut: what it measured after this step, if it did
    seconds: dict[str, float] = field(default_factory=dict)  # every stage: its wall time
    further: Callable[[int], list[Problem]] | None = None  # loader: round, from 1 -> as many other problems
    demonstrations: Demonstrations | None = None  # WrittenDemonstrations, OwnDemonstrations; in a warm start alone

    def require_rollouts(self) -> tuple[SampledTokens, Scored]:
        """Return sampled tokens and scores. Raises RuntimeError if the Rollouts callback has not run."""
        if self.samples is None or self.scored is None:
            raise RuntimeError("the batch has no rollouts: put bae.callbacks.Rollouts before whatever reads them")
        return self.samples, self.scored

    def require_advantages(self) -> Advantages:
        """Return the advantages. Raises RuntimeError if the BlockwiseAdvantages callback has not run."""
        if self.advantages is None:
            raise RuntimeError("the batch has no advantages: put bae.callbacks.BlockwiseAdvantages after Rollouts")
        return self.advantages

    def require_demonstrations(self) -> Demonstrations:
        """Return the demonstrations. Raises RuntimeError if no callback has written any."""
        if self.demonstrations is None:
            raise RuntimeError("the batch has no demonstrations: choose a callback that writes them, demonstrations=…")
        return self.demonstrations

    def further_problems(self, number: int) -> list[Problem]:
        """Return as many other problems as the step has; number: the round, from 1."""
        if self.further is None:
            raise RuntimeError("the batch has no further problems: bae.tasks.loader.PromptLoader gives them")
        return self.further(number)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the wall time of the `with` body, in seconds, to `seconds[name]`."""
        start = perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start


def group_index(n: int, group_size: int) -> Tensor:
    """Return (N,) long: the prompt that each of n completions belongs to."""
    return torch.arange(n) // group_size


def concatenate(parts: Sequence[tuple[SampledTokens, Scored]], pad: int) -> tuple[SampledTokens, Scored]:
    """Join the rollouts of several calls into those of one; pad: the id of padding."""
    samples, scored = zip(*parts, strict=True)
    has_log_probs = all(s.log_probs is not None for s in samples)
    return (
        SampledTokens(
            prompt_ids=_stack([s.prompt_ids for s in samples], pad, left=True),
            prompt_mask=_stack([s.prompt_mask for s in samples], False, left=True),
            completion_ids=_stack([s.completion_ids for s in samples], pad),
            completion_mask=_stack([s.completion_mask for s in samples], False),
            ended=torch.cat([s.ended for s in samples]),
            log_probs=_stack([s.log_probs for s in samples], 0.0) if has_log_probs else None,
        ),
        Scored(
            completions=[completion for s in scored for completion in s.completions],
            block_of=_stack([s.block_of for s in scored], -1),
            rewards=torch.cat([s.rewards for s in scored]),
            present=torch.cat([s.present for s in scored]),
            malformed=torch.cat([s.malformed for s in scored]),
            numbers=[numbers for s in scored for numbers in s.numbers],
            unanswered=_joined([s.unanswered for s in scored]),
        ),
    )


def _joined(columns: Sequence[Tensor | None]) -> Tensor | None:
    """Join what every part has; None if a part lacks it."""
    there = [x for x in columns if x is not None]
    return torch.cat(there) if len(there) == len(columns) else None


def rows_of(samples: SampledTokens, scored: Scored, rows: Tensor) -> tuple[SampledTokens, Scored]:
    """Return the completions `rows`, (R,) long."""
    return _rows(samples, rows), _rows(scored, rows)


def _rows(record: Record, rows: Tensor) -> Record:
    """Return the rows of every field of a record."""
    picked: dict[str, Any] = {}
    for name in (f.name for f in fields(record)):
        value = getattr(record, name)
        if value is None or isinstance(value, Tensor):
            picked[name] = None if value is None else value[rows]
        else:
            picked[name] = [value[n] for n in rows.tolist()]
    return type(record)(**picked)


def _stack(columns: Sequence[Tensor], fill: float, left: bool = False) -> Tensor:
    """Stack matrices, each filled up to the width of the widest."""
    width = max(x.shape[1] for x in columns)
    gaps = [width - x.shape[1] for x in columns]
    pads = [(gap, 0) if left else (0, gap) for gap in gaps]
    return torch.cat([torch.nn.functional.pad(x, pad, value=fill) for x, pad in zip(columns, pads, strict=True)])
