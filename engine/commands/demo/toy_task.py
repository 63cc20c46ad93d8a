"""Sums whose demonstrations are of mixed quality, with a second task that has nothing to do with them.

People who write demonstrations are careless at times. Here they forget to carry: 147 + 5 becomes 142. A
policy that imitates them forgets too, and only preferences can tell it better. The second task, a number said
backwards, is never rewarded: its accuracy shows what the policy forgets while it learns the first (a canary).
"""

import random
from dataclasses import dataclass

CARELESS_SHARE = 0.7
"""Share of the demonstrations of sums with a carry that forget it."""
_PLAIN_PER_CARRY = 0.25
"""Sums without a carry to each with one: what carelessness cannot spoil is the smaller part."""
_SUM_WORDINGS = ("{a}加{b}等于多少？", "What is {a} plus {b}?")
_CANARY_WORDINGS = ("What is {number} backwards?", "请再说一次{number}，从后到前。")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTask:
    """One question whose answer is known."""

    prompt: str
    """The question."""
    answer: str
    """The right answer in digits, and nothing else."""
    demonstration: str
    """What the person who wrote the demonstration answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSet:
    """Questions to learn from and questions that are held out, each pair of numbers in one of the two."""

    sums: tuple[ToyTask, ...]
    """To learn from, each in every wording, in random order; demonstrations careless."""
    canaries: tuple[ToyTask, ...]
    """To learn from beside them; demonstrations right."""
    held_out_sums: tuple[ToyTask, ...]
    """One wording to each pair of numbers, none of which `sums` has in any."""
    held_out_canaries: tuple[ToyTask, ...]
    """The same of the second task."""


def toy_tasks(*, num_held_out: int, seed: int) -> TaskSet:
    """Return sums of a number from 100 to 899 and one from 1 to 5, and canaries over 100 to 999.

    Raises:
        ValueError: more are to be held out than a quarter of the sums.
    """
    generator = random.Random(seed)
    pairs = [(a, b) for a in range(100, 900) for b in range(1, 6)]
    generator.shuffle(pairs)
    carrying = [pair for pair in pairs if has_carry(*pair)]
    plain = [pair for pair in pairs if not has_carry(*pair)]
    added = carrying + plain[: int(len(carrying) * _PLAIN_PER_CARRY)]
    numbers = list(range(100, 1000))
    generator.shuffle(added)
    generator.shuffle(numbers)
    if not 0 < num_held_out <= len(added) // 4:
        raise ValueError(
            f"num_held_out is {num_held_out}: of {len(added)} sums 1 to {len(added) // 4} can be held out"
        )
    learned = [_sum(*p, w, generator) for p in added[num_held_out:] for w in _SUM_WORDINGS]
    canaries = [_backwards(n, w) for n in numbers[num_held_out:] for w in _CANARY_WORDINGS]
    generator.shuffle(learned)
    generator.shuffle(canaries)
    return TaskSet(
        sums=tuple(learned),
        canaries=tuple(canaries),
        held_out_sums=tuple(
            _sum(*p, generator.choice(_SUM_WORDINGS), generator) for p in added[:num_held_out]
        ),
        held_out_canaries=tuple(
            _backwards(n, generator.choice(_CANARY_WORDINGS)) for n in numbers[:num_held_out]
        ),
    )


def has_carry(a: int, b: int) -> bool:
    """Return whether a + b carries from ones to tens."""
    return a % 10 + b % 10 >= 10


def without_carry(a: int, b: int) -> int:
    """Return a + b as one adds who forgets what is carried from ones to tens; 199 + 1 is 190."""
    return a + b - 10 * has_carry(a, b)


def _sum(a: int, b: int, wording: str, generator: random.Random) -> ToyTask:
    is_careless = generator.random() < CARELESS_SHARE
    return ToyTask(
        prompt=wording.format(a=a, b=b),
        answer=str(a + b),
        demonstration=str(without_carry(a, b) if is_careless else a + b),
    )


def _backwards(number: int, wording: str) -> ToyTask:
    answer = str(number)[::-1]
    return ToyTask(prompt=wording.format(number=number), answer=answer, demonstration=answer)
