"""Hygiene of preferences: worked graphs, a graph without cycles, exact balance, flat prompts."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_rlhf.engine.data.preferences.cleaning import (
    Preference,
    balance_lengths,
    drop_contradictions,
    filter_prompts_by_reward_variance,
    preferences_of,
)
from glm_rlhf.engine.data.preferences.strongly_connected import strong_components
from glm_rlhf.engine.data.store.token_store import open_store

EXAMPLES = settings(deadline=None, max_examples=50)


def preferences(*texts: str, prompt: object = "p") -> list[Preference]:
    """Return comparisons written `winner>loser`."""
    return [Preference(prompt=prompt, chosen=text[0], rejected=text[2]) for text in texts]


PREFERENCES = st.lists(
    st.builds(
        Preference,
        prompt=st.integers(0, 2),
        chosen=st.sampled_from("abcdef"),
        rejected=st.sampled_from("abcdef"),
    ),
    max_size=25,
)


def test_ties_and_a_cycle_go_and_what_hangs_on_the_cycle_stays():
    #        a → b → c → a is a cycle; d beats one of it, one of it beats e.
    pairs = preferences("a>b", "b>c", "c>a", "d>a", "b>e", "e>e", "d>e")
    kept, report = drop_contradictions(pairs)
    assert kept == [3, 4, 6]
    assert report.as_dict() == {
        "num_pairs": 7,
        "num_kept": 3,
        "num_ties": 1,
        "num_cyclic": 3,
        "num_repeats": 0,
        "drops_repeats": False,
        "num_prompts": 1,
        "num_cyclic_prompts": 1,
        "largest_cycle": 3,
    }
    assert report.lines() == [
        "contradictions: kept 3 of 7 pairs of 1 prompts",
        "  dropped 1: ties, both answers are the same",
        "  dropped 3: cyclic preferences in 1 prompts, up to 3 answers in one",
        "  kept 0: repeats of an earlier pair",
    ]


def test_a_comparison_and_its_reverse_both_go():
    kept, report = drop_contradictions(preferences("a>b", "b>a", "a>b", "a>c"))
    assert (kept, report.num_cyclic, report.largest_cycle) == ([3], 3, 2)


def test_a_chord_inside_a_component_goes_though_the_cycle_is_longer():
    # a → b → c → d → a, and a → c runs along with it: it too lies on a cycle, a → c → d → a.
    kept, report = drop_contradictions(preferences("a>b", "b>c", "c>d", "d>a", "a>c"))
    assert (kept, report.num_cyclic, report.largest_cycle) == ([], 5, 4)


def test_prompts_do_not_mix():
    kept, report = drop_contradictions([*preferences("a>b"), *preferences("b>a", prompt="q")])
    assert (kept, report.num_prompts, report.num_cyclic_prompts) == ([0, 1], 2, 0)


def test_two_cycles_of_one_prompt_count_as_one_prompt():
    _, report = drop_contradictions(preferences("a>b", "b>a", "c>d", "d>c"))
    assert (report.num_cyclic, report.num_cyclic_prompts, report.largest_cycle) == (4, 1, 2)


def test_repeats_are_counted_and_dropped_only_when_asked():
    pairs = preferences("a>b", "a>b", "a>c", "a>b")
    kept, report = drop_contradictions(pairs)
    assert (kept, report.num_repeats, report.num_kept) == ([0, 1, 2, 3], 2, 4)
    kept, report = drop_contradictions(pairs, drops_repeats=True)
    assert (kept, report.num_repeats, report.num_kept) == ([0, 2], 2, 2)
    assert "  dropped 2: repeats of an earlier pair" in report.lines()


def test_no_preferences_are_no_error():
    kept, report = drop_contradictions([])
    assert (kept, report.num_pairs, report.largest_cycle) == ([], 0, 0)


@EXAMPLES
@given(PREFERENCES, st.booleans())
def test_what_is_kept_has_no_cycle_and_what_is_dropped_is_accounted_for(pairs, drops_repeats):
    kept, report = drop_contradictions(pairs, drops_repeats=drops_repeats)
    assert kept == sorted(set(kept))
    nodes = {(p.prompt, key): None for p in pairs for key in (p.chosen, p.rejected)}
    number = {node: i for i, node in enumerate(nodes)}
    followers: list[list[int]] = [[] for _ in nodes]
    for index in kept:
        p = pairs[index]
        assert p.chosen != p.rejected
        followers[number[p.prompt, p.chosen]].append(number[p.prompt, p.rejected])
    assert len(set(strong_components(followers))) == len(nodes)
    assert report.num_kept == len(kept)
    num_dropped = report.num_ties + report.num_cyclic + report.num_repeats * drops_repeats
    assert report.num_kept + num_dropped == report.num_pairs == len(pairs)


@EXAMPLES
@given(PREFERENCES)
def test_only_edges_on_a_cycle_are_dropped(pairs):
    kept, _ = drop_contradictions(pairs)
    for index in set(range(len(pairs))) - set(kept):
        # From the loser back to the winner along other comparisons of the prompt, or they are one.
        start, goal = pairs[index].rejected, pairs[index].chosen
        reached = {start}
        for _ in range(6):
            reached |= {p.rejected for p in pairs if p.prompt == pairs[index].prompt and p.chosen in reached}
        assert goal in reached


@EXAMPLES
@given(PREFERENCES, st.randoms(use_true_random=False))
def test_the_order_of_comparisons_does_not_matter(pairs, random):
    order = list(range(len(pairs)))
    random.shuffle(order)
    kept, report = drop_contradictions(pairs)
    shuffled_kept, shuffled_report = drop_contradictions([pairs[i] for i in order])
    assert sorted(order[i] for i in shuffled_kept) == kept
    assert shuffled_report == report


def test_length_balance_worked_by_hand():
    #           +1 +3 -2  +5 +7 +9  -4  0  -50
    chosen = [11, 13, 8, 15, 17, 19, 6, 10, 10]
    rejected = [10, 10, 10, 10, 10, 10, 10, 10, 60]
    kept, report = balance_lengths(chosen, rejected, seed=0, edges=(4, 10))
    # 1-3: two longer, one shorter; 4-9: three longer, one shorter; 10+: one shorter alone, dropped.
    assert {2, 6, 7} <= set(kept)
    assert len(set(kept) & {0, 1}) == 1
    assert len(set(kept) & {3, 4, 5}) == 1
    assert len(kept) == report.num_kept == 5
    assert [(b.num_longer, b.num_shorter, b.num_kept_each, b.num_dropped) for b in report.buckets] == [
        (2, 1, 1, 1),
        (3, 1, 1, 2),
        (0, 1, 0, 1),
    ]
    assert report.num_equal == 1
    assert report.mean_difference_before == pytest.approx((1 + 3 - 2 + 5 + 7 + 9 - 4 - 50) / 9)
    difference = np.subtract(chosen, rejected)
    assert report.mean_difference_after == pytest.approx(difference[kept].mean())
    assert [line.split()[:2] for line in report.lines()[2:]] == [
        ["0", "1"],
        ["1-3", "2"],
        ["4-9", "3"],
        ["10+", "0"],
    ]
    json.dumps(report.as_dict(), allow_nan=False)


LENGTH_PAIRS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=60)
EDGES = st.lists(st.integers(2, 30), max_size=4, unique=True).map(sorted)


@EXAMPLES
@given(LENGTH_PAIRS, EDGES, st.integers(0, 3))
def test_every_bucket_is_balanced_exactly_and_as_large_as_can_be(pairs, edges, seed):
    chosen, rejected = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    kept, report = balance_lengths(chosen, rejected, seed=seed, edges=edges)
    assert kept == sorted(set(kept))

    def count(indices) -> Counter:
        """Count by bucket (computed independently, by comparison) and by kind."""
        found = Counter()
        for i in indices:
            difference = chosen[i] - rejected[i]
            bucket = sum(abs(difference) >= edge for edge in edges)
            found[bucket if difference else "equal", difference > 0] += 1
        return found

    before, after = count(range(len(pairs))), count(kept)
    assert after["equal", False] == before["equal", False] == report.num_equal
    for bucket in range(len(edges) + 1):
        longer, shorter = before[bucket, True], before[bucket, False]
        assert after[bucket, True] == after[bucket, False] == min(longer, shorter)
        found = report.buckets[bucket]
        assert (found.num_longer, found.num_shorter) == (longer, shorter)
        assert found.num_kept_each == min(longer, shorter)
    num_dropped = sum(bucket.num_dropped for bucket in report.buckets)
    assert report.num_kept + num_dropped == report.num_pairs == len(pairs)


def test_the_seed_decides_the_sample_and_every_pair_can_be_in_it():
    chosen, rejected = [5] * 20 + [3] * 2, [3] * 20 + [5] * 2
    samples = [tuple(balance_lengths(chosen, rejected, seed=seed)[0]) for seed in range(200)]
    assert samples[0] == tuple(balance_lengths(chosen, rejected, seed=0)[0])
    sampled = Counter(i for sample in samples for i in sample)
    assert sampled[20] == sampled[21] == 200
    # 200 draws of 2 of 20: 20 on average, standard deviation 4.2; none at all has probability 1e-9.
    assert set(sampled) == set(range(22))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rejected_lengths": [1, 2]}, "1 chosen lengths and 2 rejected ones"),
        ({"edges": (1, 4)}, "each at least 2"),
        ({"edges": (4, 4)}, "must ascend"),
        ({"edges": (8, 4)}, "must ascend"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_balance_that_cannot_be_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        balance_lengths(**({"chosen_lengths": [1], "rejected_lengths": [1], "seed": 0} | arguments))


def test_no_pairs_are_no_error():
    kept, report = balance_lengths([], [], seed=0)
    assert (kept, report.num_kept, report.mean_difference_after) == ([], 0, 0.0)


def test_variance_filter_worked_by_hand():
    # 1/K Σ (r - mean)²: 0, then ((-1)² + 1²) / 2 = 1, then (4 + 0 + 4) / 3, then 0.25.
    rewards = [[2.0, 2.0, 2.0], [1.0, 3.0], [0.0, 2.0, 4.0], [0.5, -0.5]]
    kept, report = filter_prompts_by_reward_variance(rewards, 1.0)
    assert kept == [1, 2]
    assert (report.num_flat, report.num_few, report.num_not_finite) == (2, 0, 0)
    assert report.median_variance == pytest.approx((0.25 + 1.0) / 2)
    assert report.lines()[:2] == [
        "reward variance: kept 2 of 4 prompts; the median variance is 0.625",
        "  dropped 2: variance below 1",
    ]


def test_groups_that_have_no_variance_are_named_apart():
    nan, inf = float("nan"), float("inf")
    rewards = [[1.0], [], [nan, 1.0], [inf, 1.0], [-inf], [1e38, -1e38], [0.0, 1.0]]
    kept, report = filter_prompts_by_reward_variance(rewards, 0.1)
    assert kept == [5, 6]
    assert (report.num_flat, report.num_few, report.num_not_finite) == (0, 2, 3)
    assert sum((report.num_kept, report.num_flat, report.num_few, report.num_not_finite)) == 7
    json.dumps(report.as_dict(), allow_nan=False)


def test_epsilon_0_keeps_identical_rewards_and_nothing_is_below_it():
    assert filter_prompts_by_reward_variance([[1.0, 1.0], [1.0, 2.0]], 0.0)[0] == [0, 1]
    assert filter_prompts_by_reward_variance([], 0.0)[1].median_variance == 0.0
    for epsilon in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="it must be finite and at least 0"):
            filter_prompts_by_reward_variance([], epsilon)


@EXAMPLES
@given(st.lists(st.lists(st.floats(-10, 10), max_size=5), max_size=10), st.floats(0, 20), st.floats(0, 20))
def test_a_larger_epsilon_keeps_a_part_of_what_a_smaller_one_keeps(rewards, one, other):
    small, large = sorted((one, other))
    kept, report = filter_prompts_by_reward_variance(rewards, small)
    assert set(filter_prompts_by_reward_variance(rewards, large)[0]) <= set(kept)
    num_dropped = report.num_flat + report.num_few + report.num_not_finite
    assert report.num_kept + num_dropped == report.num_prompts == len(rewards)


def test_answers_with_the_same_ids_tie_and_others_do_not(tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [
        ([1, 2], [3], [3]),
        ([1, 2], [3], [4]),
        ([1, 2], [4], [3]),
        ([1], [2, 3], [4]),
        ([1, 2], [3], [5]),
    ]
    keys = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
    lines = [json.dumps(dict(zip(keys, record, strict=True))) for record in records]
    path.write_text("\n".join(lines) + "\n")
    store = open_store(
        *(path, "pairs"), folder=tmp_path / "store", tokenizer=None, max_prompt_tokens=8, max_tokens=8
    )
    kept, report = drop_contradictions(preferences_of(store))
    assert kept == [3, 4]
    assert (report.num_ties, report.num_cyclic, report.num_prompts) == (1, 2, 2)


def test_all_2312_published_pairs_are_stored_cleaned_and_balanced(shared_data, chatglm3, tmp_path):
    path = shared_data / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    store = open_store(
        *(path, "pairs"),
        form="hh-rlhf",
        folder=tmp_path,
        tokenizer=chatglm3,
        max_prompt_tokens=4096,
        max_tokens=8192,
        vocab_size=65024,
    )
    assert len(store) == store.report.num_records == 2312
    assert (store.report.num_skipped, store.report.num_truncated) == (0, 0)
    kept, report = drop_contradictions(preferences_of(store))
    # 2310 prompts, each but two compared once: nothing can contradict.
    assert (len(kept), report.num_prompts) == (2312, 2310)
    difference = store.chosen_lengths - store.rejected_lengths
    among, balance = balance_lengths(store.chosen_lengths[kept], store.rejected_lengths[kept], seed=1)
    assert (balance.num_kept, balance.num_equal) == (1974, 48)
    assert (difference[among] > 0).sum() == (difference[among] < 0).sum() == (1974 - 48) / 2
    # The published winners are shorter by 10.5 tokens on average; balanced, by less than one.
    assert balance.mean_difference_before == pytest.approx(-10.5, abs=0.1)
    assert abs(balance.mean_difference_after) < 1.0
