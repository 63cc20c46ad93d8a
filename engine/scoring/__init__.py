"""Log-probabilities, values and scores of rollouts by the models of a run.

Imports `rollout`, `objectives` and below.
"""
