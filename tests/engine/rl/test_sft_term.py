"""PPO with demonstrations: one step on both losses, equal to adding them up by hand over transformers."""

import json
import math
from pathlib import Path

import pytest
import torch
from layout_params import layout_params
from tiny_models import make_model, reference_logprobs, save_folder
from tiny_ppo import make_roles, prompts
from tiny_training import assemble, pieces_of
from training_curves import write_demonstrations

from glm_rlhf.engine.build.records import open_demonstrations
from glm_rlhf.engine.config.load import load_config
from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.config.training import DemonstrationsSection
from glm_rlhf.engine.data.sampler import BatchSampler
from glm_rlhf.engine.rl.engine import PPOEngine
from glm_rlhf.engine.rl.sft_term import DemonstrationStream
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.storage.hf_config import read_config

LAYOUTS = {
    "dp4": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "pp2 vpp2": {"pp": 2, "vpp": 2},
    "cp2": {"cp": 2},
}
COEF, BATCH, SEED = 0.7, 3, 5
# Steps of about the gradient's size, clipped: roundings of it stay roundings of the weights.
ADAM = AdamSettings(lr=0.1, betas=(0.0, 0.0), epsilon=1.0, clip_grad=0.5)
SETTINGS = {"epochs": 2, "minibatches": 1, "clip": 0.02, "kl_target": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("model"), "glm", make_model("glm"))


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory) -> Path:
    return write_demonstrations(tmp_path_factory.mktemp("data") / "sft.jsonl", 7)


def stream(path: Path, run_folder: Path, glm: GLMConfig, topology, **changes) -> DemonstrationStream:
    records, _ = open_demonstrations(
        DemonstrationsSection(path=str(path)), run_folder, None, glm, topology=topology
    )
    options = {"batch_size": BATCH, "coef": COEF, "micro_batch_tokens": 30, "seed": SEED}
    return DemonstrationStream(records, **(options | changes))


def update_once(folder: Path, path: Path, run_folder: Path, axes: dict) -> tuple:
    """Pieces of the policy's weights after two steps, the metrics, and the experience learned from."""
    with open_topology(Layout(**axes)) as topology:
        roles = make_roles(folder, topology, settings=SETTINGS, policy_adam=ADAM)
        roles.demonstrations = stream(path, run_folder, roles.models["policy"][0].glm, topology)
        experience = roles.make_experience(roles.generate(prompts()))
        metrics = roles.update(experience)
        weights = {name: p.detach() for chunk in roles.models["policy"] for name, p in chunk.named_weights()}
        return pieces_of(roles.models["policy"], weights), metrics, experience


@pytest.fixture(scope="module")
def by_hand(folder, demonstrations, tmp_path_factory):
    """Weights and losses of transformers' model after two steps on the two losses, one after the other."""
    _, _, experience = update_once(folder, demonstrations, tmp_path_factory.mktemp("alone"), {})
    records = [json.loads(line) for line in demonstrations.open()]
    model = make_model("glm")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=ADAM.lr, betas=ADAM.betas, eps=ADAM.epsilon, weight_decay=0.0
    )
    rollouts = experience.rollouts
    sequences = rollouts.tokens_T.split(list(rollouts.lengths))
    mask_T, sampler, sft_losses = rollouts.action_mask_T, BatchSampler(7, BATCH, seed=SEED), []
    for step in range(2):
        optimizer.zero_grad()
        logprobs_T = torch.cat(reference_logprobs(model, list(sequences)))
        ratio_T = (logprobs_T - experience.old_logprobs_T).exp()
        gain_T = torch.minimum(
            ratio_T * experience.advantages_T, ratio_T.clamp(0.98, 1.02) * experience.advantages_T
        )
        (-gain_T[mask_T].sum() / mask_T.sum()).backward()
        total, count = torch.zeros(()), 0
        for number in sampler.batch(step):
            prompt, answer = records[number]["prompt_tokens"], records[number]["response_tokens"]
            (logprobs_T,) = reference_logprobs(model, [torch.tensor(prompt + answer)])
            total, count = total - logprobs_T[len(prompt) :].sum(), count + len(answer)
        sft_losses.append((total / count).item())
        (COEF * total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM.clip_grad)
        optimizer.step()
    for before, after in zip(make_model("glm").parameters(), model.parameters(), strict=True):
        if before.dim() > 1:
            assert (before - after).abs().max() > 1e-4  # a hundred times what is allowed below
    return dict(model.named_parameters()), sum(sft_losses) / 2


