"""The reference-reward baseline of PPO, on and off: spread of rewards over prompts, KL and time to a gain.

python -m benchmarks.learning.reference_baseline
"""

import sys
from statistics import fmean

from benchmarks.learning.offset_task import GAINS, PROMPTS, SAMPLES, crossing, faster_claims, points_of
from benchmarks.learning.outcome import Experiment, Trial, compare

ITERATIONS = 45
ON, OFF = "baseline on", "baseline off"
SPREAD = "reward std over prompts"


EXPERIMENT = Experiment(
    name="reference_baseline",
    title="The reference-reward baseline of PPO",
    claims=(
        *compare(ON, OFF, ("rewards of different prompts lie closer together", SPREAD, "lower")),
        *faster_claims(ON, OFF, "the same gold is reached earlier", "iterations"),
    ),
    notes=(
        "task: an answer's gold is its share of good ids; its reward is the gold plus an offset "
        "from -1 to 1 that the prompt's first id names",
        f"PPO through `PPOEngine`: a random GLM of 2 layers, {ITERATIONS} iterations of {PROMPTS} "
        f"new prompts with {SAMPLES} answers each, no whitening; the arms differ in "
        "`ppo.reference_baseline` alone",
        "reward std over prompts: of each prompt's mean reward as PPO learns from it, averaged "
        "over the iterations. KL: mean log-ratio to the reference, nats an answer, where the gold "
        "(mean of five iterations) first is so far above its beginning",
    ),
)


def trials_of(seed: int) -> list[Trial]:
    """Return both arms of one seed."""
    trials = []
    for arm in (OFF, ON):
        points = points_of(seed, ITERATIONS, reference_baseline=arm == ON)
        figures = {SPREAD: fmean(point.reward_spread for point in points)}
        for gain in GAINS:
            iterations, kl = crossing(points, gain)
            figures |= {f"KL at gold +{gain}": kl, f"iterations to gold +{gain}": iterations}
        figures |= {
            "mean reward at first": points[0].reward_mean,
            "gold at first": points[0].gold,
            "gold at last": points[-1].gold,
        }
        trials.append(Trial(arm=arm, seed=seed, figures=figures))
    return trials


if __name__ == "__main__":
    sys.exit(EXPERIMENT.run(trials_of))
