"""PPO as a larger stack drives it: one object, from a config, inside any torch.distributed world."""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from glm_rlhf.engine.build.models import (
    DTYPES,
    answer_seed,
    find_tokenizer,
    layout_of,
    load_other,
    stop_ids_of,
)
from glm_rlhf.engine.build.records import open_demonstrations
from glm_rlhf.engine.config.evaluate import EvaluateConfig
from glm_rlhf.engine.config.reward import PPORewardSection
from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.config.training import DemonstrationsSection
from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.rewards.function import RewardFunction
from glm_rlhf.engine.rewards.http import HttpReward
from glm_rlhf.engine.rewards.weighted_sum import find_reward
from glm_rlhf.engine.rl.checkpoint import load_run, save_run
from glm_rlhf.engine.rl.ppo_settings import PPOSettings
from glm_rlhf.engine.rl.roles import PPORoles
from glm_rlhf.engine.rl.sft_term import DemonstrationStream
from glm_rlhf.engine.rollout.generate import AnswerSettings
from glm_rlhf.engine.rollout.generation_layout import generation_layout
from glm_rlhf.engine.rollout.generation_phase import BatchSettings
from glm_rlhf.engine.rollout.stop_strings import stop_check
from glm_rlhf.engine.training.run import adam_of
from glm_rlhf.engine.types import Experience, PromptInput, Rollouts
from glm_rlhf.parallel.inference.sampler import SamplingSettings
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.topology import Topology, open_topology
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.weights.load import load_model


class PPOEngine:
    """Owns a topology, the four roles in it, and what PPO carries between iterations.

        engine = PPOEngine(PPOConfig.from_yaml("ppo.yaml"))
        rollouts = engine.generate(prompts)
        experience = engine.make_experience(rollouts)
        metrics = engine.update(experience)

    Every rank of the world makes one and calls the same methods in the same order. A world that exists
    already is used and left alone. A context manager; or call `close`.
    """

    def __init__(self, config: PPOConfig) -> None:
        """Enter the layout and load the models.

        Demonstrations (`data.sft_path`) are tokenised into the run folder, `<run.output>/tokens`.

        Raises:
            ValueError: a folder, a tokenizer, a layout, a reward function or demonstrations that the user has
                to mend.
        """
        self.config = config
        axes = config.parallel
        with contextlib.ExitStack() as stack:
            self.topology: Topology = stack.enter_context(
                open_topology(layout_of(axes), timeout_s=axes.timeout_s, seed=config.run.seed)
            )
            self.roles, self.tokenizer = _build(config, self.topology, stack)
            self._stack = stack.pop_all()

    @property
    def model_config(self) -> GLMConfig:
        """Shape of the policy."""
        return self.roles.policy[0].glm

    def generate(self, prompts: Sequence[str | Sequence[int] | PromptInput]) -> Rollouts:
        """Return this data-parallel rank's share of the answers to `prompts`, the same list on every rank.

        Args:
            prompts: a text is one user's turn, ids are used as they are; `PromptInput` carries fields for
                the reward function too.

        Raises:
            ValueError: a text without a tokenizer, or a prompt that leaves no room for an answer.
        """
        return self.roles.generate([self._as_input(prompt) for prompt in prompts])

    def make_experience(self, rollouts: Rollouts) -> Experience:
        """Return rollouts with rewards, logprobs, values and advantages.

        Raises:
            RewardError, FloatingPointError: a reward failed, or a number is none; on every rank.
        """
        return self.roles.make_experience(rollouts)

    def update(self, experience: Experience) -> dict[str, float]:
        """Learn from an iteration's experience; return its metrics, those of time this rank's own.

        Raises:
            FloatingPointError: a gradient was not finite, so that no step was taken; on every rank.
        """
        return self.roles.update(experience)

    def set_lr(self, lr: float) -> None:
        """Use learning rate `lr` for the policy from the next update on."""
        self.roles.policy_state.set_lr(lr)

    def export_hf(self, path: str | Path) -> None:
        """Write the policy as a Hugging Face folder, with the tokenizer of the one it was loaded from."""
        self.roles.export_hf(path, source=self.config.model.path)

    def save(
        self, folder: str | Path, *, progress: Mapping[str, Any] | None = None, keep_last: int = 0
    ) -> Path:
        """Write all that the run is as a checkpoint `<folder>/step_N`, N the updates behind it; return that.

        Models, optimizers, random generators, KL coefficient, scores of reference answers. It is on the disk,
        whole, when this returns; a kill at any moment leaves the earlier ones as they are.

        Args:
            folder: of the checkpoints, made where it is missing; all ranks see it.
            progress: what the caller's loop goes on from, such as its place in the data, JSON values.
            keep_last: newest checkpoints that stay; 0 for all.

        Raises:
            ValueError: it cannot be written; on every rank.
        """
        return save_run(
            self.roles,
            self.config,
            Path(folder),
            topology=self.topology,
            progress=progress,
            keep_last=keep_last,
        )

    def load(self, path: str | Path) -> dict[str, Any]:
        """Bring the engine to a checkpoint of `save`, in whatever layout that was; return its `progress`.

        In the same layout the next iteration has the bits of the run that went on; in another one the
        weights and optimizers have.

        Args:
            path: a checkpoint, or a folder of them: the newest whole one.

        Raises:
            ValueError: there is none, it is damaged, or of other settings or models; on every rank.
        """
        return load_run(self.roles, self.config, Path(path), topology=self.topology)

    def close(self) -> None:
        """Leave the layout; the engine is of no use afterwards."""
        self._stack.close()

    def __enter__(self) -> "PPOEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.__exit__(*exception)

    def _as_input(self, prompt: str | Sequence[int] | PromptInput) -> PromptInput:
        if isinstance(prompt, PromptInput):
            return prompt
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("a prompt is a text, but the model has no tokenizer: give token ids")
            turns = [Message(role="user", content=prompt)]
            prompt = self.tokenizer.render(turns, add_generation_prompt=True)
        return PromptInput(tokens=tuple(prompt), extra={})


