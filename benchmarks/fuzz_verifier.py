"""Look for texts that the verifier takes wrongly, or that break it: python benchmarks/fuzz_verifier.py [--seconds 60].

Inputs are of two kinds, in turn. Perturbed references have another number, sign, variable, order, or a word or sign
that changes, hedges or denies them: none may be accepted. Hostile texts are random pieces of LaTeX, Unicode and
mutated references: none may raise, take more than --slow seconds of the processor, or be accepted for a number that is
not in them. Everything that was found is printed, and the exit code is then 1. The references are those of the tests'
tables, and those of math500.jsonl where the folder BAE_DATA has it.

A million inputs: `--seconds 0 --count 1000000`, or shards of it on several cores with `--seed 1`, `--seed 2`, ….
Inputs are made from numbers alone, so a seed repeats them. With `make atheris`, `--engine atheris` lets coverage of
bae/text choose the numbers: `--engine atheris --count 1000000`.
"""

import argparse
import csv
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bae.text.spelling import canonical
from bae.text.verdict import Verdict
from bae.text.verifier import _check

_words = str.split
ROOT = Path(__file__).parent.parent
WORDS = _words(
    "hundredths trillions thousand half halved dozen pairs couples times negative minus maybe incorrect "
    "approximately not wrong or perhaps false thirds squared factorial percentless base mod less inverse unlikely "
    "ish zillion twofold nope"
)
BEFORE = ["not ", "about ", "maybe ", "negative ", r"\approx ", "~", r"\neq ", ">", "2+", "7/", r"\text{not }", "?"]
AFTER = ["+1", ",1", "=1", "?", "...", "-", r"\cdot3x", "i", r"\infty", "x", " 7", ":7", r"\pm1", "_3"]
PIECES = [
    *_words(
        r"\frac \sqrt "
        r"\cdot \pi \infty \pm \cup \le \ge \in \text{ \begin{pmatrix} \end{pmatrix} \\ & \{ \} \boxed{ "
        r"\left( \right) \binom \sin \log_2 \ln ^{ _{ } { ( ) [ ] "
        r"| ! ^ _ = < > + - / * : ; , . % $ ~ ? 0 1 2 17 3.5 1e9 9^ x "
        "y n N i e and or to ½ ² √ ∞ −"  # noqa: RUF001
    ),
    *(" ", " dozen", " cm", "\ud800", "\x00", "\u0663", "x=", "1/0", "10^{10^{10}}", r"\overline{3}"),
]
ABSENT = "918273645"


