"""Blockwise advantages in prime-rl (its source was read at v0.8.1.dev67, 559b447; it is not installed here)."""

from collections.abc import Sequence
from typing import Any

from bae.batch import Problem
from bae.integrations.blockwise import Blockwise, for_token_lists


def token_advantages(
    blockwise: Blockwise, traces: Sequence[Any], answer: str, ends: Sequence[int]
) -> list[list[float]]:
    """Compute what `prime_rl.orchestrator.algo.assign_advantages` takes, for all traces of one group.

    Args:
        blockwise: makes them. Baselines over the whole batch see the group.
        traces: G, at least one, `verifiers.v1.Trace`. The `mask` of each of its `nodes` tells which of the node's
            `token_ids` were sampled.
        answer: the reference answer of the task.
        ends: the ids that end a sequence.

    Returns:
        G lists, one value for each sampled token, node by node. What the policy did not write is skipped.
    """
    sampled = [[node for node in trace.nodes if any(node.mask)] for trace in traces]
    completions = [
        [token for node in nodes for token, counts in zip(node.token_ids, node.mask, strict=True) if counts]
        for nodes in sampled
    ]
    problems = [Problem("group", "group", answer)] * len(completions)
    each, _ = for_token_lists(blockwise, problems, completions, ends, len(completions))
    return [row.tolist() for row in each]
