"""A number that is none, on one rank of a PPO run: no step on any rank, and its place is named."""

import contextlib
import json

import pytest
import torch
from tiny_models import make_model, save_folder
from tiny_ppo import make_roles, prompts

from glm_rlhf.engine.cli import main
from glm_rlhf.engine.rl.algorithms import ppo
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_folder(tmp_path_factory.mktemp("model"), "glm", make_model("glm"))


@contextlib.contextmanager
def hurt_weight(chunks, is_hit: bool):
    """Make one row of this rank's last weight NaN for a while."""
    weight = list(chunks[0].parameters())[-1].data
    kept = weight.clone()
    if is_hit:
        weight[0] = torch.nan
    try:
        yield
    finally:
        weight.copy_(kept)


@contextlib.contextmanager
def hurt_loss(name: str, is_hit: bool):
    """Make the sums of one loss NaN for a while, its gradient left alone."""
    original = getattr(ppo, name)

    def broken(*args, **kwargs):
        loss, statistics = original(*args, **kwargs)
        statistics.sums[0] = torch.nan
        return loss, statistics

    if is_hit:
        setattr(ppo, name, broken)
    try:
        yield
    finally:
        setattr(ppo, name, original)


@contextlib.contextmanager
def hurt_gradient(chunks, is_hit: bool):
    """Make the gradient of this rank's first weight NaN for a while."""
    handle = next(chunks[0].parameters()).register_hook(lambda g: g * torch.nan) if is_hit else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def meet_faults(folder) -> tuple[dict[str, str], bool]:
    """Return what is said of models that hold a NaN, and whether weights stayed to the bit."""
    said = {}
    with open_topology(Layout(tp=2, pp=2)) as topology:
        roles = make_roles(folder, topology)
        trained = [*roles.models["policy"][0].parameters(), *roles.models["critic"][0].parameters()]
        experience = roles.make_experience(roles.generate(prompts()))
        before = [weight.detach().clone() for weight in trained]
        for role in ("policy", "reference", "critic"):
            rollouts = experience.rollouts
            with hurt_weight(roles.models[role], topology.rank == 3):
                try:
                    if role == "policy":
                        rollouts = roles.generate(prompts())
                    roles.make_experience(rollouts)
                except FloatingPointError as error:
                    said[role] = str(error)
        is_same = all(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    return said, is_same


def test_no_model_with_a_nan_on_one_rank_makes_experience(ranks, folder):
    (answer,) = {json.dumps(answer) for answer in ranks.run(meet_faults, folder)}
    said, is_same = json.loads(answer)
    assert is_same
    words = {
        "policy": "the policy's logits in the answers to prompts",
        "reference": "the reference's logprobs of answers 0, 1, 2 and 13 more",
        "critic": "the critic's values of answers 0, 1, 2 and 13 more",
    }
    assert said.keys() == words.keys()
    for name, sentence in words.items():
        assert sentence in said[name], (name, said[name])


def meet_faults_in_steps(folder, axes, in_backward: bool):
    """Return what is said of each fault, the roles whose weights it changed, and the norm of a sound step."""
    said, changed = {}, {}
    with open_topology(Layout(**axes)) as topology:
        settings = {"epochs": 1, "minibatches": 1}
        roles = make_roles(folder, topology, in_backward=in_backward, settings=settings)
        experience = roles.make_experience(roles.generate(prompts()))
        hurts = {
            "critic loss": hurt_loss("ppo_value_loss", topology.rank == 3),
            "critic gradient": hurt_gradient(roles.models["critic"], topology.rank == 1),
            "policy loss": hurt_loss("linear_ppo_loss", topology.rank == 3),
            "policy gradient": hurt_gradient(roles.models["policy"], topology.rank == 1),
        }
        for name, hurt in hurts.items():
            before = {role: weights_of(roles, role) for role in roles.states}
            with hurt:
                try:
                    roles.update(experience)
                except FloatingPointError as error:
                    said[name] = str(error)
            changed[name] = [
                role for role, weights in before.items() if not torch.equal(weights, weights_of(roles, role))
            ]
        norm = roles.update(experience)["actor/grad_norm"]
    return said, changed, norm


def weights_of(roles, role: str) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in roles.models[role][0].parameters()])


@pytest.mark.parametrize("axes", [{"tp": 2, "pp": 2}, {"tp": 2}], ids=["tp2 pp2", "tp2 dp2"])
def test_no_fault_in_one_role_on_one_rank_lets_the_other_step(ranks, folder, axes):
    answers = ranks.run(meet_faults_in_steps, folder, axes, False)
    said, _, norm = answers[0]
    assert norm > 0
    for words, changed, own_norm in answers:
        assert words == said
        assert not any(changed.values()), changed
        assert own_norm == pytest.approx(norm)
    # Rank 3 is of the last stage, and rank 1 of the first, where there are two.
    words = {
        "critic loss": "on rank 3 the critic's loss on answers",
        "critic gradient": "those of embedding.word_embeddings.weight of the critic in a step on answers",
        "policy loss": "on rank 3 the policy's loss on answers",
        "policy gradient": "those of embedding.word_embeddings.weight of the policy in a step on answers",
    }
    assert said.keys() == words.keys()
    for name, sentence in words.items():
        assert sentence in said[name], (name, said[name])
        assert "on rank" in said[name]


def test_an_optimizer_in_backward_leaves_the_policy_after_a_fault_of_the_critic(ranks, folder):
    for _, changed, _ in ranks.run(meet_faults_in_steps, folder, {"tp": 2}, True):
        assert "policy" not in changed["critic loss"] + changed["critic gradient"]


def run_with_broken_iterations(line: list[str], hit: set[int]) -> int:
    """Run the command; in iterations `hit`, from 0, the critic's loss is NaN on rank 1."""
    from glm_rlhf.engine.rl.roles import PPORoles

    original, count = PPORoles.update, iter(range(100))

    def update(self, experience, **options):
        with hurt_loss("ppo_value_loss", next(count) in hit and self.topology.rank == 1):
            return original(self, experience, **options)

    PPORoles.update = update
    try:
        return main(line)
    finally:
        PPORoles.update = original


@pytest.fixture(scope="module")
def line(folder, tmp_path_factory) -> list[str]:
    data = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt_tokens": [3 + n, 4]}) + "\n" for n in range(8)))
    options = {
        "model.path": folder,
        "data.path": data,
        "reward.function": "reward_rules:share_of_low_ids",
        "ppo.reference_baseline": "false",
        "parallel.tp": 2,
        "train.steps": 4,
        "train.global_batch_size": 4,
        "train.dtype": "fp32",
        "train.sample_every": 0,
        "train.max_nonfinite_steps": 2,
        "generation.max_new_tokens": 4,
        "observe.tensorboard": "false",
    }
    return ["ppo", *(f"{key}={value}" for key, value in options.items())]


@pytest.mark.parametrize("hit, codes, skipped", [({0, 2}, [0], [1, 0, 1, 0]), ({1, 2}, [2], [0, 1])])
def test_iterations_are_skipped_until_too_many_in_a_row(ranks, line, tmp_path, hit, codes, skipped):
    answers = ranks.run(run_with_broken_iterations, [*line, f"run.output={tmp_path}"], hit)
    assert answers == codes * 4
    metrics = [json.loads(text) for text in (tmp_path / "metrics.jsonl").open()]
    assert [one["actor/is_step_skipped"] for one in metrics] == skipped
    assert bool(list(tmp_path.glob("hf/step_*"))) == (codes == [0])
