"""Say what a demonstration is, and turn some of them into tokens and a mask of what is learnt."""

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bae.batch import Demonstrations, Problem, SampledTokens
from bae.rollout.interface import pad_left
from bae.text.blocks import Block, find_spans


@dataclass(frozen=True)
class Piece:
    """Hold consecutive text of a completion. learn: whether the policy is taught to write it."""

    text: str
    learn: bool = True


Write = Callable[[Problem, random.Random], Sequence[Piece] | None]
"""Write one completion of a problem, or None if the problem has nothing to write it from.

Every draw comes from the generator.
"""


class Confidences:
    """Draw a confidence that knows nothing of the problem.

    Args:
        weights: {confidence as it is written: relative frequency}.

    Raises:
        ValueError: if there is none.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights or min(weights.values()) < 0 or not sum(weights.values()):
            raise ValueError(f"confidences={dict(weights)}: name one or more, each with a weight that is 0 or more")
        self._texts, self._weights = [str(text) for text in weights], list(weights.values())

    def draw(self, rng: random.Random) -> str:
        """Return one of the confidences."""
        return rng.choices(self._texts, self._weights)[0]


def text_of(pieces: Sequence[Piece]) -> str:
    """Return the completion that the pieces make."""
    return "".join(piece.text for piece in pieces)


def is_in_form(pieces: Sequence[Piece], blocks: Sequence[Block]) -> bool:
    """Tell whether the completion keeps to the format."""
    return all(find_spans(text_of(pieces), blocks).well_formed)


def without(pieces: Sequence[Piece], blocks: Sequence[Block], sections: Collection[str]) -> list[Piece]:
    """Return the pieces with the contents of the named sections not learnt; their tags still are."""
    text, learnt = text_of(pieces), _learnt_characters(pieces)
    for section in find_spans(text, blocks).sections:
        if section.tag in sections:
            end = section.start + len(section.content)
            learnt[section.start : end] = [False] * (end - section.start)
    return [Piece(character, learn) for character, learn in zip(text, learnt, strict=True)]


def encode(tokenizer: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Piece]]) -> Demonstrations:
    """Turn demonstrations into tokens.

    A completion is tokenised as a whole, as the policy would write it, and ends with the end of sequence. A token is
    learnt if all its characters are.

    Args:
        tokenizer: a fast tokenizer.
        prompts: the tokens of N prompts.
        completions: N completions.
    """
    rows = [_encode(tokenizer, pieces) for pieces in completions]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask, learnt = torch.zeros(ids.shape, dtype=torch.bool), torch.zeros(ids.shape, dtype=torch.bool)
    for n, (tokens, flags) in enumerate(rows):
        ids[n, : len(tokens)] = torch.tensor(tokens)
        mask[n, : len(tokens)] = True
        learnt[n, : len(tokens)] = torch.tensor(flags)
    prompt_ids, prompt_mask = pad_left(prompts, tokenizer.pad_token_id)
    samples = SampledTokens(prompt_ids, prompt_mask, ids, mask, torch.ones(len(rows), dtype=torch.bool))
    return Demonstrations(samples, learnt)


def _encode(tokenizer: Any, pieces: Sequence[Piece]) -> tuple[list[int], list[bool]]:
    """Return the tokens of one completion, and whether each is learnt."""
    learnt = _learnt_characters(pieces)
    found = tokenizer(text_of(pieces), add_special_tokens=False, return_offsets_mapping=True)
    flags = [all(learnt[begin:end]) for begin, end in found["offset_mapping"]]
    return [*found["input_ids"], tokenizer.eos_token_id], [*flags, True]


def _learnt_characters(pieces: Sequence[Piece]) -> list[bool]:
    """Tell for each character of the completion whether it is learnt."""
    return [piece.learn for piece in pieces for _ in piece.text]
