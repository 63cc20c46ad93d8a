"""The roles of RL on this rank, and the steps of an iteration: generate, make experience, update."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from glm_rlhf.engine.observe.phases import Phases
from glm_rlhf.engine.rewards.combined import CombinedReward
from glm_rlhf.engine.rl.algorithm import Algorithm
from glm_rlhf.engine.rl.experience import make_experience
from glm_rlhf.engine.rl.mini_batches import MiniBatch, learners, mini_batches
from glm_rlhf.engine.rl.offload import RoleOffload
from glm_rlhf.engine.rl.partial_update import PartialUpdate
from glm_rlhf.engine.rl.sft_term import DemonstrationStream
from glm_rlhf.engine.rollout.generate import AnswerSettings, answer_prompts
from glm_rlhf.engine.rollout.scheduling.requests import Completion
from glm_rlhf.engine.scoring.overlapped_scores import OverlappedScorer, OverlappedScores
from glm_rlhf.engine.training.step import take_step
from glm_rlhf.engine.types import Experience, PromptInput, Rollouts
from glm_rlhf.parallel.inference.resharded_weights import ReshardedWeights
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.optim.in_backward import AnyTrainingState
from glm_rlhf.parallel.runtime.preemption import Preempted
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.weights.export import export_model

_CONSEQUENCE = "no step was taken, or with optimizer.in_backward a part of one"


def answer_by_reference(
    reference: Sequence[GLMModel], answers: AnswerSettings, *, seed: int, topology: Topology
) -> Callable[[Sequence[PromptInput]], Rollouts]:
    """Return what answers this rank's prompts with the reference, once each, for a reward baseline."""
    return partial(
        answer_prompts,
        reference,
        settings=answers.with_samples(1),
        seed=seed,
        topology=topology,
        is_share=True,
        model="the reference",
    )


