"""Tiny reward models, trained by the command `reward`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.learning.commands import train
from benchmarks.learning.planted_pairs import NUM_IDS
from glm_rlhf.engine.bench.sizes import SMALL
from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.weights.export import export_model
from glm_rlhf.parallel.weights.load import randomize_weights

SHAPE = replace(
    SMALL,
    num_layers=2,
    hidden_size=64,
    head_size=16,
    ffn_size=128,
    vocab_size=NUM_IDS,
    max_positions=64,
    init_std=0.05,
)
BATCH = 32
LR = 1e-3
WARMUP_STEPS = 20


def random_policy(folder: Path, *, seed: int) -> Path:
    """Return the folder, with a policy of random weights written into it."""
    with open_topology(Layout(), seed=seed) as topology:
        chunks = build_model(SHAPE, topology, dtype=torch.float32)
        randomize_weights(chunks, seed=seed)
        export_model(chunks, folder, topology=topology)
    return folder


def train_sft_policy(folder: Path, *, steps: int, seed: int) -> Path:
    """Return a policy that has learned the demonstrations `folder/sft.jsonl` from random weights."""
    return train(
        "sft",
        random_policy(folder / "random", seed=seed),
        folder / "sft.jsonl",
        folder / "sft",
        *("train.global_batch_size=64", "optimizer.lr=2e-3", "optimizer.warmup_steps=10"),
        steps=steps,
        seed=seed,
    )


def write_records(path: Path, records: Sequence[dict]) -> Path:
    """Return the path, with the records written to it as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def train_reward_model(
    policy: Path,
    pairs: Path,
    held_out: Path,
    output: Path,
    *,
    steps: int,
    seed: int,
    l2_coef: float,
    balances_lengths: bool = False,
) -> dict[str, float]:
    """Return the evaluation after the last step, by metric, and how many pairs were learned from.

    Args:
        policy: the model that training starts from.
        pairs: JSON lines to learn from.
        held_out: JSON lines to evaluate on, all of them.
        output: run folder.
        steps: of 32 pairs each.
        seed: of the scalar head, of balancing, and of the order of pairs.
        l2_coef: weight of the squared scores.
        balances_lengths: whether `data.balances_lengths` is on.
    """
    train(
        "reward",
        policy,
        pairs,
        output,
        f"data.eval_path={held_out}",
        f"data.eval_records={sum(1 for _ in held_out.open())}",
        f"data.balances_lengths={str(balances_lengths).lower()}",
        f"reward.l2_coef={l2_coef}",
        *(f"train.global_batch_size={BATCH}", f"optimizer.lr={LR}", f"optimizer.warmup_steps={WARMUP_STEPS}"),
        steps=steps,
        seed=seed,
    )
    *_, last = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluation = {
        name.removeprefix("eval/"): value
        for name, value in json.loads(last).items()
        if name.startswith("eval/")
    }
    report = json.loads((output / "data.json").read_text(encoding="utf-8"))[str(pairs)]
    found = report.get("length_balance", report["contradictions"])
    return evaluation | {"pairs_learned_from": float(found["num_kept"])}
