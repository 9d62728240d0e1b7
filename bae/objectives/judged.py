"""The reward of a judge: what a language model says of a completion, from 0 to 1."""

from bae.batch import WrittenCompletion
from bae.text.judge import Judge


async def judged(completion: WrittenCompletion, judge: Judge) -> float | None:
    """Return the judge's score; None if the completion lacks a section that the judge's prompt has a place for.

    The prompt may have the places {question}, {reference}, {text} (all of the completion), and the name of any section,
    such as {reasoning} or {answer}, the first of its name. White space around them is left out.
    """
    sections = {section.tag: section.content.strip() for section in reversed(completion.sections)}
    problem = completion.problem
    values = {"question": problem.question, "reference": problem.answer, "text": completion.text} | sections
    return await judge.score(values) if judge.places <= values.keys() else None
