"""Filters of preference pairs and prompts: contradictions, length bias, equal rewards.

Each function returns the kept indices, ascending, and a report that accounts for all others; none changes
its input. The order of use is `drop_contradictions`, then `balance_lengths` on the kept pairs.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from glm_rlhf.engine.data.preferences.reports import (
    BalanceReport,
    ContradictionReport,
    LengthBucket,
    VarianceReport,
)
from glm_rlhf.engine.data.preferences.strongly_connected import strong_components
from glm_rlhf.engine.data.store.token_store import TokenStore

DEFAULT_LENGTH_EDGES = (8, 16, 32, 64, 128, 256)
"""Lower edges of the buckets of length difference, in tokens; chosen here, the paper states none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """One comparison. Two answers to one prompt are the same if their keys are equal."""

    prompt: Hashable
    """Key of the prompt: its text or ids, or a checksum of them."""
    chosen: Hashable
    """Key of the preferred answer."""
    rejected: Hashable
    """Key of the other answer."""


def preferences_of(store: TokenStore) -> list[Preference]:
    """Return the comparisons of a store of pairs; keys are checksums of the ids."""
    return [
        Preference(
            prompt=_key(store.prompt(i)), chosen=_key(store.chosen(i)), rejected=_key(store.rejected(i))
        )
        for i in range(len(store))
    ]


def drop_contradictions(
    preferences: Sequence[Preference], *, drops_repeats: bool = False
) -> tuple[list[int], ContradictionReport]:
    """Return the comparisons that are neither ties nor part of a cycle.

    Each prompt has a directed graph: its answers are nodes, each comparison an edge chosen → rejected. Ties
    are dropped, then all edges inside a strongly connected component of more than one node: each of them lies
    on a cycle. The rest has no cycle, so there is a ranking of each prompt's answers that agrees with it.

    Args:
        preferences: the comparisons.
        drops_repeats: also drop comparisons equal to an earlier one. They are kept by default: two annotators
            who prefer the same answer are more evidence than one.

    Returns:
        Kept indices, ascending, and the report.

    Source: ChatGLM-RLHF (arXiv 2404.00934) removes ties and cyclic preferences; the use of strongly connected
    components is this project's.
    """
    node_of: dict[tuple[Hashable, Hashable], int] = {}
    edges = []
    for preference in preferences:
        winner = node_of.setdefault((preference.prompt, preference.chosen), len(node_of))
        loser = node_of.setdefault((preference.prompt, preference.rejected), len(node_of))
        edges.append((winner, loser))
    followers: list[list[int]] = [[] for _ in node_of]
    for winner, loser in edges:
        followers[winner].append(loser)
    component = strong_components(followers)
    kept: list[int] = []
    num_ties = num_cyclic = num_repeats = 0
    cyclic_prompts: set[Hashable] = set()
    seen: set[tuple[int, int]] = set()
    for index, (winner, loser) in enumerate(edges):
        if winner == loser:
            num_ties += 1
        elif component[winner] == component[loser]:
            num_cyclic += 1
            cyclic_prompts.add(preferences[index].prompt)
        elif (winner, loser) in seen:
            num_repeats += 1
            if not drops_repeats:
                kept.append(index)
        else:
            seen.add((winner, loser))
            kept.append(index)
    sizes = Counter(component).values()
    return kept, ContradictionReport(
        num_pairs=len(edges),
        num_kept=len(kept),
        num_ties=num_ties,
        num_cyclic=num_cyclic,
        num_repeats=num_repeats,
        drops_repeats=drops_repeats,
        num_prompts=len({preference.prompt for preference in preferences}),
        num_cyclic_prompts=len(cyclic_prompts),
        largest_cycle=max(sizes) if num_cyclic else 0,
    )


