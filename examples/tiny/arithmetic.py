"""Sums in Chinese and English words: tasks of which every answer is known, made from a seed."""

import random
from dataclasses import dataclass

_WORDINGS = (
    "{a}加{b}等于多少？",
    "请问{a}+{b}=？",
    "What is {a} plus {b}?",
    "{a} + {b} =",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticTask:
    """One sum."""

    prompt: str
    """The question, in one of four wordings."""
    answer: str
    """The sum in digits, and nothing else."""


def arithmetic_tasks(
    *, num_held_out: int, seed: int, largest: int = 99
) -> tuple[list[ArithmeticTask], list[ArithmeticTask]]:
    """Return (tasks to learn from, held-out tasks) over all pairs of numbers from 0 to `largest`.

    A pair of numbers is in one of the two sets in all its wordings, so a held-out sum was never seen. Both
    are in random order; the first has every pair in every wording, the second one wording a pair.

    Raises:
        ValueError: more tasks are to be held out than half of the pairs.
    """
    pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
    if not 0 <= num_held_out <= len(pairs) // 2:
        raise ValueError(
            f"num_held_out is {num_held_out}, of {len(pairs)} pairs at most half can be held out"
        )
    generator = random.Random(seed)
    generator.shuffle(pairs)
    held_out = [_task(a, b, generator.choice(_WORDINGS)) for a, b in pairs[:num_held_out]]
    learned = [_task(a, b, wording) for a, b in pairs[num_held_out:] for wording in _WORDINGS]
    generator.shuffle(learned)
    return learned, held_out


def _task(a: int, b: int, wording: str) -> ArithmeticTask:
    return ArithmeticTask(prompt=wording.format(a=a, b=b), answer=str(a + b))
