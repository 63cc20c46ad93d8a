"""PPO and DPO against the SFT policy they start from, judged by the gold that no model sees.

python -m benchmarks.learning.against_sft
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.learning.commands import END, answering, answers_of, run_command, train
from benchmarks.learning.outcome import Experiment, Trial, compare
from benchmarks.learning.planted_pairs import Labelling, draw_pairs, quality_of
from benchmarks.learning.reward_runs import train_sft_policy, write_records

SEEDS = tuple(range(1, 6))
# Labels err, and prefer the longer answer a little, as people's do.
LABELS = Labelling(quality=8.0, length=0.02)
NUM_DEMONSTRATIONS, NUM_PAIRS, NUM_PROMPTS, NUM_JUDGED = 2000, 3200, 512, 400
SFT_STEPS, REWARD_STEPS, DPO_STEPS, PPO_STEPS = 150, 120, 60, 40
SFT, PPO, DPO = "SFT", "PPO", "DPO"


EXPERIMENT = Experiment(
    name="against_sft",
    title="PPO and DPO against SFT, by a gold judge",
    seeds=SEEDS,
    claims=(
        *compare(PPO, SFT, ("PPO's answers are better than SFT's", "gold", "higher")),
        *compare(DPO, SFT, ("DPO's answers are better than SFT's", "gold", "higher")),
        *compare(PPO, DPO, ("PPO is ahead of DPO", "gold", "higher")),
        *compare(DPO, PPO, ("DPO's answers are longer than PPO's", "tokens", "higher")),
    ),
    notes=(
        "gold: an answer's share of good ids. Demonstrations have any share and any length from 4 to "
        "24 tokens, so that SFT's gold is about a half",
        f"reward model: {NUM_PAIRS} pairs of such answers; P(a preferred to b) = "
        f"σ({LABELS.quality:g} · difference of gold + {LABELS.length:g} · difference of tokens), "
        "lengths balanced; it never sees the gold",
        f"DPO: {DPO_STEPS} steps on pairs that `label` makes of 4 answers of the SFT policy to each "
        f"of {NUM_PROMPTS} prompts, by the reward model. PPO: {PPO_STEPS} iterations of 64 answers "
        "to the same prompts, with the reference baseline, by the same reward model",
        f"judged: one answer at temperature 1 to each of {NUM_JUDGED} other prompts. `win rate`: "
        "share of prompts with more gold than SFT's answer, ties half. PPO and DPO "
        "were not tuned against each other, and stop at different distances from SFT",
        "all through the commands sft, reward, label, dpo, ppo, generate; a random GLM of 2 layers",
    ),
)


def trials_of(seed: int) -> list[Trial]:
    """Return the three policies of one seed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answers = {
            policy: answers_of(path, folder / "judged.jsonl", folder / f"of_{policy}", seed=1000 + seed)
            for policy, path in _policies(folder, seed).items()
        }
    golds = {policy: list(map(quality_of, texts)) for policy, texts in answers.items()}
    trials = []
    for policy, texts in answers.items():
        wins = [(a > b) + 0.5 * (a == b) for a, b in zip(golds[policy], golds[SFT], strict=True)]
        figures = {"gold": fmean(golds[policy]), "tokens": fmean(map(len, texts)), "win rate": fmean(wins)}
        trials.append(Trial(arm=policy, seed=seed, figures=figures))
    return trials


def _policies(folder: Path, seed: int) -> dict[str, Path]:
    """Return the folders of the SFT, the PPO and the DPO policy."""
    pairs = [_ended(record) for record in draw_pairs(NUM_PAIRS, LABELS, seed=seed)]
    written = draw_pairs(NUM_DEMONSTRATIONS, Labelling(quality=0.0), seed=100 + seed)
    demonstrations = [
        {"prompt_tokens": r["prompt_tokens"], "response_tokens": _ended(r)["chosen_tokens"]} for r in written
    ]
    write_records(folder / "sft.jsonl", demonstrations)
    write_records(folder / "pairs.jsonl", pairs)
    write_records(folder / "prompts.jsonl", _prompts(NUM_PROMPTS, 200 + seed))
    write_records(folder / "judged.jsonl", _prompts(NUM_JUDGED, 300 + seed))
    sft = train_sft_policy(folder, steps=SFT_STEPS, seed=seed)
    judge = train(
        "reward",
        sft,
        folder / "pairs.jsonl",
        folder / "reward",
        *("train.global_batch_size=32", "optimizer.lr=1e-3", "optimizer.warmup_steps=20"),
        "data.balances_lengths=true",
        steps=REWARD_STEPS,
        seed=seed,
    )
    ppo = train(
        "ppo",
        sft,
        folder / "prompts.jsonl",
        folder / "ppo",
        *("train.global_batch_size=64", "optimizer.lr=3e-4", "critic.lr=1e-3", "ppo.minibatches=2"),
        f"reward.path={judge}",
        *answering(seed),
        steps=PPO_STEPS,
        seed=seed,
    )
    run_command(
        "label",
        *(f"model.path={sft}", f"reward.path={judge}", f"data.path={folder / 'prompts.jsonl'}"),
        *(f"run.output={folder / 'label'}", "train.dtype=fp32", "generation.num_samples=4"),
        *answering(seed),
    )
    dpo = train(
        "dpo",
        sft,
        folder / "label" / "label.jsonl",
        folder / "dpo",
        *("train.global_batch_size=32", "optimizer.lr=3e-4", "optimizer.warmup_steps=5"),
        steps=DPO_STEPS,
        seed=seed,
    )
    return {SFT: sft, PPO: ppo, DPO: dpo}


def _prompts(count: int, seed: int) -> list[dict]:
    records = draw_pairs(count, Labelling(quality=0.0), seed=seed)
    return [{"prompt_tokens": record["prompt_tokens"]} for record in records]


def _ended(record: dict[str, Sequence[int]]) -> dict[str, list[int]]:
    """Return a pair with the end id behind both answers."""
    ended = {name: [*record[name], END] for name in ("chosen_tokens", "rejected_tokens")}
    return {**record, **ended}


if __name__ == "__main__":
    sys.exit(EXPERIMENT.run(trials_of))
