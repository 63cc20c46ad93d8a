"""The loop of on-policy RL: iterations of generate, score, estimate and update on the same ranks."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glm_rlhf.engine.config.rl import PPOConfig
from glm_rlhf.engine.data.sampler import BatchSampler
from glm_rlhf.engine.evaluation.scored_answers import gather_answers, write_answers
from glm_rlhf.engine.observe.best_effort import without_failing
from glm_rlhf.engine.observe.mfu import known_peak_flop_per_s, training_flop
from glm_rlhf.engine.observe.phases import Phases
from glm_rlhf.engine.observe.progress import ProgressLine
from glm_rlhf.engine.observe.report import SAMPLES_AFTER, SAMPLES_FOLDER
from glm_rlhf.engine.observe.trace import Trace
from glm_rlhf.engine.rl.engine import PPOEngine
from glm_rlhf.engine.rl.evaluation import PPOEvaluation
from glm_rlhf.engine.rl.partial_update import tensors_of
from glm_rlhf.engine.runs.checkpoints import (
    IS_INSIDE,
    UNREPORTED,
    RunCheckpoints,
)
from glm_rlhf.engine.runs.context import RunContext
from glm_rlhf.engine.training.lr_schedule import cosine_lr
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.preemption import (
    Preempted,
    defer_preemption,
    preemption_requested,
)
from glm_rlhf.parallel.runtime.spans import span
from glm_rlhf.parallel.runtime.topology import Topology

EVALUATION = "evaluation"
"""Entry of a run's progress with what was evaluated."""
_NUM_SAMPLES = 16  # answers in a file of them


def run_iterations(
    engine: PPOEngine, run: RunContext, prompts: Sequence[PromptInput], sampler: BatchSampler
) -> None:
    """Run the iterations that are left: each generates, scores, learns, evaluates, reports and saves.

    Raises:
        Preempted: a rank was asked to leave, and the run was saved; on every rank.
        ValueError: too many iterations in a row were not finite.
    """
    config, topology, first = engine.config, engine.topology, run.first_step
    before = (run.progress or {}).get(EVALUATION)
    evaluation = PPOEvaluation(engine, run.checkpoints.exports, before) if config.evaluate.every else None
    # A run that was left inside its first iteration has trained already.
    is_new = first == 0 and engine.roles.partial_update is None
    num_skipped = 0

    def progress_after(step: int) -> dict[str, Any]:
        evaluated = before if evaluation is None else evaluation.progress()
        return {"step": step, EVALUATION: evaluated} | engine.roles.progress()

    def evaluate_and_write(step: int, metrics: dict[str, float]) -> None:
        try:
            written = metrics if evaluation is None else metrics | evaluation.run(step)
        except Preempted:  # the resumed run evaluates the same weights, and writes the metrics of both
            _save_and_exit(engine, run.checkpoints, progress_after(step) | {UNREPORTED: metrics})
            raise
        run.write(step, written)

    if run.unreported is not None:
        evaluate_and_write(first, run.unreported)
        run.checkpoints.after_step(
            first, progress_after(first), rank_tensors=engine.roles.rewards.baseline_tensors()
        )
    elif evaluation is not None and is_new and not evaluation.has_evaluated(0):
        evaluate_and_write(0, {})
    completed = progress_after(first)
    with ProgressLine(steps=config.train.steps, is_shown=topology.is_main_rank, first_step=first) as progress:
        for step in range(first, config.train.steps):
            batch = [prompts[number] for number in sampler.batch(step)]
            try:
                metrics = _iterate(engine, batch, step, run.trace)
            except FloatingPointError as error:  # the same on every rank
                num_skipped += 1
                _skip_iteration(step, num_skipped, error, config, topology)
                metrics = {"actor/is_step_skipped": 1.0}
            except Preempted:
                _save_and_exit(engine, run.checkpoints, completed)
                raise
            else:
                num_skipped = 0
            if evaluation is not None and evaluation.is_due(step + 1):
                evaluate_and_write(step + 1, metrics)
            else:
                run.write(step + 1, metrics)
            completed = progress_after(step + 1)
            with span("save"):
                run.checkpoints.after_step(
                    step + 1, completed, rank_tensors=engine.roles.rewards.baseline_tensors()
                )
            if "perf/tokens_per_s" in metrics:  # a whole iteration
                progress.show(step + 1, metrics)
            if step + 1 < config.train.steps and preemption_requested((None, topology.device)):
                _save_and_exit(engine, run.checkpoints, completed)
                raise Preempted
    with defer_preemption():
        try:
            _write_last_samples(engine, [prompts[number] for number in sampler.batch(0)])
        except FloatingPointError as error:  # the same on every rank
            log(f"no sample answers of the trained policy were written: {error}", topology)


