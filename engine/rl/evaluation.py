"""Evaluation while PPO runs: held-out prompts, the reference to compare with, and the best policy kept."""

import json
import shutil
import time
from pathlib import Path

from glm_rlhf.engine.build.models import answer_seed
from glm_rlhf.engine.build.prompts import read_prompt_inputs
from glm_rlhf.engine.data.records.reading import ReadReport
from glm_rlhf.engine.evaluation.measure import EvaluationSettings, as_metrics, measure, score_rollouts
from glm_rlhf.engine.evaluation.scored_answers import ScoredAnswer
from glm_rlhf.engine.rl.engine import PPOEngine
from glm_rlhf.engine.rollout.generate import answer_prompts
from glm_rlhf.parallel.inference.resharded_weights import ReshardedWeights
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.storage.durable_io import replace_text

BEST = "best"


class PPOEvaluation:
    """Owns the held-out prompts, what the reference answered to them, and the highest reward so far."""

    def __init__(self, engine: PPOEngine) -> None:
        """Read the prompts; every rank calls this.

        Raises:
            ValueError: a bad file, or fewer prompts than data-parallel ranks.
        """
        self._engine, config = engine, engine.config
        evaluate = config.evaluate
        assert evaluate.path is not None, "evaluate.every comes with evaluate.path"
        self._settings = EvaluationSettings(
            num_samples=evaluate.num_samples, pass_k=evaluate.pass_k, pass_reward=evaluate.pass_reward
        )
        with raise_on_all_ranks("reading the prompts of evaluate.path"):
            self._prompts = read_prompt_inputs(
                evaluate.path,
                engine.tokenizer,
                engine.model_config,
                max_prompt_tokens=config.data.max_prompt_tokens,
                on_error=config.data.on_error,
                report=ReadReport(),
            )
        self._against: list[ScoredAnswer] | None = None
        self._num_skipped = 0
        self._best_file = Path(config.run.output) / "hf" / f"{BEST}.json"
        self._best_reward: float | None = None

    def is_due(self, step: int) -> bool:
        """Return whether the policy is to be evaluated after so many iterations."""
        return step % self._engine.config.evaluate.every == 0 or step == self._engine.config.train.steps

    def run(self, step: int) -> dict[str, float]:
        """Return the figures of the policy after `step` iterations, and keep it if it is the best.

        The win rate is that against the reference, which answers at the first call. Every rank calls this;
        the random numbers of answers are the same each time, and none of training's. Where logits or rewards
        are NaN or Inf the evaluation is skipped: that is logged, and `eval/is_skipped` is the only figure.

        Raises:
            ValueError: a reward failed, or the best policy could not be written.
        """
        try:
            return self._measured(step)
        except FloatingPointError as error:  # the same on every rank
            self._num_skipped += 1
            log(
                f"the evaluation after iteration {step} was skipped ({self._num_skipped} so far): {error}",
                self._engine.topology,
            )
            return {"eval/is_skipped": 1.0}

    def _measured(self, step: int) -> dict[str, float]:
        start = time.monotonic()
        if self._against is None:
            self._against = self._answers(self._engine.roles.models["reference"], None, model="the reference")
        answers = self._answers(self._engine.roles.models["policy"], self._engine.roles.resharded)
        metrics = as_metrics(measure(answers, self._settings, against=self._against))
        metrics["timing_s/evaluate"] = time.monotonic() - start
        reward = metrics["eval/reward"]
        is_best = self._best_reward is None or reward > self._best_reward
        if is_best:
            self._best_reward = reward
            if self._engine.config.evaluate.keeps_best and step > 0:
                self._keep(step, reward)
        return metrics

    def _answers(
        self, chunks: list[GLMModel], resharded: ReshardedWeights | None, *, model: str = "the policy"
    ) -> list[ScoredAnswer]:
        engine = self._engine
        engine.roles.offload.before_scoring()
        rollouts = answer_prompts(
            chunks,
            self._prompts,
            engine.roles.answers.with_samples(self._settings.num_samples),
            seed=answer_seed(engine.config),
            topology=engine.topology,
            resharded=resharded,
            model=model,
        )
        return score_rollouts(
            rollouts, engine.roles.rewards.without_baseline, engine.tokenizer, engine.topology
        )

    def _keep(self, step: int, reward: float) -> None:
        """Put the policy in the place of the one that was best before."""
        best = self._best_file.with_suffix("")
        new, old = best.with_name(f"{BEST}.new"), best.with_name(f"{BEST}.old")
        topology = self._engine.topology
        with raise_on_all_ranks(f"making room for {new}"):
            if topology.is_main_rank:
                best.parent.mkdir(parents=True, exist_ok=True)
                for left in (new, old):  # by a run that was killed in between
                    if left.exists():
                        shutil.rmtree(left)
        self._engine.export_hf(new)
        with raise_on_all_ranks(f"keeping {best}"):
            if topology.is_main_rank:
                if best.exists():
                    best.rename(old)
                new.rename(best)
                replace_text(self._best_file, json.dumps({"step": step, "eval/reward": reward}) + "\n")
                if old.exists():
                    shutil.rmtree(old)
