r"""Make the training file of the paper's recipe, MATH and DAPO, with the columns problem and answer.

    python examples/math_dapo.py math_dapo.jsonl --math MATH… --dapo DAPO… --held-out math500.jsonl aime.jsonl

A source is a file (.jsonl, .json, .parquet, .csv) or a hub data set (name:config:split). MATH has the columns problem
and solution, and its answer is the last \boxed{} of the solution. DAPO has the columns prompt and solution, and its
solution is the answer. What stands twice, what stands among the held-out problems, and what the verifier cannot read is
left out and counted.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bae.files import write_atomically
from bae.tasks.tables import read_table
from bae.text.verifier import MathVerifier


def last_boxed(solution: str) -> str | None:
    r"""Return the content of the last \boxed{…}, with balanced braces; None without one."""
    start = solution.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(solution)) if start >= 0 else ():
        if solution[i - 1] != "\\":  # \{ is a bracket that is shown
            depth += {"{": 1, "}": -1}.get(solution[i], 0)
        if depth == 0:
            return solution[start + 7 : i].strip()
    return None


def rows(math: list[str], dapo: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (problem, answer) of all sources."""
    for source in math:
        yield from ((str(row["problem"]), last_boxed(str(row["solution"]))) for row in read_table(source))
    for source in dapo:
        yield from ((str(row["prompt"]), str(row["solution"]).strip()) for row in read_table(source))


def key(problem: str) -> str:
    """Return what two problems share if they are the same but for spaces, case and punctuation."""
    return re.sub(r"[\W_]", "", problem).lower()


def choose(math: list[str], dapo: list[str], held_out: list[str]) -> tuple[list[dict[str, str]], Counter[str]]:
    """Return the problems to train on, and how many were left out for which reason."""
    verifier = MathVerifier()
    tests = {key(str(row["problem"])) for source in held_out for row in read_table(source)}
    chosen: dict[str, dict[str, str]] = {}
    left_out: Counter[str] = Counter()
    for problem, answer in rows(math, dapo):
        same = key(problem)
        if same in tests or same in chosen:
            left_out["held out" if same in tests else "twice"] += 1
        elif answer is None or verifier.fault(answer):
            left_out["no answer that the verifier can read"] += 1
        else:
            chosen[same] = {"problem": problem, "answer": answer}
    return list(chosen.values()), left_out


def main(arguments: list[str] | None = None) -> None:
    """Write the file, and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    for name in ("math", "dapo", "held-out"):
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="SOURCE")
    given = parser.parse_args(arguments)
    chosen, left_out = choose(given.math, given.dapo, given.held_out)
    write_atomically(given.file, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in chosen))
    print(f"{given.file}: {len(chosen)} problems; left out: {dict(left_out)}")


if __name__ == "__main__":
    main()
