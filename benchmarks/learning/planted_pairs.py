"""Pairs whose true quality is known, and labels that may prefer length to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NUM_IDS = 64
"""Vocabulary of the pairs; ids below `FIRST_ID` are the model's own."""
FIRST_ID = 3
_GOOD = range(FIRST_ID, FIRST_ID + 16)
_POOR = range(FIRST_ID + 16, FIRST_ID + 32)
_PROMPT = range(FIRST_ID + 32, NUM_IDS)
_PROMPT_TOKENS = 3
_SHORTEST, _LONGEST = 4, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelling:
    """How two answers are compared: P(a preferred to b) = σ(quality · (q_a − q_b) + length · (n_a − n_b)).

    q is an answer's share of good tokens, from 0 to 1, n its number of tokens.
    """

    quality: float
    """Logit per unit of quality; infinite for labels that never err."""
    length: float = 0.0
    """Logit per token: the planted bias."""


TRUTH = Labelling(quality=math.inf)
"""Quality alone decides, without error."""


def draw_pairs(count: int, labelling: Labelling, *, seed: int) -> list[dict[str, list[int]]]:
    """Return records of pairs as ids; an answer's length and its share of good tokens are independent.

    Answers have 4 to 24 tokens, good and poor ones in random order; pairs of equal share are sampled again.

    Args:
        count: pairs.
        labelling: who decides which answer is the chosen one.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    records = []
    while len(records) < count:
        first, second = _answer(generator), _answer(generator)
        difference = quality_of(first) - quality_of(second)
        if difference == 0.0:
            continue
        if math.isinf(labelling.quality):
            is_first = difference > 0
        else:
            logit = labelling.quality * difference + labelling.length * (len(first) - len(second))
            is_first = _uniform(generator) < 1 / (1 + math.exp(-logit))
        chosen, rejected = (first, second) if is_first else (second, first)
        prompt = [_pick(_PROMPT, generator) for _ in range(_PROMPT_TOKENS)]
        records.append({"prompt_tokens": prompt, "chosen_tokens": chosen, "rejected_tokens": rejected})
    return records


def _answer(generator: torch.Generator) -> list[int]:
    num_tokens = _pick(range(_SHORTEST, _LONGEST + 1), generator)
    num_good = round(_uniform(generator) * num_tokens)
    ids = [_pick(_GOOD if index < num_good else _POOR, generator) for index in range(num_tokens)]
    return [ids[index] for index in torch.randperm(num_tokens, generator=generator).tolist()]


def quality_of(answer: Sequence[int]) -> float:
    """Return the share of good tokens, 0 for none at all."""
    return sum(token in _GOOD for token in answer) / max(len(answer), 1)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _pick(ids: range, generator: torch.Generator) -> int:
    return ids[int(torch.randint(len(ids), (), generator=generator))]
