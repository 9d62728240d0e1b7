"""Time and memory of scoring 8,000 completions and of all that is measured on them: python benchmarks/evaluation.py

500 problems (MATH500, from BAE_DATA), 16 completions each, half of them right in another spelling.
"""

import json
import resource
import tempfile
from pathlib import Path
from time import perf_counter

from common import DATA

from bae.evaluation.measure import measure
from bae.evaluation.read_completions import read_completions
from bae.text.verifier import MathVerifier

NAMES = {"text": "completion", "reference": "answer", "question": "problem", "model": None}
TAGS = {"answer": "answer", "confidence": "confidence"}


def completion(gold: str, sample: int) -> str:
    answer = f"\\boxed{{{gold}}}" + " " * sample if sample % 2 else f"{gold} + {sample + 1}"
    return f"<answer>{answer}</answer><confidence>0.{(7 * sample) % 100:02d}</confidence>"


def main() -> None:
    rows = [json.loads(line) for line in (DATA / "math500.jsonl").open(encoding="utf-8")]
    verifier = MathVerifier()
    verifier.verify([("1", "2")])  # the workers start
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "completions.jsonl"
        file.write_text(
            "\n".join(
                json.dumps({"problem": r["problem"], "answer": r["answer"], "completion": completion(r["answer"], s)})
                for r in rows
                for s in range(16)
            )
        )
        start = perf_counter()
        (table,) = read_completions(str(file), NAMES, TAGS, verifier).values()
        scored = perf_counter()
        summaries, _ = measure(table, verifier, Path(folder) / "out", "benchmark")
        measured = perf_counter()
    verifier.close()
    own, workers = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(f"completions              {len(table)}, {summaries['benchmark'].metrics['accuracy']:.3f} right")
    print(f"reading and verifying    {scored - start:.1f} s")
    print(f"metrics, votes, figures  {measured - scored:.1f} s")
    print(f"peak memory              {own:.0f} MiB, and {workers:.0f} MiB in the largest worker")


if __name__ == "__main__":
    main()
