"""`bae-score`: show what a completion of one's own would earn, and why."""

import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from bae.commands import cli
from bae.commands.build import make, make_format, plain, quieten
from bae.commands.validate import check_parts
from bae.files import write_atomically
from bae.text.verdict import Verdict
from bae.text.visible import shortened, visible

if TYPE_CHECKING:
    from bae.batch import Problem, SampledTokens
    from bae.evaluation.completion_view import BlockView, CompletionView, ObjectiveView
    from bae.objectives.outcomes import Outcome
    from bae.objectives.scoring import Scorer

OVERRIDE = re.compile(r"[+]{0,2}[\w./@:-]+=.*|~[\w./@:-]+(=.*)?", re.DOTALL)
"""What Hydra takes for a value of the configuration."""
VALUED = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p")
"""The options of Hydra after which a value stands."""
LITERAL = re.compile(r"(reference|question)=(.*)", re.DOTALL)
"""The values that are read as they stand, so that LaTeX needs no quotes."""
MOST = 1_000_000
"""The bytes that a completion may have."""
WIDTH = 80
SHOWN = 4000
"""The characters of a part of a text that are shown, about."""
IN_FORM, BROKEN = "  | ", "  ! "
"""What stands before the lines of a text."""
WHY = {
    Verdict.CORRECT: "it equals the reference",
    Verdict.WRONG: "it does not equal the reference",
    Verdict.UNPARSEABLE: "it cannot be read, or is not an answer in final form",
    Verdict.TIMEOUT: "its check ran out of time or memory",
    Verdict.ABSTAINED: "it declines to answer",
}


def main() -> None:
    """Run `bae-score`."""
    texts, sys.argv[1:] = split(sys.argv[1:])

    def task(cfg: DictConfig) -> None:
        score(cfg, texts)

    cli.run(task, "score")


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments that are completions, and those that are for Hydra; the literal values with quotes."""
    texts, others = [], []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_option = argument.startswith("-") and argument != "-"
        if is_option or before in VALUED or OVERRIDE.fullmatch(argument):
            others.append(LITERAL.sub(_quoted, argument))
        else:
            texts.append(argument)
    return texts, others


def _quoted(match: re.Match) -> str:
    """Return a value of the configuration in Hydra's quotes. Backslashes count only before a quote."""
    value = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), match[2])
    return f"{match[1]}='{value}'"


def score(cfg: DictConfig, texts: Sequence[str]) -> None:
    """Print what a completion earns, and write the page if one is asked for."""
    from bae.batch import Problem

    with cli.user_errors():
        raw = read(texts)
        check(cfg)
        scorer, samples = make_scorer(cfg, raw)
        outcome = make(cfg.outcome)
    problem = Problem("1", cfg.question, cfg.reference)
    view = scored_view(scorer, outcome, problem, samples)
    print("\n".join(lines(view, problem.answer, has_tokens=cfg.tokenizer is not None)))
    if cfg.html:
        from bae.evaluation.completion_page import GroupView, page

        group = GroupView(problem, [view], size=1, right=int(view.kind == "right"))
        unit = "bytes" if cfg.tokenizer is None else "tokens"
        write_atomically(Path(cfg.html), page("A completion and what it earns", [group], SHOWN, unit))
        print(f"\npage  {cfg.html}")


def check(cfg: DictConfig) -> None:
    """Refuse values that cannot work. Raises UserError."""
    if OmegaConf.is_missing(cfg, "reference"):
        raise cli.UserError("give the right answer, reference=…; the verdict and the rewards need it")
    if cfg.html and Path(cfg.html).is_dir():
        raise cli.UserError(f"html={cfg.html}: it is a folder; name a file")
    quieten()
    check_parts(plain(cfg))


def read(texts: Sequence[str]) -> bytes:
    """Return the completion: of the standard input, of a file, or the text itself. Raises UserError."""
    if len(texts) != 1:
        raise cli.UserError(
            "the completion must be one argument, in quotes"
            if texts
            else 'give a completion: a "text", a file, or - for what comes in'
        )
    (text,) = texts
    raw = sys.stdin.buffer.read(MOST + 1) if text == "-" else _read_file(text)
    if len(raw) > MOST:
        raise cli.UserError(f"the completion has more than {MOST} bytes; give a shorter one")
    if not raw.strip():
        raise cli.UserError("the completion is empty; give the text that a policy would write")
    return raw


def _read_file(text: str) -> bytes:
    """Return the bytes of the file of that name, or else of the text itself. Raises UserError."""
    path = Path(text)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # the text is too long for a name, or holds what no name may
        return os.fsencode(text)
    if is_folder:
        raise cli.UserError(f"{text}: it is a folder; name a file")
    if not is_file and re.fullmatch(r"\S+\.(txt|md|log|out|jsonl?)", text):
        raise cli.UserError(f"{text}: no such file")
    if not is_file:
        return os.fsencode(text)
    try:
        with open(path, "rb") as file:
            return file.read(MOST + 1)
    except OSError as error:
        raise cli.UserError(f"{text}: it cannot be read ({error.strerror})") from error


