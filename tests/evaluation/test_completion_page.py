"""What a person sees of a completion, and that nothing in the page can act."""

import math
from html.parser import HTMLParser

import pytest
import torch

from bae.batch import Advantages, Problem
from bae.commands.score import tokenised
from bae.evaluation.completion_page import GroupView, number, page, shade, signed
from bae.evaluation.completion_view import Viewer
from bae.objectives import Objective
from bae.objectives.brier import brier
from bae.objectives.correctness import correctness
from bae.objectives.scoring import Scorer
from bae.text.blocks import make_blocks
from bae.text.verdict import Verdict
from bae.text.verifier import IntegerVerifier

BLOCKS = make_blocks({"solution": ["reasoning", "answer"], "confidence": ["analysis", "confidence"]})
OBJECTIVES = [
    Objective("correctness", "solution", worst=0.0, reward=correctness),
    Objective("brier", "confidence", worst=-1.0, score=brier, given="correctness"),
]
RIGHT = "<reasoning>2+3</reasoning><answer>5</answer>"
SURE = "<analysis>é</analysis><confidence>0.9</confidence>"
HOSTILE = [
    "<script>alert(1)</script>", "</style><script>", "</bdi></div><img src=x onerror=alert(1)>",
    "\" onload='x' {{ 7*7 }}",
    "\u202egnp.exe\u2066", "\x1b]0;x\x07\0\r", "&lt;script&gt; &#60;b&#62;", "<!-- ", "]]>", "\ufeff\u2028\u200b",
]  # fmt: skip


def viewer(raw, problem=None, **more):
    """The viewer of one completion, given as bytes, each a token."""
    vocabulary, samples = tokenised(None, raw)
    scorer = Scorer(BLOCKS, OBJECTIVES, IntegerVerifier(), vocabulary)
    scored = scorer([problem or Problem("p", "2+3=", "5")], samples)
    return Viewer(samples, scored, scorer, group_size=1, **more)


