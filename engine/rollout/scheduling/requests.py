"""The frozen types of the queue: requests, completions and statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Completion",
    "GenerationRequest",
    "NonFiniteLogits",
    "QueueStatistics",
    "sample_seed",
]

_WORD = 2**64


class NonFiniteLogits(FloatingPointError):
    """No token can be sampled for some requests: logits are NaN or Inf, or every id is masked."""

    def __init__(self, requests: Sequence[int]) -> None:
        """Keep the `GenerationRequest.index` of these requests, in order."""
        super().__init__(f"the logits of requests {list(requests)} are not finite")
        self.requests = tuple(requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt, with the number, length and seed of its answers."""

    index: int
    """Its index in the caller's list; unique, and used in errors and completions."""
    prompt: tuple[int, ...]
    """Token ids, at least one."""
    num_samples: int = 1
    """Number of answers, at least one."""
    max_new_tokens: int
    """Most tokens per answer, at least one."""
    stop_ids: frozenset[int]
    """Token ids that end an answer; the answer includes the one that ended it."""
    seed: int
    """Seed of this request, any integer; sample k uses `sample_seed(seed, k)`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished answer."""

    request: int
    """`GenerationRequest.index`."""
    sample: int
    """0 … num_samples − 1."""
    tokens: tuple[int, ...]
    """Sampled token ids, including the stop id if one ended the answer."""
    logprobs: tuple[float, ...]
    """Of each token, under the sampling distribution."""
    untempered_logprobs: tuple[float, ...]
    """Of each token, under the model's untempered distribution."""
    finish_reason: Literal["stop", "length"]
    """"stop": a stop id or the stop check ended it; "length": max_new_tokens did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStatistics:
    """Counts of a queue so far."""

    num_steps: int = 0
    """Steps returned."""
    num_skips: int = 0
    """Times that a group had nothing to do before the queue was finished."""
    num_preemptions: int = 0
    """Times that a sequence lost its pages to an earlier one."""
    num_tokens: int = 0
    """Tokens fed, including those fed again after a preemption."""
    num_shared_pages: int = 0
    """Pages that a sequence shares with another sample of its prompt instead of computing them."""
    num_copied_pages: int = 0
    """Partly filled pages that were copied for the same purpose."""
    peak_pages: int = 0
    """Most pages owned at once."""


def sample_seed(seed: int, sample: int) -> int:
    """Return the seed of sample `sample` of a request with `seed`, in −2^63 … 2^63 − 1.

    mix(mix(seed) + (sample + 1) · γ) modulo 2^64, as a signed number. For one seed, different samples have
    different results; for different seeds, results agree by chance only.

    Args:
        seed: any integer; integers that agree modulo 2^64 are the same seed.
        sample: ≥ 0.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014 (SplitMix64).
    """
    word = _mix((_mix(seed % _WORD) + (sample + 1) * 0x9E3779B97F4A7C15) % _WORD)
    return word - _WORD if word >= _WORD // 2 else word


def _mix(word: int) -> int:
    """Return the 64-bit word with its bits mixed, one to one."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % _WORD
    return word ^ (word >> 31)
