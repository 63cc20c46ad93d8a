"""Warming up PPO's critic before the policy learns, on and off, where rewards depend much on the prompt.

python -m benchmarks.learning.critic_warmup
"""

import sys

from benchmarks.learning.offset_task import GAINS, PROMPTS, SAMPLES, crossing, faster_claims, points_of
from benchmarks.learning.outcome import Experiment, Trial, compare

WARMUP, ITERATIONS = 10, 45
ON, OFF = f"{WARMUP} iterations of warm-up", "no warm-up"
EXPLAINED = "explained variance at the policy's first update"


EXPERIMENT = Experiment(
    name="critic_warmup",
    title="Warming up PPO's critic",
    claims=(
        *compare(ON, OFF, ("the policy starts with a critic that knows more", EXPLAINED, "higher")),
        *faster_claims(ON, OFF, "fewer updates of the policy to the same gold", "policy updates"),
    ),
    notes=(
        "task: an answer's gold is its share of good ids; its reward is the gold plus an offset "
        "from -1 to 1 that the prompt's first id names, and that the critic can learn",
        f"PPO through `PPOEngine`: a random GLM of 2 layers, {ITERATIONS} iterations in which "
        f"the policy learns, of {PROMPTS} new prompts with {SAMPLES} answers each; no reference "
        "baseline, no whitening; the arms differ in `critic.warmup_iterations` alone",
        "KL: mean log-ratio to the reference, nats an answer, where the gold (mean of five "
        "iterations) first is so far above its beginning. Policy updates leave the warm-up's "
        "iterations out, iterations count them",
    ),
)


def trials_of(seed: int) -> list[Trial]:
    """Return both arms of one seed."""
    trials = []
    for arm, warmup in ((OFF, 0), (ON, WARMUP)):
        points = points_of(seed, warmup + ITERATIONS, reference_baseline=False, critic_warmup=warmup)
        figures = {EXPLAINED: points[warmup].explained_variance}
        for gain in GAINS:
            iterations, kl = crossing(points, gain)
            figures |= {
                f"KL at gold +{gain}": kl,
                f"policy updates to gold +{gain}": iterations - warmup,
                f"iterations to gold +{gain}": iterations,
            }
        trials.append(Trial(arm=arm, seed=seed, figures=figures))
    return trials


if __name__ == "__main__":
    sys.exit(EXPERIMENT.run(trials_of))