def html(view, problem=None, characters=4000):
    return page("Step 1", [GroupView(problem or Problem("p", "2+3=", "5"), [view], size=1, right=0)], characters)


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text outside of its style."""

    def __init__(self, source):
        super().__init__()
        self.found, self.text, self._inside = [], "", ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        self.text += data if self._inside != "style" else ""


def test_a_completion_in_form():
    seen = viewer((RIGHT + SURE).encode()).view(0)
    assert (seen.kind, seen.answers, seen.confidences) == ("right", (("5", Verdict.CORRECT),), (0.9,))
    assert [(b.name, b.text, b.broken, b.faults) for b in seen.blocks] == [
        ("solution", RIGHT, "", ()),
        ("confidence", SURE, "", ()),
    ]
    assert seen.blocks[1].tokens == len(SURE.encode()) + 1  # with the end of sequence
    (brier_view,) = seen.blocks[1].objectives
    assert brier_view.reward == pytest.approx(-0.01) and brier_view.given == "correctness"


@pytest.mark.parametrize(
    ("text", "pieces", "fault"),
    [
        (RIGHT + "<analysis>é", [(RIGHT, ""), ("", "<analysis>é")], "</analysis> was due, but the text ended"),
        (RIGHT + "é<confidence>1", [(RIGHT, ""), ("", "é<confidence>1")], "<analysis> was due, but <confidence> came"),
        (RIGHT + SURE + "<answer>", [(RIGHT, ""), (SURE, "<answer>")], "<answer> came after the last section"),
        ("prose", [("", "prose"), ("", "")], "<reasoning> was due, but the text ended"),
        (RIGHT + SURE.replace("0.9", "90%"), [(RIGHT, ""), (SURE.replace("0.9", "90%"), "")], "no plain number"),
    ],
)
def test_what_is_malformed_is_marked_with_the_reason(text, pieces, fault):
    seen = viewer(text.encode()).view(0)
    assert seen.kind == "malformed" and [(b.text, b.broken) for b in seen.blocks] == pieces
    ((reason,),) = [b.faults for b in seen.blocks if b.faults]
    assert fault in reason
    shown = Elements(html(seen))
    assert reason in shown.text
    assert any("broken" in a.get("class", "") for _, a in shown.found) == any(broken for _, broken in pieces)


def test_a_block_that_was_never_reached_earned_nothing():
    seen = viewer(b"<reasoning>").view(0)
    assert [b.tokens for b in seen.blocks] == [12, 0] and seen.blocks[1].faults == ()
    assert seen.blocks[1].objectives[0].reward is None and seen.blocks[1].advantage is None
    assert "never reached" in html(seen)


def test_advantages_baselines_and_outcomes():
    advantages = Advantages(
        per_objective=torch.tensor([[0.5, -0.25]]),
        per_block=torch.tensor([[0.5, -0.25]]),
        baselines=torch.tensor([[0.5, 0.24]]),
        outcomes=torch.tensor([[0.0, 1.0]]),
    )
    seen = viewer((RIGHT + SURE).encode(), advantages=advantages, outcomes=advantages.outcomes).view(0)
    ((first,), (second,)) = (b.objectives for b in seen.blocks)
    assert (first.baseline, first.advantage, first.outcome) == (0.5, 0.5, None)
    assert (round(second.baseline, 4), second.advantage, second.outcome, second.alike) == (0.24, -0.25, 1.0, 1)
    shades = [(a["class"], a["style"]) for tag, a in Elements(html(seen)).found if tag == "bdi" and "style" in a]
    assert shades == [("block-0 up", "--a:1.0"), ("block-1 down", "--a:0.5")]


def test_numbers_for_people():
    assert [number(None), number(math.nan), number(-math.inf), number(0.0625)] == ["-", "-", "-inf", "0.062"]
    assert [signed(0.5), signed(0.0), signed(-0.5), signed(None)] == ["+0.500", "0.000", "-0.500", "-"]
    assert [shade(None, 1.0), shade(math.nan, 1.0), shade(-0.5, 2.0), shade(0.0, 0.0)] == [0, 0, 0.25, 0]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_the_policy_or_the_data_wrote_cannot_act(hostile):
    text = f"<reasoning>{hostile}</reasoning><answer>{hostile}</answer>{hostile}{SURE}"
    problem = Problem(hostile, hostile, "5")
    plain = Elements(html(viewer(text.replace(hostile, "x").encode()).view(0)))
    shown = Elements(html(viewer(text.encode(), problem).view(0), problem))
    assert shown.found == plain.found  # the very elements and attributes of a harmless page
    for char in hostile:
        assert char in shown.text or f"⟨U+{ord(char):04X}⟩" in shown.text


def test_half_characters_can_be_written():
    seen = viewer(b"<reasoning>\xff\xc3\xed\xa0\x80</reasoning>").view(0)
    problem = Problem("p", "half a pair: \ud800", "5")
    assert "half a pair: ⟨U+D800⟩" in html(seen, problem).encode().decode()


def test_the_page_stands_alone():
    source = html(viewer((RIGHT + SURE).encode()).view(0))
    elements = Elements(source).found
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert "http:" not in source and "https:" not in source and "url(" not in source and "@import" not in source
    policies = [a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_size_of_a_page_is_bounded():
    short = len(html(viewer(b"<reasoning>").view(0), characters=100))
    seen = viewer(b"<reasoning>" + b"<" * 100_000).view(0)
    long = html(seen, Problem("p", "<" * 100_000, "5"), characters=100)
    assert len(long) < short + 2000 and "characters left out" in long


def test_each_kind_can_be_hidden():
    kinds = [viewer(text.encode()).view(0) for text in (RIGHT + SURE, RIGHT.replace(">5<", ">6<") + SURE, "prose")]
    source = page("Step 1", [GroupView(Problem("p", "2+3=", "5"), kinds, size=4, right=1)], 100)
    elements = Elements(source).found
    assert [a["class"] for tag, a in elements if tag == "article"] == ["right", "wrong", "malformed"]
    boxes = [a["id"] for tag, a in elements if tag == "input"]
    assert boxes == ["show-right", "show-wrong", "show-malformed"]
    assert all(f"body:has(#{box}:not(:checked)) article.{box[5:]} {{ display: none; }}" in source for box in boxes)
    assert "1 of 4 right · the first 3 are shown" in source
