"""The command `evaluate`: figures of a policy on a file of prompts, with confidence intervals."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from glm_rlhf.engine.build.answers import answer_settings_of
from glm_rlhf.engine.build.models import (
    DTYPES,
    answer_seed,
    load_main_model,
    load_other,
)
from glm_rlhf.engine.build.prompts import read_prompt_inputs
from glm_rlhf.engine.build.world import open_world
from glm_rlhf.engine.config.evaluate import EvaluateConfig
from glm_rlhf.engine.data.records.reading import ReadReport
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.evaluation.measure import EvaluationSettings, Measured, measure, score_rollouts
from glm_rlhf.engine.evaluation.scored_answers import write_answers
from glm_rlhf.engine.rewards.combined import CombinedReward
from glm_rlhf.engine.rewards.configured import open_reward_function
from glm_rlhf.engine.rollout.generate import answer_prompts
from glm_rlhf.engine.rollout.generation_layout import generation_layout
from glm_rlhf.engine.runs.run_folder import claim_outputs, record_config
from glm_rlhf.engine.types import PromptInput, Rollouts
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.log import log
from glm_rlhf.parallel.runtime.topology import Topology
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.storage.durable_io import replace_text

FILE_NAME = "evaluate.json"


def run(config: EvaluateConfig) -> None:
    """Evaluate a policy, alone or against another model; every rank of the launch calls it.

    Written are `<run.output>/evaluate.json`, and one line an answer to `data.out`; a table is printed. One
    model is in memory at a time: the policy answers, then the other model, then the reward model judges.

    Raises:
        ValueError: anything that the user has to fix.
    """
    with (
        open_world(config) as topology,
        claim_outputs(config, topology, Path(config.run.output) / FILE_NAME),
        open_reward_function(config.reward, topology=topology, seed=config.run.seed) as function,
    ):
        policy, _, tokenizer = load_main_model(config, topology)
        glm, report = policy[0].glm, ReadReport()
        with raise_on_all_ranks("reading the prompts"):
            prompts = read_prompt_inputs(
                config.data.path,
                tokenizer,
                glm,
                max_prompt_tokens=config.data.max_prompt_tokens,
                on_error=config.data.on_error,
                report=report,
            )
        record_config(config, topology)
        rollouts = [_answer(config, policy, prompts, tokenizer, topology)]
        del policy
        if config.against.path is not None:
            rollouts.append(_answer_of_other(config, glm, prompts, tokenizer, topology))
        rewarder = _rewarder(config, function, tokenizer, glm, topology)
        answers = [score_rollouts(one, rewarder.without_baseline, tokenizer, topology) for one in rollouts]
        settings = EvaluationSettings(
            num_samples=config.generation.num_samples,
            pass_k=config.evaluate.pass_k,
            pass_reward=config.evaluate.pass_reward,
        )
        found = measure(answers[0], settings, against=answers[1] if len(answers) > 1 else None)
        with raise_on_all_ranks(f"writing {FILE_NAME}"):
            if topology.is_main_rank:
                write_answers(config.out_path, answers[0])
                path = _write(config, found, len(prompts), report)
                sys.stdout.write(table(found))
                log(f"written to {path} and {config.out_path}")


def table(measured: Sequence[Measured]) -> str:
    """Return one line a figure: name, mean, interval, prompts, and how the interval was made."""
    lines = [f"{'figure':<16} {'mean':>10}   {'95 % interval':<23} {'prompts':>7}  interval"]
    for one in measured:
        estimate = one.estimate
        ends = f"[{estimate.low:.4f}, {estimate.high:.4f}]"
        lines.append(
            f"{one.name:<16} {estimate.mean:>10.4f}   {ends:<23} {estimate.num_units:>7}  {one.interval}"
        )
    return "\n".join(lines) + "\n"


def _answer(
    config: EvaluateConfig,
    chunks: list,
    prompts: Sequence[PromptInput],
    tokenizer: Tokenizer | None,
    topology: Topology,
    *,
    model: str = "the policy",
) -> Rollouts:
    settings = answer_settings_of(config, tokenizer, chunks[0].glm, topology)
    generation, timeout_s = config.generation, config.parallel.timeout_s
    with generation_layout(
        chunks, topology, tp=generation.tp, pp=generation.pp, timeout_s=timeout_s
    ) as resharded:
        return answer_prompts(
            chunks,
            prompts,
            settings,
            seed=answer_seed(config),
            topology=topology,
            resharded=resharded,
            model=model,
        )


def _answer_of_other(
    config: EvaluateConfig,
    glm: GLMConfig,
    prompts: Sequence[PromptInput],
    tokenizer: Tokenizer | None,
    topology: Topology,
) -> Rollouts:
    dtype = DTYPES[config.train.dtype]
    other, _ = load_other(
        "against.path",
        config.against.path,
        topology,
        role="policy",
        dtype=dtype,
        beside=glm,
        tokenizer=tokenizer,
        tokenizer_path=config.tokenizer_path,
    )
    return _answer(config, other, prompts, tokenizer, topology, model="the model of against.path")


def _rewarder(
    config: EvaluateConfig, function: object, tokenizer: Tokenizer | None, glm: GLMConfig, topology: Topology
) -> CombinedReward:
    model, path = None, config.reward.path
    if path is not None:
        dtype = DTYPES[config.train.dtype]
        model, _ = load_other(
            "reward.path",
            path,
            topology,
            role="reward",
            dtype=dtype,
            beside=glm,
            tokenizer=tokenizer,
            tokenizer_path=config.tokenizer_path,
        )
    return CombinedReward(
        topology=topology,
        micro_batch_tokens=config.train.micro_batch_tokens,
        tokenizer=tokenizer,
        model=model,
        function=function,
        function_weight=config.reward.function_weight,
        skip_failures=config.reward.on_error == "mask",
        concurrency=config.reward.concurrency,
        function_timeout_s=config.reward.function_timeout_s,
    )


def _write(
    config: EvaluateConfig, measured: Sequence[Measured], num_prompts: int, report: ReadReport
) -> Path:
    content = {
        "model": config.model.path,
        "against": config.against.path,
        "reward": {"path": config.reward.path, "function": config.reward.function},
        "num_prompts": num_prompts,
        "num_skipped": report.num_skipped,
        "num_samples": config.generation.num_samples,
        "pass_reward": config.evaluate.pass_reward,
        "figures": {
            one.name: {**dataclasses.asdict(one.estimate), "interval": one.interval} for one in measured
        },
    }
    path = Path(config.run.output) / FILE_NAME
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path
