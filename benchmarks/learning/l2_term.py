"""The L2 term of the reward model's loss: does it hold the scores together at unchanged accuracy?

python -m benchmarks.learning.l2_term
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.learning.outcome import Experiment, Trial, compare
from benchmarks.learning.planted_pairs import TRUTH, Labelling, draw_pairs
from benchmarks.learning.reward_runs import BATCH, random_policy, train_reward_model, write_records

# Labels that err as people do: answers half the scale apart are ranked right with probability σ(4) = 98 %.
NOISY = Labelling(quality=8.0)
NUM_PAIRS, NUM_HELD_OUT = 3200, 1000
STEPS = 120
COEFFICIENTS = (0.0, 0.01, 0.1)
ARMS = {coefficient: f"l2_coef {coefficient:g}" for coefficient in COEFFICIENTS}


EXPERIMENT = Experiment(
    name="l2_term",
    title="The L2 term of the reward model's loss",
    claims=tuple(
        claim
        for coefficient in COEFFICIENTS[1:]
        for claim in compare(
            ARMS[coefficient],
            ARMS[0.0],
            ("the L2 term shrinks the spread of scores", "score_std", "lower"),
            ("pair accuracy stays within a point", "accuracy", "within 0.01"),
        )
    ),
    notes=(
        f"labels: P(a preferred to b) = σ({NOISY.quality:g} · difference of quality); quality is the "
        "share of good tokens, independent of length",
        f"held out: {NUM_HELD_OUT} other pairs, which quality decides without error",
        f"training: the stage `reward` on {NUM_PAIRS} pairs, {STEPS} steps of {BATCH}, a random GLM "
        "of 2 layers with 64 channels; the arms differ in `reward.l2_coef` alone",
    ),
)


def trials_of(seed: int) -> list[Trial]:
    """Return the arms of one seed."""
    trials = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = random_policy(folder / "policy", seed=seed)
        pairs = write_records(folder / "pairs.jsonl", draw_pairs(NUM_PAIRS, NOISY, seed=seed))
        held_out = write_records(folder / "held.jsonl", draw_pairs(NUM_HELD_OUT, TRUTH, seed=1000 + seed))
        for coefficient, arm in ARMS.items():
            output = folder / arm
            figures = train_reward_model(
                policy, pairs, held_out, output, steps=STEPS, seed=seed, l2_coef=coefficient
            )
            trials.append(Trial(arm=arm, seed=seed, figures=figures))
    return trials


if __name__ == "__main__":
    sys.exit(EXPERIMENT.run(trials_of))