def _build(
    config: PPOConfig, topology: Topology, stack: contextlib.ExitStack
) -> tuple[PPORoles, Tokenizer | None]:
    """Return the roles with their models loaded, and the tokenizer; `stack` ends what the roles hold."""
    loading = {"dtype": DTYPES[config.train.dtype], "seed": config.run.seed}
    trained = {"recompute_layers": config.train.recompute_layers}
    with raise_on_all_ranks("finding the reward function"):
        function = reward_function_of(config.reward)
    policy, _ = load_model(config.model.path, topology, **loading, **trained)
    glm, given = policy[0].glm, config.generation
    resharded = stack.enter_context(
        generation_layout(policy, topology, tp=given.tp, pp=given.pp, timeout_s=config.parallel.timeout_s)
    )
    with raise_on_all_ranks("reading the tokenizer"):
        tokenizer = find_tokenizer(config, glm)
    load = partial(load_other, topology=topology, beside=glm, **loading)
    paths = {
        "critic.path": config.critic.path,
        "reward.path": config.reward.path,
        "model.path": config.model.path,
    }
    critic_key = next(key for key, path in paths.items() if path is not None)
    critic, created = load(critic_key, paths[critic_key], role="critic", **trained)
    reference, _ = load("reference.path", config.reference.path or config.model.path, role="reference")
    reward_model = None
    if config.reward.path is not None:
        reward_model, _ = load("reward.path", config.reward.path, role="reward")
    if created and topology.is_main_rank:
        sys.stderr.write(f"{paths[critic_key]} has no scalar head: the critic starts with a new one\n")
    roles = PPORoles(
        topology=topology,
        policy=policy,
        critic=critic,
        reference=reference,
        reward_model=reward_model,
        reward_function=function,
        reward_function_weight=config.reward.function_weight,
        skip_reward_failures=config.reward.on_error == "mask",
        reward_concurrency=config.reward.concurrency,
        uses_reference_baseline=config.ppo.reference_baseline,
        settings=_settings(config),
        answers=answer_settings_of(config, tokenizer, glm, topology),
        policy_adam=adam_of(config.optimizer),
        critic_adam=dataclasses.replace(adam_of(config.optimizer), lr=config.critic.lr),
        in_backward=config.optimizer.in_backward,
        seed=config.run.seed,
        answer_seed=answer_seed(config),
        tokenizer=tokenizer,
        demonstrations=_demonstrations(config, tokenizer, glm, topology),
        resharded=resharded,
        offloads=config.train.offload,
    )
    return roles, tokenizer


