"""Measure test-time scaling (paper, Fig. 2): the accuracy when one answer is made from n samples of a prompt.

Dimensions: P prompts, N samples of each. All functions take the same arguments:

    answer      (P, N) long: equal labels for equal answers of a prompt, -1 for no answer (`answer_classes`)
    correct     (P, N) bool
    confidence  (P, N) float in [0, 1]; one that cannot be read is NaN and counts as 0

Results are (P, N) float64: the expected score of each prompt with n = 1 … N samples, drawn without replacement from
its N samples. Their mean over prompts is the curve.

There is one rule for ties: a random sample among those with a tied answer is handed in. So a tie scores the share of
correct samples among them, and correctness never decides who wins. The winner of a vote is a class of answers, and a
random member of it is handed in. This also defines the score of a class whose members get different verdicts. A sample
without an answer wins only if no sample has one, and is then wrong.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_CHUNK = 2**22  # numbers in one tensor of votes, 32 MiB

CONFIDENT = ("maxconf", "weighted_maj")
"""The strategies that need confidences."""

Equivalent = Callable[[Sequence[tuple[str, str]]], list[bool]]
"""Tell for each pair of answers whether a verifier finds them equal. An answer may be any text of a policy."""


def scaling(answer: Tensor, correct: Tensor, confidence: Tensor, orders: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Score every strategy.

    Args:
        answer, correct, confidence: (P, N), see the module.
        orders, seed: see `votes`.

    Returns:
        {strategy: (P, N)} for pass@1, pass@k, maj, maxconf and weighted_maj.

    Raises:
        ValueError: if shapes differ, or a sample without an answer is marked correct.
    """
    return without_votes(correct) | {
        "maj": votes(answer, correct, torch.ones_like(answer), orders, seed),
        "maxconf": max_confidence(answer, correct, confidence),
        "weighted_maj": votes(answer, correct, _units(confidence), orders, seed),
    }


def without_votes(correct: Tensor) -> dict[str, Tensor]:
    """Score the strategies that compare no answers, pass@1 and pass@k: {strategy: (P, N)}. correct: (P, N)."""
    at_least_one = pass_at_k(correct)
    return {"pass@1": at_least_one[:, :1].expand(correct.shape), "pass@k": at_least_one}


def metric_name(strategy: str) -> str:
    """Return the name under which a strategy is logged. MLflow allows no @ in it."""
    return f"scaling/{strategy.replace('@', '_at_')}"


def pass_at_k(correct: Tensor) -> Tensor:
    """Return the chance that one or more of k samples is correct, for k = 1 … N. Exact.

    With c correct samples it is 1 − C(N − c, k) / C(N, k) (Chen et al., 2021). It is computed as the product
    1 − Π_{i<k} (N − c − i) / (N − i), so that no binomial coefficient is ever formed.
    """
    wrong = (~correct.bool()).sum(1, keepdim=True)
    i = torch.arange(correct.shape[1], device=correct.device)
    return 1 - ((wrong - i).clamp(min=0).double() / (correct.shape[1] - i)).cumprod(1)


def max_confidence(answer: Tensor, correct: Tensor, confidence: Tensor) -> Tensor:
    """Score the answer of the most confident sample. Exact.

    Let r be the rank of a sample, 0 for the most confident one. It is the best of n samples with probability
    C(N − 1 − r, n − 1) / C(N, n). Samples of equal confidence are in random order, so each scores their mean.

    Args:
        answer, correct, confidence: (P, N), see the module.

    Raises:
        ValueError: as `scaling` does.
    """
    _check(answer, correct, confidence)
    level = torch.where(answer >= 0, _units(confidence), -1)  # samples without an answer are last
    tied = (level[:, :, None] == level[:, None, :]).double()
    score = (tied @ correct.double()[:, :, None]).squeeze(2) / tied.sum(2)
    ranked = score.gather(1, level.argsort(dim=1, descending=True))
    return ranked @ _chance_of_being_best(answer.shape[1]).to(ranked.device)