def make_scorer(cfg: DictConfig, raw: bytes) -> "tuple[Scorer, SampledTokens]":
    """Make what scores as a training step would, and the tokens of a completion. Raises UserError."""
    from bae.objectives.scoring import Scorer

    blocks, objectives = make_format(cfg)
    verifier = make(cfg.task).verifier
    if fault := verifier.fault(cfg.reference):
        raise cli.UserError(
            f"reference={cfg.reference}: {fault}; give one that the verifier of task={cli.choice('task')} can read"
        )
    vocabulary, samples = tokenised(cfg.tokenizer, raw)
    return Scorer(blocks, objectives, verifier, vocabulary, cfg.objectives.malformed), samples


def scored_view(scorer: "Scorer", outcome: "Outcome", problem: "Problem", samples: "SampledTokens") -> "CompletionView":
    """Score a completion, and return what a person sees of it."""
    import torch

    from bae.evaluation.completion_view import Viewer
    from bae.objectives.reward_view import score_table

    try:
        scored = scorer([problem], samples)
    finally:
        scorer.verifier.close()
    outcomes = score_table(scored, scorer.objectives, outcome, torch.zeros(1, dtype=torch.long)).outcome
    return Viewer(samples, scored, scorer, group_size=1, outcomes=outcomes).view(0)


def tokenised(name: str | None, raw: bytes) -> "tuple[list[bytes], SampledTokens]":
    """Return the bytes of each token id, and a completion with the end of sequence behind it.

    name: of a tokenizer; None makes a token of each byte. Raises UserError if there is no such tokenizer.
    """
    import torch

    from bae.batch import SampledTokens
    from bae.text.tokens import token_bytes

    if name is None:
        vocabulary, ids = [*(bytes([byte]) for byte in range(256)), b""], [*raw, 256]
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except OSError as error:
            raise cli.UserError(f"tokenizer={name}: no such folder, and the hub does not give it") from error
        text = raw.decode(errors="replace")
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        vocabulary = token_bytes(tokenizer)
    row, prompt = torch.tensor([ids]), torch.zeros(1, 1, dtype=torch.long)
    return vocabulary, SampledTokens(prompt, prompt.bool(), row, torch.ones_like(row).bool(), torch.tensor([True]))


def lines(view: "CompletionView", reference: str, has_tokens: bool) -> Iterator[str]:
    """Yield what the terminal shows; reference: the right answer; has_tokens: whether tokens were counted."""
    start = 0
    for block in view.blocks:
        length = len(block.text) + len(block.broken)
        count = f", {block.tokens} tokens" if has_tokens else ""
        yield from _block_lines(block, f"characters {start} to {start + length}{count}")
        start += length
    yield from _wrapped("reference   ", reference)
    for answer, verdict in view.answers:
        yield from _wrapped("answer      ", f"{answer.strip()}: {verdict.value}, {WHY[verdict]}")
    if not view.answers:
        yield "answer      none, because the format broke before its end"
    for confidence in view.confidences:
        yield f"confidence  {'none that can be read' if confidence is None else f'{confidence:g}'}"
    yield f"\n{'objective':<26}{'block':<18}{'reward':>10}  outcome of the prefix"
    for block in view.blocks:
        for objective in block.objectives:
            yield from _objective_lines(block, objective)


def _block_lines(block: "BlockView", place: str) -> Iterator[str]:
    """Yield a block with its place, and its text."""
    state = f"malformed: {'; '.join(block.faults)}" if block.faults else "in form"
    yield from _wrapped("", f"{block.name}, {place}, {state}" if block.tokens else f"{block.name}, never reached")
    for margin, text in ((IN_FORM, block.text), (BROKEN, block.broken)):
        yield from _wrapped(margin, text) if text else ()
    yield ""


def _objective_lines(block: "BlockView", objective: "ObjectiveView") -> Iterator[str]:
    """Yield the reward of an objective, and the stratum of the completion."""
    reward = "-" if objective.reward is None else f"{objective.reward:.4f}"
    outcome = "" if objective.outcome is None else f"{objective.outcome:g}, by {objective.given}"
    yield f"{objective.name:<26}{block.name:<18}{reward:>10}  {outcome}".rstrip()


def _wrapped(margin: str, text: str) -> Iterator[str]:
    """Yield a text in lines of the terminal's width, its hidden characters made visible; margin: before each line."""
    further = margin if margin in (IN_FORM, BROKEN) else " " * len(margin)
    for line in shortened(visible(text), SHOWN).expandtabs().split("\n"):
        yield from textwrap.wrap(line, WIDTH, initial_indent=margin, subsequent_indent=further) or [margin.rstrip()]
        margin = further


if __name__ == "__main__":
    main()
