"""The value of a stated number, token by token: what the policy's own distribution over it promises. Pure torch.

The reward of a number is known for every number that might have been stated. So once the text of the section holds the
decimal point, each further token is a *decision* among alternatives that have values of their own, and the expected
reward before it needs no rollouts (Rao-Blackwell). The tokens before the point count as text. What "1" would have led
to where "0" was drawn cannot be read off the branch that was sampled, and a value that depended on the token that it
judges would bias the gradient.

Three things stay approximate. A number that may go on is worth what the others that begin so earned, whatever their
prompts. A closing tag that has begun is taken to be finished. A number that a space follows is taken to be ended.
Completions with a malformed number have decisions too, up to the token that breaks the form, because the expectations
of all completions must count them.

    N  completions     D  decisions of a completion     C  candidates     S  texts of a number so far (states)
    U  different reports     E  depths: decimals that a beginning of a report has
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bae.text.number import Number, parse_confidence

Score = Callable[[Tensor, Tensor], Tensor]
"""A scoring rule: (q, c) that broadcast -> the reward of each, elementwise."""

Report = tuple[bytes, float | None]
"""A number's content and value, as it was stated."""

Stated = Counter[tuple[str, float | None]]
"""How often each different report with a point was made: {(text, value): times}."""

DIGITS, SPACES = "0123456789.", " \t\n\r\f\v"
CACHED_STATES = 1024  # of C times 16 bytes each


class Candidates:
    """Hold the C tokens by which a number can go on or end, found once for a tokenizer.

    They are digits, points and whitespace, and then as much of the closing tag as the token has room for.

    Args:
        vocabulary: the bytes of each token id, of `bae.text.tokens.token_bytes`.
        closing_tag: the text that ends a number.

    Attributes:
        ids: (C,) long.

    Raises:
        ValueError: for a closing tag that begins as a number goes on.
    """

    def __init__(self, vocabulary: Sequence[bytes], closing_tag: str = "</confidence>") -> None:
        self.end = closing_tag[0]
        if self.end in DIGITS:
            raise ValueError(f"closing tag {closing_tag!r} of a stated number: it must not begin as a number goes on")
        closing = closing_tag.encode()
        signs = (DIGITS + SPACES).replace(self.end, "").encode()  # the end of a line may be the closing tag
        rests = [piece.lstrip(signs) for piece in vocabulary]
        agrees = [closing.startswith(rest) or rest.startswith(closing) for rest in rests]
        ids = [i for i, piece in enumerate(vocabulary) if piece and agrees[i]]
        self.ids = torch.tensor(ids, dtype=torch.long)
        self.pieces = [_text(vocabulary[i]) for i in ids]
        self._readings: dict[str, tuple[Tensor, Tensor]] = {}

    def readings(self, state: str) -> tuple[Tensor, Tensor]:
        """Read the number after each candidate.

        Args:
            state: the text of the section so far, with a point, without leading whitespace.

        Returns:
            numbers: (C,) float64, NaN where there is no number and there will be none.
            decimals: (C,) long, how many decimals it has if it may go on, else 0.
        """
        if state not in self._readings:
            if len(self._readings) >= CACHED_STATES:
                self._readings.clear()
            numbers, decimals = [], []
            for piece in self.pieces:
                text = state + piece
                # More digits only make it larger and longer, so what cannot be read now never will be. The same holds
                # after the first sign of the closing tag, if no closing tag followed.
                number = None if self.end in state else parse_confidence(text.partition(self.end)[0])
                ended = number is None or self.end in text or text[-1].isspace()
                numbers.append(torch.nan if number is None else number)
                decimals.append(0 if ended else len(text) - text.index(".") - 1)
            self._readings[state] = torch.tensor(numbers, dtype=torch.float64), torch.tensor(decimals, dtype=torch.long)
        return self._readings[state]


@dataclass(frozen=True)
class Decisions:
    """Hold what N completions decided, and what each alternative would have earned.

    Attributes:
        position: (N, D) long, the completion token chosen at each decision, -1 where there is none. The decisions of a
            row come first.
        value: (N, D, C), the reward if the candidate is chosen.
        ids: (C,), the candidates.
        other: the reward of any other token, which makes the number malformed.
        final: (N,), what the number earns, whatever comes after it; `other` if it cannot be read.
    """

    position: Tensor
    value: Tensor
    ids: Tensor
    other: float
    final: Tensor

    def rows(self, index: Tensor) -> "Decisions":
        """Return the decisions of a micro-batch; index: (B,) long."""
        return replace(self, position=self.position[index], value=self.value[index], final=self.final[index])

    def to(self, device: torch.device | str) -> "Decisions":
        """Return the same on a device."""
        position, value, ids, final = (x.to(device) for x in (self.position, self.value, self.ids, self.final))
        return replace(self, position=position, value=value, ids=ids, final=final)


