"""Reports of what the cleaning of preferences and prompts dropped and why, as text or JSON."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ContradictionReport:
    """The result of `drop_contradictions`."""

    num_pairs: int
    """Comparisons before."""
    num_kept: int
    """Comparisons kept."""
    num_ties: int
    """Dropped: both answers are the same."""
    num_cyclic: int
    """Dropped: the rejected answer is also preferred to the chosen one, directly or through others."""
    num_repeats: int
    """Comparisons that repeat an earlier one, ties and cyclic ones not counted."""
    drops_repeats: bool
    """Whether repeats were dropped."""
    num_prompts: int
    """Different prompts before."""
    num_cyclic_prompts: int
    """Prompts with at least one cycle."""
    largest_cycle: int
    """Answers in the largest strongly connected component; 0: no cycle."""

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        action = "dropped" if self.drops_repeats else "kept"
        cycles = f" in {self.num_cyclic_prompts} prompts, up to {self.largest_cycle} answers in one"
        return [
            f"contradictions: kept {self.num_kept} of {self.num_pairs} pairs of {self.num_prompts} prompts",
            f"  dropped {self.num_ties}: ties, both answers are the same",
            f"  dropped {self.num_cyclic}: cyclic preferences{cycles if self.num_cyclic else ''}",
            f"  {action} {self.num_repeats}: repeats of an earlier pair",
        ]

    def as_dict(self) -> dict:
        """Return the report as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBucket:
    """Pairs whose answers differ by a similar number of tokens."""

    start: int
    """Smallest difference, in tokens."""
    end: int | None
    """One more than the largest difference; None: no upper bound."""
    num_longer: int
    """Pairs whose chosen answer is the longer one."""
    num_shorter: int
    """Pairs whose chosen answer is the shorter one."""
    num_kept_each: int
    """Pairs kept of each kind: the smaller of the two numbers."""

    @property
    def num_dropped(self) -> int:
        """Pairs dropped, all of the more frequent kind."""
        return self.num_longer + self.num_shorter - 2 * self.num_kept_each


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceReport:
    """The result of `balance_lengths`."""

    num_pairs: int
    """Pairs before."""
    num_kept: int
    """Pairs kept."""
    num_equal: int
    """Pairs whose answers have the same length; all are kept."""
    buckets: tuple[LengthBucket, ...]
    """All buckets, by ascending difference."""
    mean_difference_before: float
    """Mean of len(chosen) - len(rejected) over the pairs before, in tokens."""
    mean_difference_after: float
    """The same over the kept pairs; 0 without pairs."""

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        rows = [
            f"  {_span(bucket):>12} {bucket.num_longer:>8} {bucket.num_shorter:>8} "
            f"{2 * bucket.num_kept_each:>8} {bucket.num_dropped:>8}"
            for bucket in self.buckets
        ]
        return [
            f"length balance: kept {self.num_kept} of {self.num_pairs} pairs; chosen longer by "
            f"{self.mean_difference_before:.1f} tokens on average before, "
            f"{self.mean_difference_after:.1f} after",
            f"  {'tokens apart':>12} {'longer':>8} {'shorter':>8} {'kept':>8} {'dropped':>8}",
            f"  {'0':>12} {'':>8} {'':>8} {self.num_equal:>8} {0:>8}",
            *rows,
        ]

    def as_dict(self) -> dict:
        """Return the report as JSON values."""
        return asdict(self) | {"buckets": [asdict(b) | {"num_dropped": b.num_dropped} for b in self.buckets]}


@dataclass(frozen=True, slots=True, kw_only=True)
class VarianceReport:
    """The result of `filter_prompts_by_reward_variance`."""

    num_prompts: int
    """Prompts before."""
    num_kept: int
    """Prompts kept."""
    epsilon: float
    """Smallest variance kept."""
    num_flat: int
    """Dropped: the variance of the rewards is below `epsilon`."""
    num_few: int
    """Dropped: fewer than 2 rewards, which have no variance."""
    num_not_finite: int
    """Dropped: a reward is NaN or infinite."""
    median_variance: float
    """Median variance over prompts with at least 2 rewards, all finite; 0 without such prompts."""

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return [
            f"reward variance: kept {self.num_kept} of {self.num_prompts} prompts; the median variance is "
            f"{self.median_variance:.3g}",
            f"  dropped {self.num_flat}: variance below {self.epsilon:g}",
            f"  dropped {self.num_few}: fewer than 2 rewards",
            f"  dropped {self.num_not_finite}: a reward that is not finite",
        ]

    def as_dict(self) -> dict:
        """Return the report as JSON values."""
        return asdict(self)


def _span(bucket: LengthBucket) -> str:
    return f"{bucket.start}+" if bucket.end is None else f"{bucket.start}-{bucket.end - 1}"
