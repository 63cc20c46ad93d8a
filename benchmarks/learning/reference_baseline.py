"""The reference-reward baseline of PPO, on and off: spread of rewards over prompts, KL and time to a gain.

python -m benchmarks.learning.reference_baseline
"""

import sys
import tempfile
from pathlib import Path
from statistics import fmean

from benchmarks.learning.offset_task import PROMPTS, SAMPLES, crossing, run_ppo
from benchmarks.learning.outcome import SEEDS, Claim, Trial, run_experiment
from benchmarks.learning.reward_runs import random_policy

ITERATIONS = 45
GAINS = (0.2, 0.4)
ON, OFF = "baseline on", "baseline off"
CLAIMS = (
    Claim(
        text="rewards of different prompts lie closer together",
        figure="reward std over prompts",
        arm=ON,
        against=OFF,
        expects="lower",
    ),
    *(
        Claim(
            text="less KL at the same gold",
            figure=f"KL at gold +{gain}",
            arm=ON,
            against=OFF,
            expects="lower",
        )
        for gain in GAINS
    ),
    *(
        Claim(
            text="the same gold is reached earlier",
            figure=f"iterations to gold +{gain}",
            arm=ON,
            against=OFF,
            expects="lower",
        )
        for gain in GAINS
    ),
)


def main() -> int:
    """Run all trials, write the report and return the exit status: 1 where a claim is not shown."""
    return run_experiment(
        "reference_baseline",
        trials_of,
        SEEDS,
        title="The reference-reward baseline of PPO",
        claims=CLAIMS,
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
        with tempfile.TemporaryDirectory() as folder:
            policy = random_policy(Path(folder) / "policy", seed=seed)
            points = run_ppo(policy, seed=seed, iterations=ITERATIONS, reference_baseline=arm == ON)
        figures = {"reward std over prompts": fmean(point.reward_spread for point in points)}
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
    sys.exit(main())