def find_decisions(
    numbers: Sequence[Number | None],
    correct: Tensor,
    score: Score,
    other: float,
    candidates: Candidates,
    reports: Sequence[Report],
    own: int = 0,
) -> Decisions:
    """Find where N numbers were decided, and the value of each candidate there.

    A candidate that ends the number is worth its score. A candidate after which it may go on is worth the mean of what
    the other reports that begin so earned (`other` if they were malformed). If there are no such reports, it is worth
    the score of what stands, plus the mean of what the other reports have after as many decimals. One's own report
    never enters one's own values.

    Args:
        numbers: N, None for completions that began no number.
        correct: (N,), 0 or 1. Its dtype is that of the values.
        score: the scoring rule.
        other: the reward of a malformed number.
        candidates: the tokens by which a number can go on or end.
        reports: the numbers of the whole batch, all ranks together. From `own` on they are those of `numbers`.

    Raises:
        ValueError: if they are not.
    """
    mine = [(number.content, number.value) for number in numbers if number is not None]
    if mine != list(reports[own : own + len(mine)]):
        raise ValueError(f"reports[{own}:{own + len(mine)}] are not those of the numbers")
    stated = Counter((_text(content).strip(), q) for content, q in reports if b"." in content)
    found, states, rows = _decided(numbers, correct, stated)
    width = max(map(len, found), default=0)
    padded = [decided + [(-1, -1)] * (width - len(decided)) for decided in found]
    position, row = torch.tensor(padded, dtype=torch.long).view(len(found), width, 2).unbind(-1)
    table = correct.new_zeros(len(rows) + 1, len(candidates.ids))  # the last row is for no decision
    if rows:
        table[:-1] = _values(states, torch.tensor(rows), stated, score, other, candidates, correct.dtype)
    q = torch.tensor([torch.nan if n is None or n.value is None else n.value for n in numbers], dtype=correct.dtype)
    final = torch.where(q.isnan(), other, score(q, correct))
    return Decisions(position, table[row], candidates.ids, other, final)


def _decided(
    numbers: Sequence[Number | None], correct: Tensor, stated: Stated
) -> tuple[list[list[tuple[int, int]]], list[str], list[tuple[int, int, int]]]:
    """Return for each number its decisions as (token position, row), the S states, and the R rows.

    A row is a state, the own report (-1 if it is none of `stated`) and an outcome. Completions that agree in these
    share it.
    """
    report_of = {report: u for u, report in enumerate(stated)}
    states: dict[str, int] = {}
    rows: dict[tuple[int, int, int], int] = {}
    found: list[list[tuple[int, int]]] = []
    for number, c in zip(numbers, correct.long().tolist(), strict=True):
        found.append([])
        if number is None:
            continue
        report = report_of.get((_text(number.content).strip(), number.value), -1)  # -1: no point, so no decision
        for place, offset in enumerate(number.offsets, number.first):
            if b"." in number.content[:offset]:
                state = states.setdefault(_text(number.content[:offset]).lstrip(), len(states))
                found[-1].append((place, rows.setdefault((state, report, c), len(rows))))
    return found, list(states), list(rows)


class _Beginnings(NamedTuple):
    """Hold how reports begin, up to each number of decimals, and what they earned.

    The number of decimals tells a beginning that has fewer decimals from one that has as many.

    Attributes:
        number: {(beginning, depth): its number}.
        start: (U, E) long, the beginnings of each report.
        total: (beginnings + 1, 3), how many reports begin so, and what they earned under either outcome. The last row
            is for none.
    """

    number: dict[tuple[str, int], int]
    start: Tensor
    total: Tensor


def _values(
    states: Sequence[str],
    rows: Tensor,
    stated: Stated,
    score: Score,
    other: float,
    candidates: Candidates,
    dtype: torch.dtype,
) -> Tensor:
    """Return (R, C): what each candidate is worth in each row.

    rows: (R, 3) of a state, an own report (one of `stated`) and an outcome.
    """
    number, decimals = map(torch.stack, zip(*map(candidates.readings, states), strict=True))  # (S, C)
    depths = int(decimals.max()) + 1 if decimals.numel() else 1
    q = torch.tensor([torch.nan if q is None else q for _, q in stated], dtype=dtype)
    times = torch.tensor(list(stated.values()), dtype=dtype)
    cuts = [[text[: text.index(".") + 1 + depth] for depth in range(depths)] for text, _ in stated]
    scores = _scores(q, score, other)
    beginnings = _beginnings(cuts, times, scores)
    tail = _tails(cuts, q, times)

    state, report, outcome = rows.unbind(1)
    at = torch.tensor(_places(states, decimals, candidates, beginnings), dtype=torch.long)[state]
    depth, number, c = decimals[state], number[state].to(dtype), outcome.unsqueeze(1)
    own = (beginnings.start[report].gather(1, depth) == at).to(dtype)  # leave-one-out: one's own report begins so
    count = beginnings.total[at, 0] - own
    mean = (beginnings.total[at, 1 + c] - own * scores[report.unsqueeze(1), c]) / count
    guess = (number + (depth > 0) * tail[report].gather(1, depth)).clamp(max=1)
    alone = score(guess, c.to(dtype).expand_as(guess))
    return torch.where(number.isnan(), other, torch.where(count > 0, mean, alone))