def _save_and_exit(engine: PPOEngine, checkpoints: RunCheckpoints, completed: Mapping[str, Any]) -> None:
    """Save the run as it was after the last whole iteration, or inside one between two epochs."""
    roles, step = engine.roles, completed["step"]
    rank_tensors = roles.rewards.baseline_tensors()
    if roles.partial_update is None:
        checkpoints.save_and_exit(step, completed, rank_tensors=rank_tensors)
        return
    progress = {**completed, IS_INSIDE: True} | roles.progress()
    rank_tensors |= tensors_of(roles.partial_update)
    checkpoints.save_and_exit(step + 1, progress, rank_tensors=rank_tensors, is_inside=True)


def _skip_iteration(
    step: int, num_in_a_row: int, error: FloatingPointError, config: PPOConfig, topology: Topology
) -> None:
    """Log that an iteration was skipped.

    Raises:
        ValueError: it was one too many.
    """
    limit = config.train.max_nonfinite_steps
    if num_in_a_row >= limit:
        raise ValueError(
            f"stopped after {num_in_a_row} skipped iterations in a row, train.max_nonfinite_steps is "
            f"{limit}: iteration {step + 1}: {error}; lower optimizer.lr and critic.lr, look at these "
            "answers, or start from weights that are finite"
        ) from error
    log(f"iteration {step + 1} was skipped ({num_in_a_row} of {limit} in a row): {error}", topology)


def _iterate(
    engine: PPOEngine, prompts: Sequence[PromptInput], step: int, trace: Trace | None
) -> dict[str, float]:
    """Run one iteration, or the rest of one, and return its metrics with the time of each phase.

    Raises:
        Preempted: a rank was asked to leave; inside an update between two of its epochs.
    """
    config, topology = engine.config, engine.topology
    engine.set_lr(
        cosine_lr(
            step,
            steps=config.train.steps,
            lr=config.optimizer.lr,
            min_lr=config.optimizer.min_lr,
            warmup_steps=config.optimizer.warmup_steps,
        )
    )
    if trace is not None:
        trace.take_wait_s()  # of what came between two iterations
    phases = Phases()
    is_leaving = partial(preemption_requested, (None, topology.device))
    partial_update = engine.roles.partial_update
    with phases.phase("iteration"):
        if partial_update is None:
            with phases.phase("generate"):
                rollouts = engine.generate(prompts)
            with phases.phase("experience"):
                experience = engine.make_experience(rollouts)
                if is_leaving():
                    raise Preempted
            with phases.phase("update"):
                metrics = engine.roles.update(experience, is_leaving=is_leaving)
        else:
            experience = partial_update.experience
            with phases.phase("update"):
                metrics = engine.roles.finish_update(is_leaving=is_leaving)
    elapsed_s, num_answers = phases.seconds["timing_s/iteration"], experience.rollouts.num_global
    metrics |= phases.seconds
    metrics["actor/is_step_skipped"] = 0.0
    if partial_update is None:  # else the time is that of a part of the iteration
        metrics |= _speed(metrics, num_answers, elapsed_s, topology)
        metrics |= _mfu(engine, metrics, num_answers)
    if trace is not None and topology.device.type == "cpu":  # on CUDA the host does not see waits
        metrics |= _idle(trace.take_wait_s() / elapsed_s, topology)
    is_last = step + 1 == config.train.steps
    if config.train.sample_every and (step % config.train.sample_every == 0 or is_last):
        path = Path(config.run.output) / SAMPLES_FOLDER / f"step_{step + 1}.jsonl"
        _write_samples(engine, path, experience.rollouts, experience.rewards_B)
    return metrics