@pytest.mark.parametrize("axes", layout_params(LAYOUTS, quick=("tp2 pp2", "cp2")))
def test_a_step_equals_the_two_losses_added_up_by_hand(
    ranks, folder, demonstrations, by_hand, tmp_path, axes
):
    weights, sft_loss = by_hand
    found = ranks.run(update_once, folder, demonstrations, tmp_path, axes)
    whole, copies = assemble([pieces for pieces, _, _ in found])
    assert copies == 0
    for name, weight in whole.items():
        assert (weight - weights[name]).abs().max() <= 1e-6, name  # fp32 in another order
    for _, metrics, _ in found:
        assert metrics["actor/sft_loss"] == pytest.approx(sft_loss, rel=1e-5)


def test_demonstrations_come_each_once_an_epoch_and_need_not_fill_every_rank(
    folder, demonstrations, tmp_path
):
    with open_topology(Layout()) as topology:
        source = stream(demonstrations, tmp_path, read_config(folder), topology, batch_size=1)
        taken = [source.take(topology) for _ in range(7)]
        assert {term.batches[0].items for term in taken} == {(number,) for number in range(7)}
        assert sum(term.denominator for term in taken) == source.records.store.response_lengths.sum()
        with pytest.raises(
            ValueError, match=r"gives 7 demonstrations.* takes 8: set train.sft_batch_size to 7"
        ):
            stream(demonstrations, tmp_path, read_config(folder), topology, batch_size=8)


def config(folder: Path, *overrides: str) -> PPOConfig:
    rule = "reward.function=reward_rules:share_of_low_ids"
    required = (f"model.path={folder}", rule, "data.path=unused.jsonl", "train.steps=1", "train.dtype=fp32")
    return load_config(PPOConfig, overrides=(*required, *overrides))


def test_the_engine_reads_demonstrations_and_holds_on_to_them(folder, demonstrations, tmp_path):
    """With a weight that drowns the rewards, the demonstrations' loss falls from update to update."""
    settings = config(
        folder,
        f"data.sft_path={demonstrations}",
        f"run.output={tmp_path}",
        "ppo.sft_coef=100",
        "train.sft_batch_size=7",
        "generation.max_new_tokens=4",
        "optimizer.lr=2e-3",
    )
    losses = []
    with PPOEngine(settings) as engine:
        for _ in range(4):
            experience = engine.make_experience(engine.generate([[5, 6, 7], [8, 9]]))
            losses.append(engine.update(experience)["actor/sft_loss"])
    assert all(map(math.isfinite, losses))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("ppo.sft_coef=0.1", "ppo.sft_coef is 0.1, but there are no demonstrations"),
        ("data.sft_path=d.jsonl", "data.sft_path is d.jsonl, but ppo.sft_coef is 0"),
        ("train.sft_batch_size=2", "train.sft_batch_size is 2, but there are no demonstrations"),
    ],
)
def test_half_a_setting_is_refused(override, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(Path("model"), override)


def test_a_step_takes_as_many_demonstrations_as_prompts_by_default():
    options = ("data.sft_path=d.jsonl", "ppo.sft_coef=0.1", "ppo.minibatches=3", "train.global_batch_size=8")
    assert config(Path("model"), *options).sft_batch_size == 3
    assert config(Path("model"), *options, "train.sft_batch_size=5").sft_batch_size == 5
