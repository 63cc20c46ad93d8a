"""PPO as a larger stack drives it: one object, from a config, inside any torch.distributed world."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from glm_rlhf.engine.build.answers import answer_settings_of
from glm_rlhf.engine.build.models import DTYPES, answer_seed, load_main_model, load_other
from glm_rlhf.engine.build.records import open_demonstrations
from glm_rlhf.engine.build.world import open_world
from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.config.training import DemonstrationsSection
from glm_rlhf.engine.data.messages import Message
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.rewards.combined import CombinedReward
from glm_rlhf.engine.rewards.configured import open_reward_function
from glm_rlhf.engine.rl.algorithms.ppo import PPO
from glm_rlhf.engine.rl.checkpoint import load_run, save_run
from glm_rlhf.engine.rl.roles import PPORoles, answer_by_reference
from glm_rlhf.engine.rl.sft_term import DemonstrationStream
from glm_rlhf.engine.rollout.generation_layout import generation_layout
from glm_rlhf.engine.training.run import adam_of
from glm_rlhf.engine.types import Experience, PromptInput, Rollouts
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.optim.in_backward import training_state
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.model_config import GLMConfig


class PPOEngine:
    """Owns a topology, the four roles in it, and what PPO carries between iterations.

        engine = PPOEngine(PPOConfig.from_yaml("ppo.yaml"))
        rollouts = engine.generate(prompts)
        experience = engine.make_experience(rollouts)
        metrics = engine.update(experience)

    Every rank of the world makes one and calls the same methods in the same order. A world that exists
    already is used and left alone. A context manager; or call `close`.
    """

    def __init__(
        self,
        config: PPOConfig,
        *,
        before_models: Callable[[Topology], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        """Enter the layout and load the models.

        Demonstrations (`data.sft_path`) are tokenised into the run folder, `<run.output>/tokens`.

        Args:
            config: of the run.
            before_models: makes a context manager that the engine enters before it loads the models, and
                leaves when it is closed; what that returns is `entered`.

        Raises:
            ValueError: a folder, a tokenizer, a layout, a reward function or demonstrations that the user has
                to fix.
        """
        self.config = config
        with contextlib.ExitStack() as stack:
            self.topology: Topology = stack.enter_context(open_world(config))
            self.entered: Any = None
            if before_models is not None:
                self.entered = stack.enter_context(before_models(self.topology))
            self.roles, self.tokenizer = _build(config, self.topology, stack)
            self._stack = stack.pop_all()

    @property
    def model_config(self) -> GLMConfig:
        """Shape of the policy."""
        return self.roles.models["policy"][0].glm

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
        self.roles.states["policy"].set_lr(lr)

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
            progress: what the caller's loop resumes from, such as its place in the data, JSON values.
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

        In the same layout the next iteration has the bits of the run that continued; in another one the
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

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
    function = stack.enter_context(
        open_reward_function(config.reward, topology=topology, seed=config.run.seed)
    )
    policy, _, tokenizer = load_main_model(config, topology, recompute_layers=config.train.recompute_layers)
    glm, generation = policy[0].glm, config.generation
    resharded = stack.enter_context(
        generation_layout(
            policy, topology, tp=generation.tp, pp=generation.pp, timeout_s=config.parallel.timeout_s
        )
    )
    models = {"policy": policy, **_other_models(config, glm, tokenizer, topology)}
    adam = adam_of(config.optimizer)
    adams = {"policy": adam, "critic": dataclasses.replace(adam, lr=config.critic.lr)}
    states = {
        role: training_state(
            models[role], adams[role], topology=topology, in_backward=config.optimizer.in_backward
        )
        for role in adams
    }
    answers = answer_settings_of(config, tokenizer, glm, topology)
    baseline = None
    if config.ppo.reference_baseline:
        baseline = answer_by_reference(
            models["reference"], answers, seed=answer_seed(config), topology=topology
        )
    roles = PPORoles(
        topology=topology,
        models=models,
        states=states,
        rewards=CombinedReward(
            topology=topology,
            micro_batch_tokens=config.train.micro_batch_tokens,
            tokenizer=tokenizer,
            model=models.get("reward"),
            function=function,
            function_weight=config.reward.function_weight,
            skip_failures=config.reward.on_error == "mask",
            concurrency=config.reward.concurrency,
            function_timeout_s=config.reward.function_timeout_s,
            answer_by_reference=baseline,
        ),
        algorithm=PPO(config.ppo),
        answers=answers,
        micro_batch_tokens=config.train.micro_batch_tokens,
        critic_warmup_iterations=config.critic.warmup_iterations,
        seed=config.run.seed,
        answer_seed=answer_seed(config),
        demonstrations=_demonstrations(config, tokenizer, glm, topology),
        resharded=resharded,
        offloads=config.train.offload,
    )
    return roles, tokenizer


def _other_models(
    config: PPOConfig, glm: GLMConfig, tokenizer: Tokenizer | None, topology: Topology
) -> dict[str, list[GLMModel]]:
    """Return critic, reference and, where there is one, reward model, this rank's chunks of each."""
    load = partial(
        load_other,
        topology=topology,
        beside=glm,
        tokenizer=tokenizer,
        tokenizer_path=config.tokenizer_path,
        dtype=DTYPES[config.train.dtype],
        seed=config.run.seed,
    )
    paths = {
        "critic.path": config.critic.path,
        "reward.path": config.reward.path,
        "model.path": config.model.path,
    }
    key, path = next((key, path) for key, path in paths.items() if path is not None)
    critic, created = load(key, path, role="critic", recompute_layers=config.train.recompute_layers)
    reference, _ = load("reference.path", config.reference.path or config.model.path, role="reference")
    models = {"critic": critic, "reference": reference}
    if config.reward.path is not None:
        models["reward"], _ = load("reward.path", config.reward.path, role="reward")
    if created:
        log(f"{path} has no scalar head: the critic starts with a new one", topology)
    return models


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
