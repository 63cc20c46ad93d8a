"""PPO's roles on a tiny folder, with prompts to answer."""

from collections.abc import Callable
from pathlib import Path

import torch
from reward_rules import share_of_low_ids

from glm_rlhf.engine.rl.ppo_settings import PPOSettings
from glm_rlhf.engine.rl.roles import PPORoles
from glm_rlhf.engine.rollout.generate import AnswerSettings
from glm_rlhf.engine.rollout.generation_phase import BatchSettings
from glm_rlhf.engine.types import PromptInput
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.weights.load import load_model


def prompts() -> list[PromptInput]:
    """Eight prompts of random ids."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (3, 9, 1, 5, 14, 2, 7, 4)]
    return [PromptInput(tokens=tuple(one), extra={}) for one in ids]


def make_roles(folder: Path, topology, function: Callable = share_of_low_ids, **changes) -> PPORoles:
    """Roles that all start from `folder`; `settings` and `temperature` apart, changes go to `PPORoles`."""
    options = {"dtype": torch.float32, "seed": 7}
    settings = {"epochs": 2, "minibatches": 2, "micro_batch_tokens": 80, "kl_target": 0.1, "kl_horizon": 100}
    settings |= changes.pop("settings", {})
    roles = {
        "policy": load_model(folder, topology, **options)[0],
        "reference": load_model(folder, topology, role="reference", **options)[0],
        "critic": load_model(folder, topology, role="critic", **options)[0],
    }
    defaults = {"policy_adam": AdamSettings(lr=1e-3), "critic_adam": AdamSettings(lr=1e-3)}
    return PPORoles(
        topology=topology,
        settings=PPOSettings(**settings),
        answers=AnswerSettings(
            sampling=SamplingSettings(temperature=changes.pop("temperature", 1.0)),
            batch=BatchSettings(max_batch=8, max_step_tokens=64, page_size=4),
            max_new_tokens=12,
            stop_ids=frozenset({2}),
            num_samples=2,
        ),
        seed=3,
        reward_function=function,
        **roles,
        **(defaults | changes),
    )
