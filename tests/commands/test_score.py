"""bae-score as a user meets it: a text, a file or the standard input, and what is refused."""

import io
import sys
from types import SimpleNamespace

import pytest

from bae.commands import score as command

RIGHT = "<reasoning>1+1=2</reasoning><answer>2</answer>"
SURE = "<analysis>sure</analysis><confidence>0.9</confidence>"


@pytest.fixture
def score(tmp_path, monkeypatch, capsys):
    """Run bae-score in this process, in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bae-score", *arguments])
        command.main()
        return capsys.readouterr().out

    return run


def table(out):
    """{objective: the rest of its row}."""
    rows = out.partition("outcome of the prefix\n")[2].strip().splitlines()
    return {row.split()[0]: row.split()[1:] for row in rows}


def test_a_text(score):
    out = score(RIGHT + SURE, "reference=2")
    assert "solution, characters 0 to 46, in form" in out and "confidence, characters 46 to 99, in form" in out
    assert "answer      2: correct, it equals the reference" in out
    assert table(out) == {
        "correctness": ["solution", "1.0000"],
        "confidence_brier": ["confidence", "-0.0100", "1,", "by", "correctness"],
    }


def test_a_file_and_the_standard_input_are_the_same(score, tmp_path, monkeypatch):
    (tmp_path / "own.txt").write_text(RIGHT + SURE)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO((RIGHT + SURE).encode())))
    assert score("own.txt", "reference=3") == score("-", "reference=3") == score("reference=3", RIGHT + SURE)


def test_malformed_output_says_why_and_earns_the_worst(score):
    out = score(f"{RIGHT}<analysis>\x1b[2Jhm", "reference=2", "objectives.malformed=zero")
    assert "malformed: </analysis> was due" in out
    assert "  ! <analysis>⟨U+001B⟩[2Jhm\n" in out and "\x1b" not in out
    assert table(out)["confidence_brier"][1] == "0.0000"


def test_lines_are_short(score):
    out = score(f"<reasoning>{'word ' * 200}{'x' * 300}</reasoning>", "reference=2")
    assert max(map(len, out.splitlines())) <= 80
    assert "confidence, never reached" in out and "answer      none" in out


def test_a_reference_in_latex_needs_no_quotes(score):
    text = RIGHT.replace(">2<", r">\frac{1}{2}<")
    out = score(text, r"reference=\frac12", "task=gsm8k")
    assert r"answer      \frac{1}{2}: correct" in out


@pytest.mark.parametrize(
    "value", [r"\frac{1}{2}", "it's", "a\\", "\\'", "[1, 2]", "x=3", "{a: b}", "", "1", '"quoted"', " "]
)
def test_references_are_read_as_they_stand(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    _, (argument,) = command.split([f"reference={value}"])
    assert OverridesParser.create().parse_override(argument).value() == value


def test_what_is_a_completion_and_what_is_for_hydra():
    arguments = ["--config-dir", "my/conf", "1+1=2", "task=gsm8k", "+a.b=1", "~c", "--cfg", "-", "baseline@x=ocb"]
    texts, others = command.split(arguments)
    assert texts == ["1+1=2", "-"] and others == [a for a in arguments if a not in texts]


def test_a_page(score, tmp_path):
    out = score(RIGHT + "<script>", "reference=2", "html=pages/own.html")
    assert "page  pages/own.html" in out
    source = (tmp_path / "pages" / "own.html").read_text()
    assert "&lt;script&gt;" in source and "<script>" not in source and "bytes" in source


def test_tokens_are_counted_by_a_tokenizer(score):
    from bae.training.policy import PACKAGE

    text = "<reasoning>12</reasoning><answer>2</answer>"
    out = score(text, "reference=2", f"tokenizer={PACKAGE / 'assets' / 'tiny'}")
    assert "solution, characters 0 to 43, 7 tokens" in out  # four tags and three digits
    assert "confidence, characters 43 to 43, 1 tokens, malformed" in out  # the end of sequence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a completion"),
        (["a", "b", "reference=2"], "one argument, in quotes"),
        ([" ", "reference=2"], "the completion is empty"),
        (["own.txt", "reference=2"], "own.txt: no such file"),
        ([".", "reference=2"], ".: it is a folder"),
        (["/proc/self/mem", "reference=2"], "/proc/self/mem: it cannot be read"),
        (["x" * 2_000_000, "reference=2"], "more than 1000000 bytes"),
        ([RIGHT], "give the right answer, reference="),
        ([RIGHT, "reference=two"], "reference=two: it is not an integer, or too long"),
        ([RIGHT, "reference=2", "html=."], "html=.: it is a folder"),
        ([RIGHT, "reference=2", "objectives=rlrc"], "objectives=rlrc: no such option"),
        ([RIGHT, "reference=2", "outcom=verdict"], "outcom"),
        ([RIGHT, "reference=2", "tokenizer=/no/such"], "tokenizer=/no/such: no such folder"),
        ([RIGHT, "reference=2", "objectives.rewards.correctness.block=x"], "block=x: no such block"),
    ],
)
def test_what_is_wrong_is_refused_in_one_sentence(score, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        score(*arguments)
    assert str(stopped.value.code).startswith("bae-score: ") and message in str(stopped.value.code)
    assert "\n" not in str(stopped.value.code)
