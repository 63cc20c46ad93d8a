"""Synthetic pairs have the quality and the bias that their labelling says, and nothing else."""

import numpy as np
import pytest

from benchmarks.learning.planted_pairs import FIRST_ID, NUM_IDS, TRUTH, Labelling, draw_pairs, quality_of


def share_of_good(answer: list[int]) -> float:
    return sum(FIRST_ID <= token < FIRST_ID + 16 for token in answer) / len(answer)


def test_true_labels_never_err_and_say_nothing_of_length():
    records = draw_pairs(1500, TRUTH, seed=1)
    assert all(share_of_good(r["chosen_tokens"]) > share_of_good(r["rejected_tokens"]) for r in records)
    answers = [record[name] for record in records for name in ("chosen_tokens", "rejected_tokens")]
    assert {len(answer) for answer in answers} == set(range(4, 25))
    assert all(FIRST_ID <= token < NUM_IDS for answer in answers for token in answer)
    # 3000 independent answers: the standard error of a correlation is 0.018.
    tie = np.corrcoef([len(answer) for answer in answers], [share_of_good(answer) for answer in answers])
    assert [quality_of(answer) for answer in answers] == [share_of_good(answer) for answer in answers]
    assert quality_of([]) == 0.0
    assert abs(tie[0, 1]) < 0.06


def test_a_planted_bias_is_found_in_the_labels():
    records = draw_pairs(1500, Labelling(quality=0.0, length=0.15), seed=2)
    differences = np.array([len(r["chosen_tokens"]) - len(r["rejected_tokens"]) for r in records])
    apart = np.abs(differences)
    is_near_8 = (apart >= 7) & (apart <= 9)
    # σ(0.15 · 8) = 0.769, over some 200 pairs: standard error 0.03.
    assert (differences[is_near_8] > 0).mean() == pytest.approx(0.769, abs=0.1)


def test_a_seed_names_its_pairs():
    assert draw_pairs(5, TRUTH, seed=3) == draw_pairs(5, TRUTH, seed=3) != draw_pairs(5, TRUTH, seed=4)
