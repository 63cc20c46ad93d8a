"""Length balancing against a planted length bias: does the reward model still prefer the longer answer?

python -m benchmarks.learning.length_bias
"""

import random
import sys
import tempfile
from pathlib import Path

from benchmarks.learning.outcome import Experiment, Trial, compare
from benchmarks.learning.planted_pairs import TRUTH, Labelling, draw_pairs
from benchmarks.learning.reward_runs import BATCH, random_policy, train_reward_model, write_records

# Of two answers of equal quality, 8 tokens apart, the longer is preferred with probability σ(1.2) = 77 %.
BIASED = Labelling(quality=4.0, length=0.15)
NUM_PAIRS, NUM_HELD_OUT = 3200, 1000
STEPS = 120
L2_COEF = 0.01

_TIE = "|corr(score, length)|"
ALL, FEWER, BALANCED = "all pairs", "as many at random", "balanced"


EXPERIMENT = Experiment(
    name="length_bias",
    title="Length balancing with a planted length bias",
    claims=(
        *compare(
            BALANCED,
            ALL,
            ("balancing lowers the tie of score to length", _TIE, "lower"),
            ("it raises accuracy where the shorter answer is better", "accuracy_shorter", "higher"),
        ),
        *compare(
            BALANCED,
            FEWER,
            ("the smaller number of pairs does not explain the first", _TIE, "lower"),
            ("nor the second", "accuracy_shorter", "higher"),
        ),
    ),
    notes=(
        f"labels: P(a preferred to b) = σ({BIASED.quality:g} · difference of quality + "
        f"{BIASED.length:g} · difference of length in tokens); quality is the share of good tokens, "
        "independent of length (4 to 24 tokens)",
        f"held out: {NUM_HELD_OUT} other pairs, which quality alone decides; `accuracy_shorter` is "
        "accuracy on those whose better answer is the shorter one",
        f"arms: `{ALL}`: {NUM_PAIRS} pairs as they are; `{BALANCED}`: `data.balances_lengths` on the "
        f"same pairs; `{FEWER}`: a random choice of as many pairs as balancing leaves",
        f"training: the stage `reward`, {STEPS} steps of {BATCH} pairs in every arm, l2_coef "
        f"{L2_COEF}, a random GLM of 2 layers with 64 channels",
    ),
)


def trials_of(seed: int) -> list[Trial]:
    """Return the three arms of one seed."""
    records = draw_pairs(NUM_PAIRS, BIASED, seed=seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = random_policy(folder / "policy", seed=seed)
        held_out = write_records(folder / "held.jsonl", draw_pairs(NUM_HELD_OUT, TRUTH, seed=1000 + seed))
        pairs = write_records(folder / "all.jsonl", records)
        options = {"held_out": held_out, "steps": STEPS, "seed": seed, "l2_coef": L2_COEF}
        balanced = train_reward_model(
            policy, pairs, output=folder / "balanced", balances_lengths=True, **options
        )
        some = random.Random(seed).sample(records, int(balanced["pairs_learned_from"]))
        fewer = write_records(folder / "fewer.jsonl", some)
        evaluations = {
            ALL: train_reward_model(policy, pairs, output=folder / "all", **options),
            FEWER: train_reward_model(policy, fewer, output=folder / "fewer", **options),
            BALANCED: balanced,
        }
    return [
        Trial(arm=arm, seed=seed, figures={_TIE: abs(f["corr_score_length"]), **f})
        for arm, f in evaluations.items()
    ]


if __name__ == "__main__":
    sys.exit(EXPERIMENT.run(trials_of))
