"""Rows that compare with transformers can be measured, and every contender's answer is right."""

from benchmarks.generation import answers, mixes
from benchmarks.training import reward_model, sequences


def statuses(rows) -> list[list[str]]:
    assert all(entry.timing is not None for row in rows for entry in row.entries)
    return [[entry.status for entry in row.entries] for row in rows]


def test_training_on_sequences_of_uneven_lengths(monkeypatch):
    monkeypatch.setattr(sequences, "mixes", lambda: {"uneven": [5, 9, 4]})
    assert statuses(sequences.measure_rows(1, 0.0)) == [[""] * 3]


def test_training_of_a_reward_model(monkeypatch):
    monkeypatch.setattr(reward_model, "HH_RLHF_LENGTHS", ((3, 2, 4), (5, 1, 2)))
    assert statuses(reward_model.measure_rows(1, 0.0)) == [[""] * 3]


def test_answers_that_end_at_a_stop_id(monkeypatch):
    mix = mixes.Mix(name="uneven", prompts=((5, 6), (7, 8, 9)), lengths=(2, 4), temperature=1.0)
    monkeypatch.setattr(answers, "mixes", lambda: [mix])
    assert statuses(answers.measure_rows(1, 0.0)) == [[""] * 2]