def references() -> list[str]:
    """Return the references of the tests' tables, and those of MATH500 if they are at hand, without zero."""
    table = ROOT / "tests" / "text" / "answers" / "accepted.csv"
    with open(table, encoding="utf-8", newline="") as file:
        found = [row["reference"] for row in csv.DictReader(file)]
    path = Path(os.environ.get("BAE_DATA", ROOT.parent / "shared" / "data")) / "math500.jsonl"
    if path.exists():
        found += [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [text for text in dict.fromkeys(found) if text != "0" and canonical(text)]


def perturbed(reference: str, draw: random.Random) -> str:
    """Return the reference with one change that makes it wrong, or "" if the drawn change does not apply."""
    return draw.choice(CHANGES)(reference, draw)


def _number(reference: str, draw: random.Random) -> str:
    """Change the first digits of one number, so that no factor of an equation and no unit makes up for it."""
    runs = list(re.finditer("[0-9]+", reference))
    if not runs or "(-1)^" in reference:
        return ""
    run = draw.choice(runs)
    return reference[: run.start()] + str(int(run[0]) + draw.choice([1, 2, 9, 1000])) + reference[run.end() :]


def _sign(reference: str, draw: random.Random) -> str:
    if re.search(r"pm|,|<|>|=|\\le|\\ge|∅|emptyset|[±:]", reference):
        return ""
    return reference.strip()[1:] if reference.strip().startswith("-") else f"-{reference}"


def _word(reference: str, draw: random.Random) -> str:
    word = draw.choice(WORDS)
    return draw.choice(
        [f"{reference} {word}", rf"{reference}\text{{ {word}}}", f"{reference} ({word})", f"{word} {reference}"]
    )


def _letter(reference: str, draw: random.Random) -> str:
    """Swap the case of a variable, or put another letter in its place."""
    letters = list(re.finditer(r"(?<![A-Za-z\\{(])[a-zA-Z](?![A-Za-z})])", reference))
    if (
        not letters
        or "text" in reference
        or ":" in reference
        or re.search(r"[A-Za-z]{2}|\\in|<|>|≤|≥", re.sub(r"\\[A-Za-z]+", " ", reference))
    ):
        return ""
    letter = draw.choice(letters)[0]
    other = draw.choice([letter.swapcase(), "w" if letter != "w" else "v"])
    return re.sub(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", other, reference) if letter not in "ie" else ""


def _before(reference: str, draw: random.Random) -> str:
    return draw.choice(BEFORE) + reference


def _after(reference: str, draw: random.Random) -> str:
    return "" if reference.endswith("0") else reference + draw.choice(AFTER)  # 0x is 0


def _order(reference: str, draw: random.Random) -> str:
    """Reverse a tuple of numbers."""
    match = re.fullmatch(r"\((-?[0-9]+),\s*(-?[0-9]+)\)", reference)
    return f"({match[2]},{match[1]})" if match and match[1] != match[2] else ""


def _several(reference: str, draw: random.Random) -> str:
    return draw.choice([f"{reference}, 77", f"{reference} or 77", f"77, {reference}", f"{reference}={reference}+1"])


CHANGES: list[Callable[[str, random.Random], str]] = [_number, _sign, _word, _letter, _before, _after, _order, _several]


def hostile(known: list[str], draw: random.Random) -> str:
    """Return random pieces, or a reference with some of its characters cut out, doubled or replaced by pieces."""
    if draw.random() < 0.5:
        return "".join(draw.choice(PIECES) for _ in range(draw.randint(1, draw.choice([4, 12, 60]))))
    text = draw.choice(known)
    for _ in range(draw.randint(1, 4)):
        start = draw.randint(0, len(text))
        text = (
            text[:start]
            + draw.choice(["", draw.choice(PIECES), text[start : start + 3] * 2])
            + text[start + draw.randint(0, 3) :]
        )
    return text


def complaint(known: list[str], seed: int, slow: float) -> str:
    """Check one input of each kind. Returns what is wrong with the verifier, or "" if nothing is."""
    draw = random.Random(seed)
    reference = draw.choice(known)
    pairs = [(perturbed(reference, draw), reference, False)]
    text = hostile(known, draw)
    pairs += [(text, ABSENT, False), (text, reference, True)]
    for answer, wanted, may_be_right in pairs:
        start = time.process_time()
        try:
            verdict = _check(answer, wanted)
        except Exception as error:
            return f"raised {error!r}: {answer!r} for {wanted!r}"
        if time.process_time() - start > slow:
            return f"slow: {answer!r} for {wanted!r}"
        if verdict is Verdict.CORRECT and not may_be_right and ABSENT not in answer:
            return f"accepted: {answer!r} for {wanted!r}"
    return ""


def seeds(first: int, count: int, seconds: float) -> Iterator[int]:
    """Yield numbers until as many were tried, or the time is over; 0 is no limit."""
    end = time.monotonic() + seconds if seconds else float("inf")
    number = 0
    while (not count or number < count) and time.monotonic() < end:
        yield first * 10**9 + number
        number += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["random", "atheris"], default="random")
    parser.add_argument("--seconds", type=float, default=60, help="stop after this time; 0: no limit")
    parser.add_argument("--count", type=int, default=0, help="stop after so many inputs; 0: no limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", type=float, default=1.0, help="seconds of the processor that one check may take")
    options = parser.parse_args()
    known = references()
    if options.engine == "atheris":
        return guided(known, options)
    tried, found = 0, []
    for seed in seeds(options.seed, -(-options.count // 3), options.seconds):
        tried += 3
        if problem := complaint(known, seed, options.slow):
            found.append(problem)
            print(problem, flush=True)
    print(f"{tried} inputs, {len(found)} complaints")
    sys.exit(1 if found else 0)


def guided(known: list[str], options: argparse.Namespace) -> None:
    """Let atheris choose texts by the coverage of bae/text. It ends the process, with a traceback at a complaint."""
    import atheris  # make atheris

    from bae.text import answers, expressions, literals, spelling, units, values

    for module in (answers, expressions, literals, spelling, units, values):
        for value in list(vars(module).values()):
            if hasattr(value, "__code__") and getattr(value, "__module__", "") == module.__name__:
                setattr(module, value.__name__, atheris.instrument_func(value))

    def check(data: bytes) -> None:
        provider = atheris.FuzzedDataProvider(data)
        if problem := complaint(known, provider.ConsumeInt(6), options.slow):
            raise AssertionError(problem)
        text = "".join(
            PIECES[provider.ConsumeIntInRange(0, len(PIECES) - 1)] for _ in range(provider.ConsumeIntInRange(1, 40))
        )
        if ABSENT not in text and _check(text, ABSENT) is Verdict.CORRECT:
            raise AssertionError(f"accepted: {text!r}")
        _check(text, known[provider.ConsumeIntInRange(0, len(known) - 1)])

    limits = [f"-runs={-(-options.count // 5)}"] if options.count else []
    limits += [f"-max_total_time={int(options.seconds)}"] if options.seconds else []
    atheris.Setup([sys.argv[0], *limits], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