def _scores(q: Tensor, score: Score, other: float) -> Tensor:
    """Return (U, 2): what each report earns under either outcome; `other` where it is NaN."""
    scores = score(*torch.broadcast_tensors(q.unsqueeze(1), torch.tensor([0, 1], dtype=q.dtype)))
    return torch.where(q.isnan().unsqueeze(1), other, scores)


def _beginnings(cuts: Sequence[Sequence[str]], times: Tensor, scores: Tensor) -> _Beginnings:
    """Sum up the reports that begin alike. cuts: U lists of E texts. times: (U,). scores: (U, 2)."""
    number: dict[tuple[str, int], int] = {}
    start = torch.tensor([[number.setdefault((cut, d), len(number)) for d, cut in enumerate(row)] for row in cuts])
    sums = times.unsqueeze(1) * torch.cat([torch.ones_like(scores[:, :1]), scores], 1)
    total = times.new_zeros(len(number) + 1, 3)
    total = total.index_add(0, start.flatten(), sums.repeat_interleave(len(cuts[0]) if cuts else 0, 0))
    return _Beginnings(number, start, total)


def _tails(cuts: Sequence[Sequence[str]], q: Tensor, times: Tensor) -> Tensor:
    """Return (U, E): what the other readable reports have on average after as many decimals.

    Without others it is half of the last decimal.
    """
    readable = ~q.isnan()
    cut_off = torch.tensor([[parse_confidence(cut) or 0.0 for cut in row] for row in cuts], dtype=q.dtype)
    tail = torch.where(readable.unsqueeze(1), q.unsqueeze(1) - cut_off, 0.0)
    half = torch.tensor([0.5 * 0.1**depth for depth in range(tail.shape[1])], dtype=q.dtype).expand_as(tail)
    others = ((times * readable).sum() - readable.to(q.dtype)).unsqueeze(1)
    return torch.where(others > 0, (times @ tail - tail) / others.clamp(min=1), half)


def _places(
    states: Sequence[str], decimals: Tensor, candidates: Candidates, beginnings: _Beginnings
) -> list[list[int]]:
    """Return (S, C): the number of the beginning that each candidate makes of each state, -1 if no report has it."""
    return [
        [beginnings.number.get((text + piece, depth), -1) for piece, depth in zip(candidates.pieces, row, strict=True)]
        for text, row in zip(states, decimals.tolist(), strict=True)
    ]


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")


def candidate_log_probs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities of the candidates at the decisions, in nats, at the sampling temperature.

    Args:
        logits: (B, D, V), the distributions that the decisions were drawn from; some finite numbers for no decision.
        ids: (C,), the candidates.
        temperature: of sampling.

    Returns:
        (B, D, C) in fp32.
    """
    return torch.log_softmax(logits.float() / temperature, dim=-1)[..., ids]


def all_action(log_probs: Tensor, decisions: Decisions) -> Tensor:
    """Return the expected reward at each decision less `other`, as a differentiable function of the policy.

    It is sum_c pi(c) (value(c) - other), (B, D), zero where there is no decision. Its gradient is the expectation of
    the sampled token's: the all-action policy gradient (Mean Actor Critic, arXiv 1709.00503). log_probs: (B, D, C).
    """
    return (log_probs.exp() * (decisions.value - decisions.other)).sum(-1) * (decisions.position >= 0)


def expected(log_probs: Tensor, decisions: Decisions) -> Tensor:
    """Return V_d, the expected reward before decision d, zero where there is none; (B, D).

    V_d = sum_c pi(c) value(c) + (1 - sum_c pi(c)) other. log_probs: (B, D, C).
    """
    return all_action(log_probs, decisions) + decisions.other * (decisions.position >= 0)


def token_advantages(
    advantage: Tensor, reward: Tensor, values: Tensor, decisions: Decisions, in_block: Tensor
) -> Tensor:
    """Return the advantage of each token of the block, for one objective; (B, T), zero outside the block.

    Before the first decision it is V_1 - b, with b = reward - advantage. At decision d it is V_{d+1} - V_d, and what
    the number earns stands for the V after the last. After the number it is reward - what the number earns, which is 0
    in a completion in form. So one token of each kind add up to `advantage`. Every token of a row without decisions
    gets `advantage` itself.

    Args:
        advantage, reward: (B,).
        values: (B, D), of `expected`.
        decisions: of the B completions.
        in_block: (B, T) bool.
    """
    decides, final = decisions.position >= 0, decisions.final.unsqueeze(1)
    steps = torch.cat([torch.where(decides, values, final), final], 1)  # V_1 … V_D, then what came of it
    place = decisions.position.clamp(min=0)
    at = torch.zeros_like(in_block, dtype=torch.long).scatter_add(1, place, decides.long())
    begun = at.cumsum(1) > 0
    some = decides.any(1, keepdim=True)
    before = advantage.unsqueeze(1) + torch.where(some, steps[:, :1] - reward.unsqueeze(1), 0.0)
    after = (reward.unsqueeze(1) - final) * (at == 0)
    return torch.where(begun, after, before).scatter_add(1, place, steps.diff(dim=1) * decides) * in_block
