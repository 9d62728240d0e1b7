"""A reward that pays for declining to answer where the answer would be wrong (TruthRL, arXiv 2509.25760)."""

from bae.batch import Completion
from bae.text.verdict import Verdict


def truthful(completion: Completion) -> float | None:
    """Return 1 if the first answer is right, 0 if it abstains, -1 if it is wrong, None without an answer.

    Only the verifier `abstention` tells who abstains.
    """
    if not completion.verdicts:
        return None
    return {Verdict.CORRECT: 1.0, Verdict.ABSTAINED: 0.0}.get(completion.verdicts[0], -1.0)
