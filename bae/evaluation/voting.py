"""Test-time scaling (paper, Fig. 2): what is the accuracy when n samples of a prompt are made into one answer?

Dimensions: P prompts, N samples of each. answer: (P, N) long, equal labels for equal answers of a prompt, -1 for none
(`answer_classes` makes them). correct: (P, N) bool. confidence: (P, N) float in [0, 1]; an unreadable one, NaN, is
worth 0. Results are (P, N) float64: the expected score of each prompt with n = 1 … N samples, drawn from its N without
replacement; their mean over prompts is the curve.

One rule for ties: a random sample among those that gave a tied answer is handed in. So a tie scores the share of
correct ones among them, and correctness decides nothing. The winner of a vote is a class of answers, and what is
handed in is a random member of it, which settles what a class scores whose members the verifier judges differently.
No answer wins only where there is no other, and is wrong.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_CHUNK = 2**22  # numbers in one tensor of votes, 32 MiB


CONFIDENT = ("maxconf", "weighted_maj")
"""The strategies that need confidences."""


def scaling(answer: Tensor, correct: Tensor, confidence: Tensor, orders: int = 32, seed: int = 0) -> dict[str, Tensor]:
    """Each strategy by name: pass@1, pass@k, maj, maxconf, weighted_maj. `orders` and `seed`: see `votes`.

    Raises ValueError if shapes differ, or a sample without an answer is marked correct.
    """
    return {
        "pass@1": pass_at_k(correct)[:, :1].expand(correct.shape),
        "pass@k": pass_at_k(correct),
        "maj": votes(answer, correct, torch.ones_like(answer), orders, seed),
        "maxconf": max_confidence(answer, correct, confidence),
        "weighted_maj": votes(answer, correct, _units(confidence), orders, seed),
    }


def metric_name(strategy: str) -> str:
    """What a strategy is called where metrics are logged: MLflow takes no @."""
    return f"scaling/{strategy.replace('@', '_at_')}"


def pass_at_k(correct: Tensor) -> Tensor:
    """Chance that one or more of k samples is correct, for k = 1 … N: 1 − C(N − c, k) / C(N, k) (Chen et al., 2021).

    As a product, 1 − Π_{i<k} (N − c − i) / (N − i), so that no binomial is ever formed. Exact.
    """
    wrong = (~correct.bool()).sum(1, keepdim=True)
    i = torch.arange(correct.shape[1], device=correct.device)
    return 1 - ((wrong - i).clamp(min=0).double() / (correct.shape[1] - i)).cumprod(1)


def max_confidence(answer: Tensor, correct: Tensor, confidence: Tensor) -> Tensor:
    """The answer of the most confident sample. Exact.

    With samples ranked, r = 0 the most confident, the r-th is the best of n with probability C(N − 1 − r, n − 1) /
    C(N, n); samples of equal confidence are in random order, so each scores their mean.
    """
    _check(answer, correct, confidence)
    level = torch.where(answer >= 0, _units(confidence), -1)  # those without an answer are last
    tied = (level[:, :, None] == level[:, None, :]).double()
    score = (tied @ correct.double()[:, :, None]).squeeze(2) / tied.sum(2)
    ranked = score.gather(1, level.argsort(dim=1, descending=True))
    return ranked @ _chance_of_being_best(answer.shape[1]).to(ranked.device)


def votes(answer: Tensor, correct: Tensor, vote: Tensor, orders: int = 32, seed: int = 0) -> Tensor:
    """The answer with the most votes; vote: (P, N) long, 0 or more. Ones: Maj; confidences in units: WeightedMaj.

    The subsets of n samples are the runs of n neighbours on a circle of the N samples: N runs on each of `orders`
    random circles for each prompt. A run is a uniformly random subset, so the mean is unbiased; as each circle treats
    all samples alike, it is exact for n = 1, N − 1 and N. Draws are functions of the seed and the prompt's place.
    """
    _check(answer, correct, vote)
    prompts, n = answer.shape
    if not prompts or not n:
        return torch.zeros(prompts, n, dtype=torch.double, device=answer.device)
    member = _members(answer)
    per_sample = torch.stack([torch.ones_like(vote), correct.to(vote.dtype), vote], -1)  # what a class sums up
    generator = torch.Generator().manual_seed(seed)
    circles = torch.rand(prompts, orders, n, generator=generator).argsort(2).to(answer.device)
    rows = max(1, _CHUNK // (2 * member[0].numel()))
    parts = zip(member.split(rows), per_sample.split(rows), circles.split(rows), strict=True)
    return torch.cat([torch.stack([_runs(m, x, circle) for circle in c.unbind(1)]).mean(0) for m, x, c in parts])


def _members(answer: Tensor) -> Tensor:
    """(P, N, K) bool: which class each sample is in, classes numbered by first appearance; none without an answer."""
    place = torch.arange(answer.shape[1], device=answer.device)
    first = (answer[:, :, None] == answer[:, None, :]).int().argmax(2)  # (P, N), where its class appears first
    founds = (first == place) & (answer >= 0)
    label = (founds.cumsum(1) - 1).gather(1, first)
    classes = max(1, int(founds.sum(1).max()))
    return (label[:, :, None] == place[:classes]) & (answer >= 0)[:, :, None]


def _runs(member: Tensor, per_sample: Tensor, circle: Tensor) -> Tensor:
    """Mean score over the N runs of n neighbours on the circle, n = 1 … N.

    member: (P, N, K), which class a sample is in. per_sample: (P, N, 3): 1, correct and vote. circle: (P, N) order.
    """
    n = circle.shape[1]
    by_class = member[:, :, :, None] * per_sample[:, :, None, :]
    twice = circle.repeat(1, 2)[:, :, None, None].expand(-1, -1, *by_class.shape[2:])
    sums = torch.nn.functional.pad(by_class.gather(1, twice).cumsum(1), (0, 0, 0, 0, 1, 0))
    scores = [_winner(*(sums[:, size : size + n] - sums[:, :n]).unbind(-1)).mean(1) for size in range(1, n + 1)]
    return torch.stack(scores, 1)


def _winner(count: Tensor, hits: Tensor, vote: Tensor) -> Tensor:
    """Share of correct samples among those of the classes with the most votes, 0 if there are none; over the last
    dimension, K. A class without samples may tie at 0 votes, but adds nothing."""
    wins = vote == vote.amax(-1, keepdim=True)
    return (hits * wins).sum(-1).double() / (count * wins).sum(-1).clamp(min=1)


def _units(confidence: Tensor) -> Tensor:
    """Confidences as whole numbers of the smallest decimal that their type keeps, 1e-15 for float64, so that equal
    sums tie (0.1 + 0.2 with 0.3) in whatever order they are added."""
    return (confidence.double().nan_to_num() / torch.finfo(confidence.dtype).resolution).round().long()


def _chance_of_being_best(n: int) -> Tensor:
    """[r, k - 1]: chance that of k out of n ranked samples the one of rank r is the best; integers until the end."""
    table = [[math.comb(n - 1 - r, k - 1) / math.comb(n, k) for k in range(1, n + 1)] for r in range(n)]
    return torch.tensor(table, dtype=torch.double).reshape(n, n)


def _check(answer: Tensor, correct: Tensor, other: Tensor) -> None:
    if answer.ndim != 2 or not answer.shape == correct.shape == other.shape:
        raise ValueError(f"want three tensors of shape (P, N), got {answer.shape}, {correct.shape}, {other.shape}")
    if bool((correct.bool() & (answer < 0)).any()):
        raise ValueError("a sample is marked correct but has no answer (-1)")


Equivalent = Callable[[Sequence[tuple[str, str]]], list[bool]]
"""Whether the two answers of each pair are equal, by a verifier. Either may be any text that a policy writes."""


def answer_classes(answers: Sequence[str | None], equivalent: Equivalent) -> list[int]:
    """The class of each of one prompt's answers, numbered as they appear; -1 for None and blank."""
    return answer_classes_of_prompts([answers], equivalent)[0]


def answer_classes_of_prompts(prompts: Sequence[Sequence[str | None]], equivalent: Equivalent) -> list[list[int]]:
    """`answer_classes` of many prompts, in at most as many calls of `equivalent` as the largest number of classes.

    In each round, the first text of each prompt that has no class yet founds one, and every other text of the prompt
    that has none is compared with it, all prompts in one call. Texts that are equal but for white space around them
    are not compared. Where equivalence is not transitive, a text joins the first founder that it equals.
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
