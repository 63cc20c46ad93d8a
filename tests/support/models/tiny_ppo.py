"""PPO's roles on a tiny folder, with prompts to answer."""

from collections.abc import Callable
from pathlib import Path

import torch
from reward_rules import share_of_low_ids

from glm_rlhf.engine.config.rl import PPOSection
from glm_rlhf.engine.config.sections import GenerationSection
from glm_rlhf.engine.rewards.combined import CombinedReward
from glm_rlhf.engine.rl.algorithms.ppo import PPO
from glm_rlhf.engine.rl.roles import PPORoles, answer_by_reference
from glm_rlhf.engine.rollout.generate import AnswerSettings
from glm_rlhf.engine.types import PromptInput
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.optim.in_backward import training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.weights.load import load_model

SETTINGS = {"epochs": 2, "minibatches": 2, "kl_target": 0.1, "kl_horizon": 100, "reference_baseline": False}
OF_REWARDS = {
    "reward_function_weight": "function_weight",
    "skip_reward_failures": "skip_failures",
    "reward_concurrency": "concurrency",
    "tokenizer": "tokenizer",
}


def prompts() -> list[PromptInput]:
    """Eight prompts of random ids."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (3, 9, 1, 5, 14, 2, 7, 4)]
    return [PromptInput(tokens=tuple(one), extra={}) for one in ids]


def make_roles(
    folder: Path,
    topology,
    function: Callable | None = share_of_low_ids,
    settings: dict | None = None,
    **changes,
) -> PPORoles:
    """Roles that all start from `folder`; `settings` are of the algorithm, other changes of roles and
    rewards."""
    options = {"dtype": torch.float32, "seed": 7}
    settings = SETTINGS | (settings or {})
    tokens = settings.pop("micro_batch_tokens", 80)
    changes["critic_warmup_iterations"] = settings.pop("critic_warmup_iterations", 0)
    models = {
        "policy": load_model(folder, topology, **options)[0],
        "reference": load_model(folder, topology, role="reference", **options)[0],
        "critic": load_model(folder, topology, role="critic", **options)[0],
    }
    if reward_model := changes.pop("reward_model", None):
        models["reward"] = reward_model
    in_backward = changes.pop("in_backward", False)
    adams = {role: changes.pop(f"{role}_adam", AdamSettings(lr=1e-3)) for role in ("policy", "critic")}
    states = {
        role: training_state(models[role], adam, topology=topology, in_backward=in_backward)
        for role, adam in adams.items()
    }
    answers = AnswerSettings(
        sampling=SamplingSettings(temperature=changes.pop("temperature", 1.0)),
        generation=GenerationSection(
            max_batch=8, max_step_tokens=64, page_size=4, max_new_tokens=12, num_samples=2
        ),
        stop_ids=frozenset({2}),
    )
    seed = changes.pop("seed", 3)
    baseline = None
    if changes.pop("uses_reference_baseline", False):
        baseline = answer_by_reference(models["reference"], answers, seed=seed, topology=topology)
    return PPORoles(
        topology=topology,
        models=models,
        states=states,
        rewards=CombinedReward(
            topology=topology,
            micro_batch_tokens=tokens,
            model=models.get("reward"),
            function=function,
            answer_by_reference=baseline,
            **{own: changes.pop(name) for name, own in OF_REWARDS.items() if name in changes},
        ),
        algorithm=PPO(PPOSection(**settings)),
        answers=answers,
        micro_batch_tokens=tokens,
        seed=seed,
        **changes,
    )