class PPORoles:
    """Owns the roles on this rank, and the state that RL carries from one iteration to the next.

    An iteration is `generate`, `make_experience`, `update`. Every rank of the topology calls each of them
    with the same arguments, its own rollouts and experience apart. Nothing is written or reloaded between
    them. No weight moves either where the policy generates in the layout that it trains in: it does so on the
    tensors that its optimizer changes.
    """

    def __init__(
        self,
        *,
        topology: Topology,
        models: Mapping[str, Sequence[GLMModel]],
        states: Mapping[str, AnyTrainingState],
        rewards: CombinedReward,
        algorithm: Algorithm,
        answers: AnswerSettings,
        micro_batch_tokens: int,
        seed: int,
        answer_seed: int | None = None,
        critic_warmup_iterations: int = 0,
        demonstrations: DemonstrationStream | None = None,
        resharded: ReshardedWeights | None = None,
        offloads: Collection[str] = (),
    ) -> None:
        """Take the roles, their weights in place.

        Args:
            topology: layout and groups of all roles.
            models: this rank's chunks by role: policy, what the algorithm needs, and reward where a model
                gives rewards.
            states: the roles in training.
            rewards: what gives rewards.
            algorithm: which learns.
            answers: how prompts are answered.
            micro_batch_tokens: most tokens of a micro-batch.
            seed: of mini-batches.
            answer_seed: of answers; None for `seed`.
            critic_warmup_iterations: first iterations in which only the critic learns.
            demonstrations: of which the policy's steps carry the next-token loss; None for none.
            resharded: the policy in the layout that it generates in; None where that is `topology`'s.
            offloads: what waits in host memory when it is not needed: "optimizers", "reference", "reward".

        Raises:
            ValueError: "optimizers" are to be offloaded with an optimizer in backward.
        """
        self.topology, self.algorithm, self.answers, self.seed = topology, algorithm, answers, seed
        self.models = {role: list(chunks) for role, chunks in models.items()}
        self.states = dict(states)
        self.offload = RoleOffload(offloads, models=self.models, states=self.states, topology=topology)
        self.micro_batch_tokens = micro_batch_tokens
        self.critic_warmup_iterations = critic_warmup_iterations
        self.demonstrations = demonstrations
        self.resharded = resharded
        self.rewards = rewards
        self.iteration = 0
        self._num_answered = 0
        self.partial_update: PartialUpdate | None = None
        # Rollouts whose answers were scored as they ended, and the scores of some of them.
        self._newest: tuple[Rollouts, Mapping[str, OverlappedScores]] | None = None
        self.answer_seed = seed if answer_seed is None else answer_seed

    def generate(self, prompts: Sequence[PromptInput]) -> Rollouts:
        """Return this data-parallel rank's share of the answers to `prompts`, the same list on every rank.

        A reward function scores answers as they end, in the background, and models score some while a
        pipeline stage would be idle; `make_experience` of what this returns takes both.
        """
        self._num_answered += 1
        self.offload.before_generation()
        dispatcher, scorer = self.rewards.dispatcher, self._overlapped_scorer()
        if dispatcher is not None:
            dispatcher.discard()

        def on_ended(index: int, prompt: PromptInput, done: Completion) -> None:
            if dispatcher is not None:
                dispatcher.submit(index, prompt, done)
            if scorer is not None:
                scorer.add(index, prompt, done)

        rollouts = answer_prompts(
            self.models["policy"],
            prompts,
            self.answers,
            seed=(self.answer_seed << 20) + self._num_answered,
            topology=self.topology,
            resharded=self.resharded,
            on_ended=on_ended,
            when_idle=None if scorer is None else scorer.work,
        )
        self._newest = (rollouts, {} if scorer is None else scorer.collect(rollouts))
        return rollouts

    def make_experience(self, rollouts: Rollouts) -> Experience:
        """Return rollouts with rewards, logprobs, values and advantages.

        Raises:
            RewardError, FloatingPointError: a reward failed, or a number is not finite; on every rank.
        """
        self.offload.before_scoring()
        newest, self._newest = self._newest, None
        is_newest = newest is not None and rollouts is newest[0]
        overlapped = newest[1] if newest is not None and is_newest else {}
        experience = make_experience(
            rollouts,
            models=self.models,
            rewarder=partial(self.rewards, uses_overlapped=is_newest, overlapped=overlapped.get("reward")),
            algorithm=self.algorithm,
            micro_batch_tokens=self.micro_batch_tokens,
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
                with an optimizer in backward perhaps a part of one; on every rank.
            Preempted: the update was left; `partial_update` is what `finish_update` resumes.
        """
        return self._learn(PartialUpdate(experience=experience), is_leaving)

    def finish_update(self, *, is_leaving: Callable[[], bool] | None = None) -> dict[str, float]:
        """Resume the update that was left, as `update` does."""
        work, self.partial_update = self.partial_update, None
        assert work is not None, "no update was left"
        self.offload.before_update()
        return self._learn(work, is_leaving)

    def _learn(self, work: PartialUpdate, is_leaving: Callable[[], bool] | None) -> dict[str, float]:
        phases = Phases()
        algorithm, experience, first = self.algorithm, work.experience, work.epoch
        trained = [role for role in algorithm.needs().trains if role != "policy" or self._trains_policy]
        is_stopped = False
        for epoch in range(first, algorithm.section.epochs):
            if epoch > first and is_leaving is not None and is_leaving():
                work.epoch, self.partial_update = epoch, work
                raise Preempted
            for part in mini_batches(
                experience,
                algorithm,
                micro_batch_tokens=self.micro_batch_tokens,
                seed=(self.seed << 20) + self.iteration * 1000 + epoch,
                topology=self.topology,
            ):
                is_stopped = self._take_step(work, part, trained, phases)
                if is_stopped:
                    break
            if is_stopped:
                break
        self.iteration += 1
        metrics = dict(experience.metrics)
        for role in algorithm.needs().trains:
            metrics |= algorithm.means(role, work.steps.get(role, []))
        metrics |= algorithm.after_iteration(experience)
        metrics["actor/stopped_early"] = float(is_stopped)
        return metrics | phases.seconds

    def _take_step(
        self, work: PartialUpdate, part: MiniBatch, trained: Sequence[str], phases: Phases
    ) -> bool:
        """Take one optimizer step; return whether the policy has moved so far that the update ends."""
        demonstrations = None
        if "policy" in trained and self.demonstrations is not None:
            demonstrations = self.demonstrations.take(self.topology)
        roles = learners(
            self.states, work.experience, part, self.algorithm, roles=trained, demonstrations=demonstrations
        )
        result = take_step(list(roles.values()), topology=self.topology, phases=phases, dtype=torch.float32)
        if not result.is_applied:
            raise FloatingPointError(f"{result.fault}; {_CONSEQUENCE}")
        for role, step in zip(roles, result.roles, strict=True):
            work.steps.setdefault(role, []).append(self.algorithm.step_metrics(role, step))
        limit = self.algorithm.section.max_kl
        return limit is not None and "policy" in roles and work.steps["policy"][-1]["actor/ppo_kl"] > limit

    @property
    def _trains_policy(self) -> bool:
        return self.iteration >= self.critic_warmup_iterations

    def progress(self) -> dict[str, float | int]:
        """Return what the next iteration depends on, beside models, optimizers and baselines."""
        return {
            "iteration": self.iteration,
            "num_answered": self._num_answered,
            "num_demonstration_steps": self.demonstrations.num_steps if self.demonstrations else 0,
            **self.algorithm.state(),
        }

    def set_progress(self, progress: Mapping[str, float | int]) -> None:
        """Resume from what `progress` returned."""
        self.iteration, self._num_answered = int(progress["iteration"]), int(progress["num_answered"])
        self.algorithm.set_state(progress)
        if self.demonstrations:
            self.demonstrations.num_steps = int(progress["num_demonstration_steps"])

    def export_hf(self, path: str | Path, *, source: str | Path | None = None) -> None:
        """Write the policy as a Hugging Face folder; `source` gives tokenizer and other files."""
        export_model(self.models["policy"], path, topology=self.topology, source=source)

    def _overlapped_scorer(self) -> OverlappedScorer | None:
        """Return what scores answers on idle stages; None where none is idle, or ranks share answers."""
        layout = self.topology.layout
        has_idle_slots = layout.pp > 1 and layout.cp == 1 and self.resharded is None
        if not self.algorithm.section.overlap_scoring or not has_idle_slots:
            return None
        scored = [role for role in ("reference", "critic", "reward") if role in self.models]
        return OverlappedScorer(
            {role: self.models[role] for role in scored if role not in self.offload.offloads},
            temperature=self.answers.sampling.temperature,
            topology=self.topology,
        )
