"""The command `ppo`: iterations of generate, score, estimate and update on the same ranks."""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from glm_rlhf.engine.config_ppo import PPOConfig
from glm_rlhf.engine.data.chat_tokenizer import Tokenizer
from glm_rlhf.engine.data.jsonl import ReadReport
from glm_rlhf.engine.data.record_ids import prompt_ids
from glm_rlhf.engine.data.records import PromptRecord, read_prompts
from glm_rlhf.engine.data.sampler import BatchSampler
from glm_rlhf.engine.observe.metrics import open_metrics
from glm_rlhf.engine.observe.progress import ProgressLine
from glm_rlhf.engine.observe.report import SAMPLES_AFTER, SAMPLES_FOLDER, tell_report
from glm_rlhf.engine.stages.ppo import PPOEngine
from glm_rlhf.engine.stages.ppo_samples import NUM_SHOWN, write_samples
from glm_rlhf.engine.stages.schedule_lr import cosine_lr
from glm_rlhf.engine.stages.training_run import claim_folder
from glm_rlhf.engine.types import PromptInput
from glm_rlhf.parallel.agreement import agreed
from glm_rlhf.parallel.glm_config import GLMConfig


def run(config: PPOConfig) -> None:
    """Train a policy by PPO; every rank of the launch calls it.

    The run folder gets metrics, sample answers, a report, and the policy as Hugging Face folders.

    Raises:
        ValueError: anything that the user has to mend.
    """
    with PPOEngine(config) as engine:
        place = engine.topology
        claim_folder(config, place)
        report = ReadReport()
        with agreed("reading the prompts"):
            prompts = _read(config, engine.tokenizer, engine.model_config, report)
            sampler = BatchSampler(len(prompts), config.train.global_batch_size, seed=config.run.seed)
        if report.num_skipped and place.is_reporter:
            sys.stderr.write(f"{report.num_skipped} bad prompts skipped, {len(prompts)} left\n")
        with contextlib.ExitStack() as stack:
            with agreed(f"writing to {config.run.output}"):
                write = stack.enter_context(
                    open_metrics(
                        config.run.output,
                        is_owner=place.is_reporter,
                        uses_tensorboard=config.observe.tensorboard,
                        wandb_project=config.observe.wandb,
                        run_name=config.run.name,
                        config=dataclasses.asdict(config),
                    )
                )
            progress = stack.enter_context(ProgressLine(steps=config.train.steps, is_shown=place.is_reporter))
            for step in range(config.train.steps):
                batch = [prompts[number] for number in sampler.batch(step)]
                metrics = _iterate(engine, batch, step)
                write(step + 1, metrics)
                progress.show(step + 1, metrics)
        _close(engine, [prompts[number] for number in sampler.batch(0)])


def _iterate(engine: PPOEngine, prompts: Sequence[PromptInput], step: int) -> dict[str, float]:
    """Run one iteration and return its metrics with the time of each phase."""
    config, place, start = engine.config, engine.topology, time.monotonic()
    engine.set_lr(
        cosine_lr(
            step,
            steps=config.train.steps,
            lr=config.optimizer.lr,
            min_lr=config.optimizer.min_lr,
            warmup_steps=config.optimizer.warmup_steps,
        )
    )
    rollouts = engine.generate(prompts)
    generated = time.monotonic()
    experience = engine.make_experience(rollouts)
    scored = time.monotonic()
    metrics = engine.update(experience)
    end = time.monotonic()
    num_answer_tokens = metrics["response_length/mean"] * rollouts.num_everywhere
    num_tokens = num_answer_tokens + metrics["prompt_length/mean"] * rollouts.num_everywhere
    metrics |= {
        "timing_s/generate": generated - start,
        "timing_s/experience": scored - generated,
        "timing_s/iteration": end - start,
        "perf/tokens_per_s": num_tokens / (end - start),
        "perf/tokens_per_s_per_gpu": num_tokens / (end - start) / place.world_size,
        "perf/response_tokens_per_s_per_gpu": num_answer_tokens / (end - start) / place.world_size,
    }
    is_last = step + 1 == config.train.steps
    if config.train.sample_every and (step % config.train.sample_every == 0 or is_last):
        path = Path(config.run.output) / SAMPLES_FOLDER / f"step_{step + 1}.jsonl"
        write_samples(path, rollouts, experience.rewards_B, engine.tokenizer, place)
    if is_last or (config.train.save_every and (step + 1) % config.train.save_every == 0):
        folder = Path(config.run.output) / "checkpoints" / f"step_{step + 1}"
        engine.export_hf(folder)
    return metrics


def _close(engine: PPOEngine, first_prompts: Sequence[PromptInput]) -> None:
    """Answer the first iteration's sample prompts once more, and write the report."""
    config, place = engine.config, engine.topology
    folder = Path(config.run.output)
    if config.train.sample_every:
        num_prompts = max(math.ceil(NUM_SHOWN / config.generation.num_samples), place.dp)
        rollouts = engine.generate(first_prompts[:num_prompts])
        write_samples(
            folder / SAMPLES_FOLDER / SAMPLES_AFTER,
            rollouts,
            engine.roles.rewards(rollouts),
            engine.tokenizer,
            place,
        )
    if place.is_reporter:
        tell_report(folder, title=config.run.name)


def _read(
    config: PPOConfig, tokenizer: Tokenizer | None, glm: GLMConfig, report: ReadReport
) -> list[PromptInput]:
    data = config.data
    then = partial(
        _prompt_input,
        tokenizer=tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        max_positions=glm.max_positions,
    )
    return list(
        read_prompts(data.path, vocab_size=glm.vocab_size, on_error=data.on_error, report=report, then=then)
    )


def _prompt_input(
    record: PromptRecord, *, tokenizer: Tokenizer | None, max_prompt_tokens: int, max_positions: int
) -> PromptInput:
    ids = prompt_ids(record.prompt, record.place, tokenizer)
    longest = min(max_prompt_tokens, max_positions - 1)
    if len(ids) > longest:
        raise record.place.error(
            f"the prompt has {len(ids)} tokens, at most {longest} are allowed: data.max_prompt_tokens is "
            f"{max_prompt_tokens}, the model's context {max_positions}"
        )
    return PromptInput(tokens=tuple(ids), extra=record.extra)
