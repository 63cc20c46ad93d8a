"""The four roles of PPO on this rank, and the steps of an iteration."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.observe.phases import Phases
from glm_rlhf.engine.rewards.combined import RewardTerms
from glm_rlhf.engine.rewards.function import RewardFunction
from glm_rlhf.engine.rl.algorithms.ppo import (
    CriticStep,
    PolicyStep,
    critic_learner,
    mini_batches,
    policy_learner,
)
from glm_rlhf.engine.rl.experience import make_experience
from glm_rlhf.engine.rl.offload import RoleOffload
from glm_rlhf.engine.rl.optimizer_step import take_steps
from glm_rlhf.engine.rl.partial_update import PartialUpdate
from glm_rlhf.engine.rl.ppo_settings import PPOSettings
from glm_rlhf.engine.rl.sft_term import DemonstrationStream
from glm_rlhf.engine.rollout.generate import AnswerSettings, answer_prompts
from glm_rlhf.engine.rollout.scheduling.requests import Completion
from glm_rlhf.engine.scoring.overlapped_scores import OverlappedRoles, OverlappedScorer
from glm_rlhf.engine.types import Experience, PromptInput, Rollouts
from glm_rlhf.parallel.inference.resharded_weights import ReshardedWeights
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState, training_state
from glm_rlhf.parallel.optim.training_state import AdamSettings
from glm_rlhf.parallel.runtime.preemption import Preempted
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.weights.export import export_model


class PPORoles:
    """Owns the four roles on this rank, and the state that PPO carries from one iteration to the next.

    An iteration is `generate`, `make_experience`, `update`. Every rank of the topology calls each of them
    with the same arguments, its own rollouts and experience apart. Nothing is written or reloaded between
    them. No weight moves either where the policy generates in the layout that it trains in: it does so on the
    tensors that its optimizer changes.
    """

    def __init__(
        self,
        *,
        topology: Topology,
        policy: Sequence[GLMModel],
        critic: Sequence[GLMModel],
        reference: Sequence[GLMModel],
        settings: PPOSettings,
        answers: AnswerSettings,
        policy_adam: AdamSettings,
        critic_adam: AdamSettings,
        in_backward: bool = False,
        seed: int,
        answer_seed: int | None = None,
        tokenizer: Tokenizer | None = None,
        reward_model: Sequence[GLMModel] | None = None,
        reward_function: RewardFunction | None = None,
        reward_function_weight: float = 1.0,
        skip_reward_failures: bool = False,
        reward_concurrency: int = 1,
        uses_reference_baseline: bool = False,
        demonstrations: DemonstrationStream | None = None,
        resharded: ReshardedWeights | None = None,
        offloads: Collection[str] = (),
    ) -> None:
        """Take the models, their weights in place, and make the optimizers.

        Args:
            topology: layout and groups of all roles.
            policy, critic, reference, reward_model: this rank's chunks.
            settings: of PPO.
            answers: how prompts are answered.
            policy_adam, critic_adam: of the optimizers.
            in_backward: whether they change weights during backward.
            seed: of mini-batches.
            answer_seed: of answers; None for `seed`.
            tokenizer: gives a reward function its texts.
            reward_function: judges answers, beside or in place of the reward model.
            reward_function_weight: factor of its rewards.
            masks_reward_faults: whether an answer that it has no reward for is left out, not an error.
            reward_concurrency: most calls of it at once, while answers are generated; 0 calls it afterwards.
            uses_reference_baseline: whether each reward has that of the reference's answer subtracted.
            demonstrations: what the policy's steps imitate beside learning from rewards; None for nothing.
            resharded: the policy in the layout that it generates in; None where that is `topology`'s.
            parks: what waits in host memory when it is not needed: "optimizers", "reference", "reward".

        Raises:
            ValueError: no reward; or "optimizers" with `in_backward`.
        """
        self.topology, self.settings, self.answers, self.seed = topology, settings, answers, seed
        self.policy, self.reference, self.critic = list(policy), list(reference), list(critic)
        options = {"topology": topology, "in_backward": in_backward}
        self.policy_state = training_state(self.policy, policy_adam, **options)
        self.critic_state = training_state(self.critic, critic_adam, **options)
        self.offload = RoleOffload(
            offloads,
            trained=self.trained.values(),
            reference=self.reference,
            reward_model=reward_model,
            topology=topology,
        )
        self.demonstrations = demonstrations
        self.resharded = resharded
        self.kl_coef = settings.kl_coef
        self.iteration = 0
        self._num_answered = 0
        self.partial_update: PartialUpdate | None = None
        # Rollouts whose answers were judged as they ended, and what models said of some of them by then.
        self._newest: tuple[Rollouts, OverlappedRoles | None] | None = None
        self.answer_seed = seed if answer_seed is None else answer_seed
        # Not a method of this object: a circle of references would keep the models until a collector comes.
        answer_by_reference = partial(
            answer_prompts,
            self.reference,
            settings=replace(answers, num_samples=1),
            seed=self.answer_seed,
            topology=topology,
            is_share=True,
        )
        self.rewards = RewardTerms(
            topology=topology,
            micro_batch_tokens=settings.micro_batch_tokens,
            tokenizer=tokenizer,
            model=reward_model,
            function=reward_function,
            function_weight=reward_function_weight,
            skip_failures=skip_reward_failures,
            concurrency=reward_concurrency,
            answer_by_reference=answer_by_reference if uses_reference_baseline else None,
        )

    def generate(self, prompts: Sequence[PromptInput]) -> Rollouts:
        """Return this data-parallel rank's share of the answers to `prompts`, the same list on every rank.

        A reward function judges answers as they end, in the background, and models score some in turns in
        which a pipeline stage would be idle; `make_experience` of what this returns takes both.
        """
        self._num_answered += 1
        self.offload.before_generation()
        judge, scorer = self.rewards.judge, self._overlapped_scorer()
        if judge is not None:
            judge.discard()

        def on_ended(index: int, prompt: PromptInput, done: Completion) -> None:
            if judge is not None:
                judge.ask_ahead(index, prompt, done)
            if scorer is not None:
                scorer.add(index, prompt, done)

        rollouts = answer_prompts(
            self.policy,
            prompts,
            self.answers,
            seed=(self.answer_seed << 20) + self._num_answered,
            topology=self.topology,
            resharded=self.resharded,
            on_ended=on_ended,
            when_idle=scorer and scorer.work,
        )
        self._newest = (rollouts, scorer and scorer.tell(rollouts))
        return rollouts

    def make_experience(self, rollouts: Rollouts) -> Experience:
        """Return rollouts with rewards, logprobs, values and advantages.

        Raises:
            RewardError, FloatingPointError: a reward failed, or a number is none; on every rank.
        """
        self.offload.before_scoring()
        newest, self._newest = self._newest, None
        is_newest = newest is not None and rollouts is newest[0]
        overlapped = newest[1] if is_newest else None
        experience = make_experience(
            rollouts,
            policy=self.policy,
            reference=self.reference,
            critic=self.critic,
            rewarder=partial(
                self.rewards, uses_overlapped=is_newest, overlapped=overlapped and overlapped.reward
            ),
            settings=self.settings,
            kl_coef=self.kl_coef,
            sample_seed=(self.seed << 20) + self.iteration,
            topology=self.topology,
            overlapped=overlapped,
        )
        self.offload.before_update()
        return experience

    def update(
        self, experience: Experience, *, is_leaving: Callable[[], bool] | None = None
    ) -> dict[str, float]:
        """Learn from an iteration's experience; return its metrics, those of time this rank's own.

        Args:
            experience: of this rank's share.
            is_leaving: asked between two epochs, the same on all ranks: whether the update is left there.

        Raises:
            FloatingPointError: a loss or gradient was not finite: the steps from there on were not taken, or
                with `in_backward` perhaps a part of one; on every rank.
            Preempted: the update was left; `partial_update` is what `finish_update` goes on with.
        """
        return self._learn(PartialUpdate(experience=experience), is_leaving)

    def finish_update(self, *, is_leaving: Callable[[], bool] | None = None) -> dict[str, float]:
        """Go on with the update that was left, as `update` does."""
        partial_update, self.partial_update = self.partial_update, None
        self.offload.before_update()
        return self._learn(partial_update, is_leaving)

    def _learn(self, work: PartialUpdate, is_leaving: Callable[[], bool] | None) -> dict[str, float]:
        phases = Phases()
        experience, policies, critics = work.experience, work.policy_steps, work.critic_steps
        is_stopped, first = False, work.epoch
        trains_policy = self.iteration >= self.settings.critic_warmup_iterations
        for epoch in range(first, self.settings.epochs):
            if epoch > first and is_leaving is not None and is_leaving():
                work.epoch, self.partial_update = epoch, work
                raise Preempted
            seed = (self.seed << 20) + self.iteration * 1000 + epoch
            for part in mini_batches(experience, self.settings, seed=seed, topology=self.topology):
                given = (experience, part, self.settings)
                learners = [critic_learner(self.critic_state, *given, topology=self.topology)]
                if trains_policy:
                    sft = self.demonstrations and self.demonstrations.take(self.topology)
                    learners.append(
                        policy_learner(self.policy_state, *given, topology=self.topology, sft=sft)
                    )
                critic_step, *policy_steps = take_steps(
                    learners, experience.rollouts, topology=self.topology, phases=phases
                )
                critics.append(_of_critic(critic_step))
                if not trains_policy:
                    continue
                policies.append(_of_policy(*policy_steps))
                limit = self.settings.max_kl
                is_stopped = limit is not None and policies[-1]["actor/ppo_kl"] > limit
                if is_stopped:
                    break
            if is_stopped:
                break
        self.iteration += 1
        metrics = dict(experience.metrics) | _critic_metrics(critics) | _policy_metrics(policies)
        metrics["actor/kl_coef"] = self.kl_coef
        metrics["actor/stopped_early"] = float(is_stopped)
        self._steer_kl(experience)
        return metrics | phases.seconds

    @property
    def trained(self) -> dict[str, AnyTrainingState]:
        """What is trained, by name."""
        return {"policy": self.policy_state, "critic": self.critic_state}

    def progress(self) -> dict[str, float | int]:
        """Return what the next iteration depends on, beside models, optimizers and baselines."""
        return {
            "iteration": self.iteration,
            "num_answered": self._num_answered,
            "kl_coef": self.kl_coef,
            "num_demonstration_steps": self.demonstrations.num_steps if self.demonstrations else 0,
        }

    def set_progress(self, progress: Mapping[str, float | int]) -> None:
        """Go on from what `progress` returned."""
        self.iteration, self._num_answered = progress["iteration"], progress["num_answered"]
        self.kl_coef = progress["kl_coef"]
        if self.demonstrations:
            self.demonstrations.num_steps = progress["num_demonstration_steps"]

    def export_hf(self, path: str | Path, *, source: str | Path | None = None) -> None:
        """Write the policy as a Hugging Face folder; `source` gives tokenizer and other files."""
        export_model(self.policy, path, topology=self.topology, source=source)

    def _overlapped_scorer(self) -> OverlappedScorer | None:
        """Return what scores answers in idle turns; None where there are none, or ranks share answers."""
        layout = self.topology.layout
        if not self.settings.overlap_scoring or layout.pp == 1 or layout.cp > 1 or self.resharded is not None:
            return None
        return OverlappedScorer(
            reference=None if "reference" in self.offload.offloads else self.reference,
            critic=self.critic,
            reward_model=None if "reward" in self.offload.offloads else self.rewards.model,
            temperature=self.answers.sampling.temperature,
            topology=self.topology,
        )

    def _steer_kl(self, experience: Experience) -> None:
        """Move the KL coefficient towards its target, at most by a fifth of the way of one horizon."""
        target = self.settings.kl_target
        if target is None:
            return
        error = experience.metrics["objective/kl_per_token"] / target - 1.0
        share = experience.rollouts.num_global / self.settings.kl_horizon
        self.kl_coef *= 1.0 + min(max(error, -0.2), 0.2) * share


def _of_policy(step: PolicyStep) -> dict[str, float]:
    """Return the metrics of one step."""
    statistics = step.statistics
    metrics = {
        "actor/pg_loss": float(statistics.policy_loss),
        "actor/ppo_kl": float(statistics.approximate_kl),
        "actor/pg_clipfrac": float(statistics.clip_fraction),
        "actor/entropy": float(statistics.entropy),
        "actor/ratio_max": float(statistics.ratio_max),
        "actor/ratio_min": float(statistics.ratio_min),
        "actor/grad_norm": float(step.result.grad_norm),
    }
    if step.sft_loss is not None:
        metrics["actor/sft_loss"] = float(step.sft_loss)
    return metrics


def _of_critic(step: CriticStep) -> dict[str, float]:
    statistics = step.statistics
    return {
        "critic/vf_loss": float(statistics.value_loss),
        "critic/vf_clipfrac": float(statistics.clip_fraction),
        "critic/vf_explained_var": float(statistics.explained_variance),
        "critic/grad_norm": float(step.result.grad_norm),
    }


def _policy_metrics(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return means over the steps; extremes are over all."""
    if not steps:
        return {}
    metrics = {name: fmean(step[name] for step in steps) for name in steps[0]}
    metrics["actor/first_ppo_kl"] = steps[0]["actor/ppo_kl"]
    metrics["actor/ratio_max"] = max(step["actor/ratio_max"] for step in steps)
    metrics["actor/ratio_min"] = min(step["actor/ratio_min"] for step in steps)
    return metrics


def _critic_metrics(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return means over the steps; the explained variance is the last one's."""
    metrics = {name: fmean(step[name] for step in steps) for name in steps[0]}
    metrics["critic/vf_explained_var"] = steps[-1]["critic/vf_explained_var"]
    return metrics
