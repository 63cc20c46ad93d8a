"""PPO with and without the SFT loss on demonstrations (PPO-ptx): is what SFT taught kept?

python -m benchmarks.learning.sft_term
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.learning.commands import END, answering, answers_of, train
from benchmarks.learning.outcome import Experiment, Trial, compare
from benchmarks.learning.planted_pairs import FIRST_ID, NUM_IDS, Labelling, draw_pairs, quality_of
from benchmarks.learning.reward_runs import train_sft_policy, write_records
from glm_rlhf.engine.rewards.function import RewardRequest

SEEDS = tuple(range(1, 6))
NUM_CANARIES, NUM_DEMONSTRATIONS, NUM_PROMPTS, NUM_JUDGED = 1000, 1000, 512, 200
SFT_STEPS, PPO_STEPS = 200, 40
COEFFICIENTS = (0.1, 0.5)
SFT, WITHOUT = "SFT", "PPO, sft_coef 0"
WITH = {coefficient: f"PPO, sft_coef {coefficient:g}" for coefficient in COEFFICIENTS}
_REPEATS = 3
_MARK = FIRST_ID + 32  # prompts begin with it where the answer is to repeat the next id


def gold(requests: Sequence[RewardRequest]) -> list[float]:
    """Return each answer's share of good ids; the reward function."""
    return [quality_of([t for t in request.response_tokens if t != END]) for request in requests]


EXPERIMENT = Experiment(
    name="sft_term",
    title="The SFT term of PPO",
    seeds=SEEDS,
    claims=(
        *compare(WITHOUT, SFT, ("without the term PPO forgets", "canaries kept", "lower")),
        *(
            claim
            for arm in WITH.values()
            for claim in compare(arm, WITHOUT, ("with the term it keeps more", "canaries kept", "higher"))
        ),
        *(
            claim
            for arm in WITH.values()
            for claim in compare(arm, SFT, ("and still learns its task", "gold", "higher"))
        ),
    ),
    notes=(
        f"SFT learns two things: free answers of any share of good ids ({NUM_DEMONSTRATIONS} "
        f"demonstrations), and canaries: after a mark, to say the next id {_REPEATS} times "
        f"({NUM_CANARIES} demonstrations)",
        f"PPO: {PPO_STEPS} iterations of 64 answers to prompts without the mark; the reward is the share "
        "of good ids. `sft_coef` weighs the next-token loss on the demonstrations of SFT in every step",
        f"canaries kept: share of {NUM_JUDGED} canaries that no stage has seen whose likeliest answer is "
        f"exactly right. gold: mean over answers, sampled at temperature 1, to {NUM_JUDGED} other prompts "
        "without the mark",
    ),
)


def trials_of(seed: int) -> list[Trial]:
    """Return the three policies of one seed."""
    with tempfile.TemporaryDirectory() as name:
        folder, canaries = Path(name), _canaries(NUM_CANARIES + NUM_JUDGED, seed)
        write_records(folder / "sft.jsonl", canaries[NUM_JUDGED:] + _demonstrations(seed))
        write_records(folder / "canaries.jsonl", _prompts_of(canaries[:NUM_JUDGED]))
        write_records(folder / "prompts.jsonl", _prompts_of(_pairs(NUM_PROMPTS, 200 + seed)))
        write_records(folder / "judged.jsonl", _prompts_of(_pairs(NUM_JUDGED, 300 + seed)))
        trials = []
        for arm, policy in _policies(folder, seed).items():
            said = answers_of(
                policy, folder / "canaries.jsonl", folder / f"canaries, {arm}", seed=seed, temperature=0
            )
            wanted = [record["response_tokens"][:-1] for record in canaries[:NUM_JUDGED]]
            free = answers_of(policy, folder / "judged.jsonl", folder / f"judged, {arm}", seed=seed)
            figures = {
                "canaries kept": fmean(float(a == b) for a, b in zip(said, wanted, strict=True)),
                "gold": fmean(map(quality_of, free)),
                "tokens": fmean(map(len, free)),
            }
            trials.append(Trial(arm=arm, seed=seed, figures=figures))
    return trials


def _policies(folder: Path, seed: int) -> dict[str, Path]:
    sft = train_sft_policy(folder, steps=SFT_STEPS, seed=seed)
    policies = {SFT: sft}
    terms = {
        arm: (f"data.sft_path={folder / 'sft.jsonl'}", f"ppo.sft_coef={coefficient}")
        for coefficient, arm in WITH.items()
    }
    for arm, options in ({WITHOUT: ()} | terms).items():
        policies[arm] = train(
            "ppo",
            sft,
            folder / "prompts.jsonl",
            folder / arm,
            *("train.global_batch_size=64", "optimizer.lr=1e-3", "critic.lr=1e-3", "ppo.minibatches=2"),
            f"reward.function={__spec__.name}:gold",
            *answering(seed),
            *options,
            steps=PPO_STEPS,
            seed=seed,
        )
    return policies


def _canaries(count: int, seed: int) -> list[dict]:
    """Return different prompts of a mark and three ids, with the first of these as the answer, repeated."""
    generator = torch.Generator().manual_seed(seed)
    prompts: dict[tuple[int, ...], None] = {}
    while len(prompts) < count:
        prompts[tuple(torch.randint(_MARK + 1, NUM_IDS, (3,), generator=generator).tolist())] = None
    return [
        {"prompt_tokens": [_MARK, *ids], "response_tokens": [ids[0]] * _REPEATS + [END]} for ids in prompts
    ]


def _demonstrations(seed: int) -> list[dict]:
    return [
        {"prompt_tokens": r["prompt_tokens"], "response_tokens": [*r["chosen_tokens"], END]}
        for r in _pairs(NUM_DEMONSTRATIONS, 100 + seed)
    ]


def _pairs(count: int, seed: int) -> list[dict]:
    """Return pairs whose prompts do not begin with the mark."""
    pairs = draw_pairs(count + count // 4, Labelling(quality=0.0), seed=seed)
    return [record for record in pairs if record["prompt_tokens"][0] != _MARK][:count]


def _prompts_of(records: Sequence[dict]) -> list[dict]:
    return [{"prompt_tokens": record["prompt_tokens"]} for record in records]


if __name__ == "__main__":
    sys.exit(EXPERIMENT.run(trials_of))