def votes(answer: Tensor, correct: Tensor, vote: Tensor, orders: int = 32, seed: int = 0) -> Tensor:
    """Score the answer with the most votes.

    The N samples of a prompt are put on `orders` random circles. On each circle, the N runs of n neighbours are the
    subsets of n samples. A run is a uniformly random subset, so the mean is unbiased. Each circle treats all samples
    alike, so the mean is exact for n = 1, N − 1 and N. The draws depend on the seed and the position of the prompt.

    Args:
        answer, correct: (P, N), see the module.
        vote: (P, N) long, 0 or more: ones for Maj, confidences in whole units for WeightedMaj.
        orders: the number of circles for each prompt.
        seed: of the circles.

    Raises:
        ValueError: as `scaling` does.
    """
    _check(answer, correct, vote)
    prompts, n = answer.shape
    if not prompts or not n:
        return torch.zeros(prompts, n, dtype=torch.double, device=answer.device)
    score = correct.double().mean(1, keepdim=True).repeat(1, n)  # where all answers are in one class
    contested = (answer != answer[:, :1]).any(1).nonzero().flatten()
    if not len(contested):
        return score
    generator = torch.Generator().manual_seed(seed)
    circles = torch.rand(prompts, orders, n, generator=generator).argsort(2).to(answer.device)[contested]
    member = _members(answer[contested])
    per_sample = 1 + (correct[contested].long() << 32)  # count and hits in one number
    rows = max(1, _CHUNK // (2 * member[0].numel()))
    parts = [x.split(rows) for x in (contested, member, per_sample, vote[contested], circles)]
    for places, m, counted, voted, chunk in zip(*parts, strict=True):
        each, ballots = counted[:, :, None] * m, voted[:, :, None] * m
        score[places] = torch.stack([_runs(each, ballots, circle) for circle in chunk.unbind(1)]).mean(0)
    return score


def _members(answer: Tensor) -> Tensor:
    """Tell which class each sample is in; (P, N, C) bool for C classes, numbered by first appearance.

    A sample without an answer is in no class.
    """
    place = torch.arange(answer.shape[1], device=answer.device)
    first = (answer[:, :, None] == answer[:, None, :]).int().argmax(2)  # (P, N), where the class appears first
    founds = (first == place) & (answer >= 0)
    label = (founds.cumsum(1) - 1).gather(1, first)
    classes = max(1, int(founds.sum(1).max()))
    return (label[:, :, None] == place[:classes]) & (answer >= 0)[:, :, None]


def _runs(each: Tensor, vote: Tensor, circle: Tensor) -> Tensor:
    """Return the mean score over the N runs of n neighbours on a circle, for n = 1 … N; (P, N).

    A run scores the share of correct samples in the classes with the most votes, 0 without samples. A class without
    samples may tie at 0 votes, but adds nothing.

    Args:
        each: (P, N, C) long, for a sample in its class 1, and 2^32 more if it is correct; else 0.
        vote: (P, N, C) long, the vote of each sample for its class; else 0.
        circle: (P, N) long, the order of the samples on the circle.
    """
    n = circle.shape[1]
    twice = circle.repeat(1, 2)[:, :, None].expand(-1, -1, each.shape[2])
    sums, totals = (torch.nn.functional.pad(x.gather(1, twice).cumsum(1), (0, 0, 1, 0)) for x in (each, vote))
    scores = []
    for size in range(1, n + 1):
        total = totals[:, size : size + n] - totals[:, :n]
        wins = total == total.amax(-1, keepdim=True)
        won = ((sums[:, size : size + n] - sums[:, :n]) * wins).sum(-1)
        hits, count = won >> 32, won & (2**32 - 1)
        scores.append((hits.double() / count.clamp(min=1)).mean(1))
    return torch.stack(scores, 1)


def _units(confidence: Tensor) -> Tensor:
    """Express confidences as whole numbers of the smallest decimal that their type keeps, 1e-15 for float64.

    So equal sums tie (0.1 + 0.2 and 0.3), in whatever order they are added.
    """
    return (confidence.double().nan_to_num() / torch.finfo(confidence.dtype).resolution).round().long()


def _chance_of_being_best(n: int) -> Tensor:
    """Return (n, n): at [r, k - 1] the chance that rank r is the best of k out of n samples, from exact integers."""
    table = [[math.comb(n - 1 - r, k - 1) / math.comb(n, k) for k in range(1, n + 1)] for r in range(n)]
    return torch.tensor(table, dtype=torch.double).reshape(n, n)


def _check(answer: Tensor, correct: Tensor, other: Tensor) -> None:
    """Raise ValueError if shapes differ, or a sample without an answer is marked correct."""
    if answer.ndim != 2 or not answer.shape == correct.shape == other.shape:
        raise ValueError(f"expected three tensors of shape (P, N), got {answer.shape}, {correct.shape}, {other.shape}")
    if bool((correct.bool() & (answer < 0)).any()):
        raise ValueError("a sample is marked correct but has no answer (-1)")


def answer_classes(prompts: Sequence[Sequence[str | None]], equivalent: Equivalent) -> list[list[int]]:
    """Sort the answers of each prompt into classes of equal answers.

    In each round, the first text of each prompt without a class founds one. Every other text of the prompt without a
    class is compared with it, all prompts in one call. So there are at most as many calls of `equivalent` as the
    largest number of classes. Texts that differ only in white space around them are equal without a comparison. Where
    equivalence is not transitive, a text joins the first founder that it equals.

    Args:
        prompts: the answers of each prompt.
        equivalent: tells which pairs of answers are equal.

    Returns:
        For each prompt, the class of each answer. Classes are numbered in the order in which they appear; None and
        blank answers have -1.
    """
    stripped = [[(answer or "").strip() for answer in answers] for answers in prompts]
    classes = [{"": -1} for _ in prompts]
    waiting = [[text for text in dict.fromkeys(texts) if text] for texts in stripped]
    number = 0
    while any(waiting):
        pairs = [(p, text) for p, texts in enumerate(waiting) for text in texts[1:]]
        equal = equivalent([(text, waiting[p][0]) for p, text in pairs]) if pairs else []
        joined = {pair for pair, joins in zip(pairs, equal, strict=True) if joins}
        for p, texts in enumerate(waiting):
            members = texts[:1] + [text for text in texts[1:] if (p, text) in joined]
            classes[p] |= dict.fromkeys(members, number)
            waiting[p] = [text for text in texts if text not in classes[p]]
        number += 1
    return [[found[text] for text in texts] for texts, found in zip(stripped, classes, strict=True)]
