"""The value of a stated number, token by token: what the policy's own distribution over it promises. Pure torch.

The reward of a number is known for every number that might have been stated. So once the text of the section holds the
decimal point, each further token is a *decision* among alternatives that have values of their own, and the expected
reward before it needs no rollouts (Rao-Blackwell). The tokens before the point count as text: what "1" would have led
to where "0" was drawn cannot be read off the branch that was sampled, and a value that depended on the token that it
judges would bias the gradient.

What stays approximate: a number that may go on is worth what the others that begin so earned, whatever their prompts;
a closing tag that has begun is taken to be finished, and a number that a space follows to be ended. Completions that
spoil their number have decisions too, up to the token that spoils it, for the expectations of all reckon with that.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bae.text.number import Number, parse_confidence

Score = Callable[[Tensor, Tensor], Tensor]
Report = tuple[bytes, float | None]  # a number's content and value
CACHED_STATES = 1024  # of C times 16 bytes each


class Candidates:
    """The C tokens by which a number can go on or end, found once for a tokenizer: digits, points and whitespace, and
    then as much of the closing tag as the token has room for. ids: (C,) long."""

    def __init__(self, vocabulary: Sequence[bytes], closing_tag: str = "</confidence>"):
        """vocabulary: `bae.text.tokens.token_bytes` of the tokenizer. closing_tag: what ends a number.

        Raises ValueError for a closing tag that begins as a number goes on.
        """
        self.end = closing_tag[0]
        if self.end in "0123456789. \t\n\r\f\v":
            raise ValueError(f"closing tag {closing_tag!r} of a stated number: it must not begin as a number goes on")
        closing = closing_tag.encode()
        rests = [piece.lstrip(b"0123456789. \t\n\r\f\v") for piece in vocabulary]
        agrees = [closing.startswith(rest) or rest.startswith(closing) for rest in rests]
        ids = [i for i, piece in enumerate(vocabulary) if piece and agrees[i]]
        self.ids = torch.tensor(ids, dtype=torch.long)
        self.pieces = [_text(vocabulary[i]) for i in ids]
        self._readings: dict[str, tuple[Tensor, Tensor]] = {}

    def readings(self, state: str) -> tuple[Tensor, Tensor]:
        """(C,) float64, the number after each candidate, NaN where it is none and will be none; and (C,) long, its
        decimals where it may go on, else 0. state: the section so far, with a point, without leading whitespace."""
        if state not in self._readings:
            if len(self._readings) >= CACHED_STATES:
                self._readings.clear()
            numbers, decimals = [], []
            for piece in self.pieces:
                text = state + piece
                # More digits only make it larger and longer: what cannot be read now never will be.
                # Nor what stands after the closing tag's first sign, which then began none.
                number = None if self.end in state else parse_confidence(text.partition(self.end)[0])
                ended = number is None or self.end in text or text[-1].isspace()
                numbers.append(torch.nan if number is None else number)
                decimals.append(0 if ended else len(text) - text.index(".") - 1)
            self._readings[state] = torch.tensor(numbers, dtype=torch.float64), torch.tensor(decimals, dtype=torch.long)
        return self._readings[state]


@dataclass(frozen=True)
class Decisions:
    """What N completions decided, and what each alternative would have earned.

    position: (N, D) long, the completion token chosen at each decision, -1 where there is none; a row's own come first.
    value: (N, D, C), the reward if the candidate is chosen. ids: (C,) the candidates.
    other: the reward of any other token, which spoils the format. final: (N,), what the number earns, whatever comes
    after it; `other` if it cannot be read.
    """

    position: Tensor
    value: Tensor
    ids: Tensor
    other: float
    final: Tensor

    def rows(self, index: Tensor) -> "Decisions":
        """Those of a micro-batch; index: (B,) long."""
        return replace(self, position=self.position[index], value=self.value[index], final=self.final[index])

    def to(self, device: torch.device | str) -> "Decisions":
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
    """Where N numbers were decided, and the value of each candidate there; of the dtype of `correct`.

    A candidate that ends the number is worth its score. One after which it may go on is worth the mean of what the
    other reports that begin so earned, `other` if they were spoilt; or if there are none the score of what stands, plus
    the mean of what the other reports have after as many decimals. One's own report never enters one's own values.

    numbers: None for completions that began none. correct: (N,), 0 or 1.
    score: the scoring rule, elementwise on (q, c) that broadcast. other: the reward of spoilt format.
    reports: of the numbers of the whole batch, all ranks together; from `own` on they are those of `numbers`, in order.
        Raises ValueError if they are not.
    """
    mine = [(number.content, number.value) for number in numbers if number is not None]
    if mine != list(reports[own : own + len(mine)]):
        raise ValueError(f"reports[{own}:{own + len(mine)}] are not those of the numbers")
    stated = Counter((_text(content).strip(), q) for content, q in reports if b"." in content)
    report_of = {report: u for u, report in enumerate(stated)}
    states: dict[str, int] = {}
    # One row of values for each state, own report and outcome; completions that agree in these share it.
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
    width = max(map(len, found), default=0)
    padded = [decided + [(-1, -1)] * (width - len(decided)) for decided in found]
    position, row = torch.tensor(padded, dtype=torch.long).view(len(found), width, 2).unbind(-1)
    table = correct.new_zeros(len(rows) + 1, len(candidates.ids))  # the last row is for no decision
    if rows:
        table[:-1] = _values(list(states), torch.tensor(list(rows)), stated, score, other, candidates, correct.dtype)
    q = torch.tensor([torch.nan if n is None or n.value is None else n.value for n in numbers], dtype=correct.dtype)
    final = torch.where(q.isnan(), other, score(q, correct))
    return Decisions(position, table[row], candidates.ids, other, final)


def _values(
    states: list[str],
    rows: Tensor,
    stated: Counter[tuple[str, float | None]],
    score: Score,
    other: float,
    candidates: Candidates,
    dtype: torch.dtype,
) -> Tensor:
    """(R, C): what each candidate is worth in each row. rows: (R, 3) of a state, an own report (one of `stated`) and an
    outcome. stated: how often each of the U different reports with a point was made."""
    number, decimals = map(torch.stack, zip(*map(candidates.readings, states), strict=True))  # (S, C)
    depths = range(int(decimals.max()) + 1 if decimals.numel() else 1)
    q = torch.tensor([torch.nan if q is None else q for _, q in stated], dtype=dtype)
    times = torch.tensor(list(stated.values()), dtype=dtype)
    readable = ~q.isnan()
    scores = score(*torch.broadcast_tensors(q.unsqueeze(1), torch.tensor([0, 1], dtype=dtype)))  # (U, 2)
    scores = torch.where(readable.unsqueeze(1), scores, other)

    # How each report begins, up to each number of decimals; that number tells what has fewer from what has as many.
    cuts = [[text[: text.index(".") + 1 + depth] for depth in depths] for text, _ in stated]
    begins: dict[tuple[str, int], int] = {}
    start = torch.tensor([[begins.setdefault((cut, d), len(begins)) for d, cut in enumerate(row)] for row in cuts])
    # Of each beginning: how many reports, and what they earned under either outcome; the last row is for none.
    sums = times.unsqueeze(1) * torch.cat([torch.ones_like(scores[:, :1]), scores], 1)
    total = q.new_zeros(len(begins) + 1, 3).index_add(0, start.flatten(), sums.repeat_interleave(len(depths), 0))
    # What the other readable ones have, on average, after as many decimals; without others, half of the last decimal.
    cut_off = torch.tensor([[parse_confidence(cut) or 0.0 for cut in row] for row in cuts], dtype=dtype)
    tail = torch.where(readable.unsqueeze(1), q.unsqueeze(1) - cut_off, 0.0)
    half = torch.tensor([0.5 * 0.1**depth for depth in depths], dtype=dtype).expand_as(tail)
    others = ((times * readable).sum() - readable.to(dtype)).unsqueeze(1)
    tail = torch.where(others > 0, (times @ tail - tail) / others.clamp(min=1), half)  # (U, depths)

    state, report, outcome = rows.unbind(1)
    begun = [
        [begins.get((text + piece, depth), -1) for piece, depth in zip(candidates.pieces, row, strict=True)]
        for text, row in zip(states, decimals.tolist(), strict=True)
    ]
    at, depth = torch.tensor(begun, dtype=torch.long)[state], decimals[state]
    number, c = number[state].to(dtype), outcome.unsqueeze(1)
    own = (start[report].gather(1, depth) == at).to(dtype)  # leave-one-out: one's own report begins so
    count = total[at, 0] - own
    mean = (total[at, 1 + c] - own * scores[report.unsqueeze(1), c]) / count
    guess = (number + (depth > 0) * tail[report].gather(1, depth)).clamp(max=1)
    alone = score(guess, c.to(dtype).expand_as(guess))
    return torch.where(number.isnan(), other, torch.where(count > 0, mean, alone))


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")


def candidate_log_probs(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the candidates at the decisions, in nats, at the sampling temperature; (B, D, C) in fp32.

    logits: (B, D, V), the distributions that the decisions were drawn from; where there is none, some finite numbers.
    ids: (C,), as in Decisions.
    """
    return torch.log_softmax(logits.float() / temperature, dim=-1)[..., ids]