def _demonstrations(
    config: PPOConfig, tokenizer: Tokenizer | None, glm: GLMConfig, topology: Topology
) -> DemonstrationStream | None:
    """Return what the policy imitates, tokenised into the run folder; None when the config names nothing."""
    data = config.data
    if data.sft_path is None:
        return None
    section = DemonstrationsSection(
        path=data.sft_path, max_prompt_tokens=data.max_prompt_tokens, on_error=data.on_error
    )
    records, _ = open_demonstrations(section, config.run.output, tokenizer, glm, topology=topology)
    return DemonstrationStream(
        records,
        batch_size=config.sft_batch_size,
        coef=config.ppo.sft_coef,
        micro_batch_tokens=config.train.micro_batch_tokens,
        seed=config.run.seed,
    )


def reward_function_of(reward: PPORewardSection) -> RewardFunction | None:
    """Return the function that the config names, or None.

    Raises:
        RewardError: it cannot be found.
    """
    over_http = partial(_over_http, reward=reward)
    return None if reward.function is None else find_reward(reward.function, over_http=over_http)


def _over_http(url: str, *, reward: PPORewardSection) -> RewardFunction:
    return HttpReward(
        url=url, timeout_s=reward.timeout_s, retries=reward.retries, batch_size=reward.batch_size
    )


def _settings(config: PPOConfig) -> PPOSettings:
    ppo = config.ppo
    return PPOSettings(
        epochs=ppo.epochs,
        minibatches=ppo.minibatches,
        clip=ppo.clip,
        value_clip=ppo.value_clip,
        gamma=ppo.gamma,
        lam=ppo.lam,
        kl_coef=ppo.kl_coef,
        kl_target=ppo.kl_target,
        kl_horizon=ppo.kl_horizon,
        kl_estimator=ppo.kl_estimator,
        entropy_coef=ppo.entropy_coef,
        whitens_advantages=ppo.whiten,
        max_kl=ppo.max_kl,
        critic_warmup_iterations=config.critic.warmup_iterations,
        max_logprob_gap=ppo.max_logprob_gap,
        overlap_scoring=ppo.overlap_scoring,
        micro_batch_tokens=config.train.micro_batch_tokens,
    )


def answer_settings_of(
    config: PPOConfig | EvaluateConfig, tokenizer: Tokenizer | None, glm: GLMConfig, topology: Topology
) -> AnswerSettings:
    """Return how a config wants prompts answered."""
    given = config.generation
    masked_V = None if tokenizer is None else tokenizer.unsampleable_ids(glm.vocab_size).to(topology.device)
    return AnswerSettings(
        sampling=SamplingSettings(
            temperature=given.temperature, top_k=given.top_k, top_p=given.top_p, masked_ids_V=masked_V
        ),
        batch=BatchSettings(
            max_batch=given.max_batch,
            max_step_tokens=given.max_step_tokens,
            page_size=given.page_size,
            cache_bytes=given.cache_bytes,
        ),
        max_new_tokens=given.max_new_tokens,
        stop_ids=stop_ids_of(config, tokenizer, glm),
        num_samples=given.num_samples,
        stop_check=stop_check(given.stop, tokenizer),
    )