def _speed(
    metrics: Mapping[str, float], num_answers: int, elapsed_s: float, topology: Topology
) -> dict[str, float]:
    num_answer_tokens = metrics["response_length/mean"] * num_answers
    num_tokens = num_answer_tokens + metrics["prompt_length/mean"] * num_answers
    return {
        "perf/tokens_per_s": num_tokens / elapsed_s,
        "perf/tokens_per_s_per_gpu": num_tokens / elapsed_s / topology.world_size,
        "perf/response_tokens_per_s_per_gpu": num_answer_tokens / elapsed_s / topology.world_size,
    }


def _mfu(engine: PPOEngine, metrics: Mapping[str, float], num_sequences: int) -> dict[str, float]:
    """Return what policy and critic used of the peak, where it is known and the work is that of answers.

    Nothing where an update stopped early or carried demonstrations: its tokens are not these.
    """
    config, topology = engine.config, engine.topology
    if topology.device.type != "cuda" or config.train.dtype != "bf16" or config.ppo.sft_coef:
        return {}
    peak = known_peak_flop_per_s(torch.cuda.get_device_name(topology.device))
    if peak is None or metrics["actor/stopped_early"]:
        return {}
    answer = metrics["response_length/mean"]
    mean_tokens = metrics["prompt_length/mean"] + answer
    found = {}
    for role, name, targets in (("policy", "actor", num_sequences * answer), ("critic", "critic", 0.0)):
        seconds = metrics.get(f"timing_s/{role}")
        if seconds is not None:
            flop = training_flop(
                engine.roles.models[role][0].glm,
                num_sequences=num_sequences,
                mean_tokens=mean_tokens,
                num_targets=targets,
            )
            flop *= config.ppo.epochs
            found[f"perf/mfu/{name}"] = flop / (seconds * topology.world_size * peak)
    return found


def _idle(share: float, topology: Topology) -> dict[str, float]:
    """Return the mean over ranks, and the largest, of the share of an iteration in which a rank waits."""
    shares = torch.tensor([share, share], dtype=torch.float64, device=topology.device)
    dist.all_reduce(shares[:1])
    dist.all_reduce(shares[1:], op=dist.ReduceOp.MAX)
    total, largest = shares.tolist()
    return {"perf/idle_fraction": total / topology.world_size, "perf/idle_fraction_max": largest}


def _write_last_samples(engine: PPOEngine, first_prompts: Sequence[PromptInput]) -> None:
    """Answer the first iteration's sample prompts once more, for the report."""
    config, topology = engine.config, engine.topology
    folder = Path(config.run.output)
    if config.train.sample_every:
        num_prompts = max(math.ceil(_NUM_SAMPLES / config.generation.num_samples), topology.dp)
        rollouts = engine.generate(first_prompts[:num_prompts])
        engine.roles.offload.before_scoring()
        rewards = engine.roles.rewards(rollouts)
        rollouts = dataclasses.replace(rollouts, excluded=rewards.excluded)
        path = folder / SAMPLES_FOLDER / SAMPLES_AFTER
        _write_samples(engine, path, rollouts, rewards.totals_B(rollouts.starts))


def _write_samples(engine: PPOEngine, path: Path, rollouts: Rollouts, rewards_B: torch.Tensor) -> None:
    topology = engine.topology
    answers = gather_answers(rollouts, rewards_B, engine.tokenizer, topology, first=_NUM_SAMPLES)
    if topology.is_main_rank:
        with without_failing(path):
            write_answers(path, answers)