def all_action(log_probs: Tensor, decisions: Decisions) -> Tensor:
    """The expected reward at each decision, less `other`, as a differentiable function of the policy; (B, D).

    sum_c pi(c) (value(c) - other), zero where there is no decision. Its gradient is what the sampled token's gives in
    expectation: the all-action policy gradient (Mean Actor Critic, arXiv 1709.00503). log_probs: (B, D, C).
    """
    return (log_probs.exp() * (decisions.value - decisions.other)).sum(-1) * (decisions.position >= 0)


def expected(log_probs: Tensor, decisions: Decisions) -> Tensor:
    """V_d, the expected reward before decision d, zero where there is none; (B, D).

    sum_c pi(c) value(c) + (1 - sum_c pi(c)) other. log_probs: (B, D, C).
    """
    return all_action(log_probs, decisions) + decisions.other * (decisions.position >= 0)


def token_advantages(
    advantage: Tensor, reward: Tensor, values: Tensor, decisions: Decisions, in_block: Tensor
) -> Tensor:
    """The advantage of each token of the block, for one objective; (B, T), zero outside the block.

    Before the first decision V_1 - b, with b = reward - advantage; at decision d V_{d+1} - V_d, what the number earns
    standing for the V after the last; after it reward - what the number earns, which is 0 in a completion in form. So
    one token of each of these add up to `advantage`, which is what every token of a row without decisions gets.

    advantage, reward: (B,). values: (B, D), of `expected`. in_block: (B, T) bool.
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