def balance_lengths(
    chosen_lengths: Sequence[int] | np.ndarray,
    rejected_lengths: Sequence[int] | np.ndarray,
    *,
    seed: int,
    edges: Sequence[int] = DEFAULT_LENGTH_EDGES,
) -> tuple[list[int], BalanceReport]:
    """Return pairs in which, in each bucket of length difference, the chosen answer is longer in one half.

    Pairs go into buckets by d = |len(chosen) - len(rejected)|: 1 <= d < edges[0], edges[0] <= d < edges[1],
    …, edges[-1] <= d. In each bucket the more frequent kind, chosen longer or chosen shorter, is subsampled
    to the number of the other kind; a bucket with one kind only loses all its pairs. Pairs of equal length
    are all kept.

    Args:
        chosen_lengths: tokens of each preferred answer.
        rejected_lengths: tokens of each other answer.
        seed: of the sampling, at least 0.
        edges: lower edges of the buckets after the first, in tokens, ascending, each at least 2; empty: one
            bucket.

    Returns:
        Kept indices, ascending, and the report.

    Raises:
        ValueError: lengths that do not match, edges out of order, a negative seed.

    Source: ChatGLM-RLHF (arXiv 2404.00934) buckets pairs by length difference and balances within a bucket;
    token lengths, edges and the treatment of equal lengths are this project's.
    """
    chosen, rejected = np.asarray(chosen_lengths, np.int64), np.asarray(rejected_lengths, np.int64)
    if chosen.shape != rejected.shape or chosen.ndim != 1:
        raise ValueError(
            f"{chosen.size} chosen lengths and {rejected.size} rejected ones; a pair has one of each"
        )
    if any(edge < 2 for edge in edges) or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"edges are {list(edges)}; they must ascend, each at least 2")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0")
    difference = chosen - rejected
    # Bucket 0 holds equal lengths, bucket b the differences from starts[b - 1].
    starts = [1, *edges]
    bucket_of = np.searchsorted(starts, np.abs(difference), side="right")
    generator = np.random.Generator(np.random.PCG64(seed))
    keeps = difference == 0
    buckets = []
    for number, (start, end) in enumerate(zip(starts, [*edges, None], strict=True), start=1):
        longer = np.flatnonzero((bucket_of == number) & (difference > 0))
        shorter = np.flatnonzero((bucket_of == number) & (difference < 0))
        fewest = min(len(longer), len(shorter))
        for indices in (longer, shorter):
            keeps[generator.permutation(indices)[:fewest]] = True
        buckets.append(
            LengthBucket(
                start=start,
                end=end,
                num_longer=len(longer),
                num_shorter=len(shorter),
                num_kept_each=fewest,
            )
        )
    kept = np.flatnonzero(keeps)
    return kept.tolist(), BalanceReport(
        num_pairs=len(difference),
        num_kept=len(kept),
        num_equal=int((difference == 0).sum()),
        buckets=tuple(buckets),
        mean_difference_before=_mean(difference),
        mean_difference_after=_mean(difference[kept]),
    )


def filter_prompts_by_reward_variance(
    rewards_by_prompt: Sequence[Sequence[float]], epsilon: float
) -> tuple[list[int], VarianceReport]:
    """Return the prompts whose sampled answers have different rewards, from which a policy can learn.

    A prompt is kept if Var_k(r_k) = 1/K Σ_k (r_k - mean)² >= epsilon, over the rewards of its K answers.
    A prompt with fewer than 2 rewards, or with NaN or Inf, is dropped and counted apart.

    Args:
        rewards_by_prompt: the rewards of each prompt's answers; K may differ.
        epsilon: smallest variance to keep, at least 0; 0 keeps identical rewards too.

    Returns:
        Kept indices, ascending, and the report.

    Raises:
        ValueError: epsilon is negative or not finite.

    Source: ChatGLM-RLHF (arXiv 2404.00934) drops prompts whose reward variance is small; epsilon, K and the
    1/K are this project's.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon is {epsilon}; it must be finite and at least 0")
    kept: list[int] = []
    variances: list[float] = []
    num_flat = num_few = num_not_finite = 0
    for index, rewards in enumerate(rewards_by_prompt):
        rewards_K = np.asarray(rewards, dtype=np.float64)
        if not np.isfinite(rewards_K).all():
            num_not_finite += 1
        elif len(rewards_K) < 2:
            num_few += 1
        else:
            variances.append(float(rewards_K.var()))
            if variances[-1] >= epsilon:
                kept.append(index)
            else:
                num_flat += 1
    return kept, VarianceReport(
        num_prompts=len(rewards_by_prompt),
        num_kept=len(kept),
        epsilon=epsilon,
        num_flat=num_flat,
        num_few=num_few,
        num_not_finite=num_not_finite,
        median_variance=float(np.median(variances)) if variances else 0.0,
    )


def _key(ids: np.ndarray) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
