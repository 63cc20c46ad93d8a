"""Evaluation while PPO runs: held-out prompts, the reference to compare with, and the best policy kept."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_rlhf.engine.build.models import answer_seed
from glm_rlhf.engine.build.prompts import read_prompt_inputs
from glm_rlhf.engine.data.records.reading import ReadReport
from glm_rlhf.engine.evaluation.measure import EvaluationSettings, as_metrics, measure, score_rollouts
from glm_rlhf.engine.evaluation.scored_answers import ScoredAnswer
from glm_rlhf.engine.rl.engine import PPOEngine
from glm_rlhf.engine.rollout.generate import answer_prompts
from glm_rlhf.engine.runs.exports import BEST, RunExports
from glm_rlhf.engine.runs.fingerprint import content_identity
from glm_rlhf.engine.types import PromptInput
from glm_rlhf.parallel.inference.resharded_weights import ReshardedWeights
from glm_rlhf.parallel.model.glm import GLMModel
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.storage.durable_io import replace_text

REWARD = "eval/reward"


class PPOEvaluation:
    """Owns the held-out prompts, what the reference answered to them, and the highest reward so far.

    The highest reward is in the run's progress, and in the mark of `hf/best` once a policy was kept. After a
    kill the two may differ, because `hf/best` is newer than the checkpoint: then the higher one counts, since
    that policy is there. Where the folder was removed, the next evaluated policy is kept.
    """

    def __init__(
        self, engine: PPOEngine, exports: RunExports, progress: Mapping[str, Any] | None = None
    ) -> None:
        """Read the prompts; every rank calls this.

        Args:
            engine: whose policy is evaluated.
            exports: of the run.
            progress: what `progress` returned before the run was resumed, if it was.

        Raises:
            ValueError: a bad file, fewer prompts than data-parallel ranks, or an `hf/best` that is not this
                run's.
        """
        self._engine, self._exports, config = engine, exports, engine.config
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
        self._measured_by = content_identity([prompts_identity(self._prompts), evaluate.num_samples])
        self._best_file = Path(config.run.output) / "hf" / f"{BEST}.json"
        progress = progress or {}
        self._last_step: int | None = progress.get("step")
        self._best = self._remembered(progress.get("best"))

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
            self._last_step = step
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
        if self._best is None or metrics[REWARD] > self._best[REWARD]:
            self._best = {"step": step, REWARD: metrics[REWARD], "measured_by": self._measured_by}
            if self._engine.config.evaluate.keeps_best and step > 0:
                self._exports.write(BEST, **self._best)
                self._write_best(self._best)
        self._last_step = step
        return metrics

    def has_evaluated(self, step: int) -> bool:
        """Return whether the policy after `step` iterations was evaluated, before the run was resumed too."""
        return self._last_step is not None and self._last_step >= step

    def progress(self) -> dict[str, Any]:
        """Return what a resumed run has to know, JSON values: the last evaluated step, and the best one."""
        return {"step": self._last_step, "best": self._best}

    def _remembered(self, of_progress: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Return the step with the highest reward so far, and that reward; None where nothing is to beat."""
        keeps_best = self._engine.config.evaluate.keeps_best
        kept = self._exports.values_of(BEST) if keeps_best else None
        if keeps_best and kept is None:
            with raise_on_all_ranks(f"looking for {BEST}"):
                if self._engine.topology.is_main_rank:
                    self._exports.check_free(BEST)
        candidates = [dict(one) for one in (of_progress, kept) if one is not None]
        known = [one for one in candidates if one.get("measured_by") == self._measured_by]
        if len(known) < len(candidates):
            log(
                "evaluate.path or evaluate.num_samples changed: earlier rewards are not comparable, and the "
                "best policy is sought anew",
                self._engine.topology,
            )
        best = max(known, key=lambda one: one[REWARD], default=None)
        if keeps_best and best is not None and best["step"] > 0:
            # Without its folder the policy is gone: the folder was removed, or the run kept none for a while.
            best = kept if kept in known else None
            if best is not None:
                self._write_best(best)  # a kill may have come between the folder and this file
        return best

    def _write_best(self, best: Mapping[str, Any]) -> None:
        """Write which step `hf/best` is of; every rank calls this."""
        with raise_on_all_ranks(f"writing {self._best_file}"):
            if self._engine.topology.is_main_rank:
                text = json.dumps({name: best[name] for name in ("step", REWARD)})
                replace_text(self._best_file, f"{text}\n")

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


def prompts_identity(prompts: Sequence[PromptInput]) -> str:
    """Return a fingerprint of prompts with all that a reward function gets of them, in order."""
    return content_identity([prompt.tokens, prompt.extra] for prompt in prompts)
