"""How `demo` trains: a tiny ChatGLM3 through SFT, a reward model and PPO, by the commands' own stages."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from glm_rlhf.engine.commands import generate, ppo, reward, sft
from glm_rlhf.engine.commands.demo.toy_task import TaskSet, ToyTask
from glm_rlhf.engine.commands.demo.toy_tokenizer import NUM_IDS, write_tiny_tokenizer
from glm_rlhf.engine.config.rl import (
    CriticSection,
    PPOConfig,
    PPOPromptsSection,
    PPORewardSection,
    PPOSection,
    PPOTrainSection,
)
from glm_rlhf.engine.config.sections import (
    GenerateConfig,
    GenerationSection,
    ModelSection,
    PrecisionSection,
    RecordsSection,
    RunSection,
)
from glm_rlhf.engine.config.tools import DemoConfig
from glm_rlhf.engine.config.training import (
    DemonstrationsSection,
    ObserveSection,
    OptimizerSection,
    PairsSection,
    RewardConfig,
    SFTConfig,
    TrainingRunSection,
    TrainSection,
)
from glm_rlhf.engine.data.records.jsonl_writer import json_lines
from glm_rlhf.parallel.model.glm import build_model
from glm_rlhf.parallel.runtime.topology import open_topology
from glm_rlhf.parallel.spec.layout import Layout
from glm_rlhf.parallel.spec.model_config import GLMConfig
from glm_rlhf.parallel.weights.export import export_model
from glm_rlhf.parallel.weights.load import randomize_weights

MAX_NEW_TOKENS = 8
NUM_SAMPLES = 4
"""Answers to a prompt wherever several are drawn."""

_SHAPE = GLMConfig(
    family="chatglm",
    num_layers=3,
    hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    ffn_size=256,
    vocab_size=NUM_IDS + 64,  # like the real one, more rows than ids
    norm_epsilon=1e-5,
    rope_theta=10000.0,
    max_positions=128,
    init_std=0.05,
)
_REWARD_BATCH = 64  # or all pairs, where they are fewer
_QUIET = ObserveSection(tensorboard=False)


def train_sft(config: DemoConfig, tasks: TaskSet) -> Path:
    """Return the folder of a policy that imitates the demonstrations; one process calls it."""
    folder = Path(config.run.output)
    with open_topology(Layout(), seed=config.run.seed) as topology:
        chunks = build_model(_SHAPE, topology, dtype=torch.float32)
        randomize_weights(chunks, seed=config.run.seed)
        export_model(chunks, folder / "model", topology=topology)
    write_tiny_tokenizer(folder / "model")
    demonstrations = folder / "data" / "demonstrations.jsonl"
    write_lines(
        demonstrations,
        ({"prompt": task.prompt, "response": task.demonstration} for task in tasks.sums + tasks.canaries),
    )
    steps = config.demo.sft_steps
    settings = SFTConfig(
        run=_stage_run("sft", folder, config),
        model=ModelSection(path=str(folder / "model")),
        data=DemonstrationsSection(path=str(demonstrations)),
        optimizer=OptimizerSection(lr=3e-3, warmup_steps=min(20, steps)),
        train=TrainSection(steps=steps, global_batch_size=64, micro_batch_tokens=4096, dtype="fp32"),
        observe=_QUIET,
    )
    sft.run(settings)
    return folder / "sft" / "hf" / f"step_{steps}"


def pairs_of(tasks: Sequence[ToyTask], lines: Sequence[Sequence[dict]]) -> list[dict]:
    """Return records of pairs out of a policy's own answers: to each prompt a right one above a wrong one.

    The first of either kind are taken; a prompt with one kind only gives no pair.
    """
    pairs = []
    for task, samples in zip(tasks, lines, strict=True):
        right = next((line for line in samples if is_right(task, line)), None)
        wrong = next((line for line in samples if not is_right(task, line)), None)
        if right is not None and wrong is not None:
            pairs.append(
                {
                    "prompt_tokens": right["prompt_tokens"],
                    "chosen_tokens": right["tokens"],
                    "rejected_tokens": wrong["tokens"],
                }
            )
    return pairs


def is_right(task: ToyTask, line: dict) -> bool:
    """Return whether an answer is the right one, ended by itself, and nothing else."""
    return line["text"].strip() == task.answer and line["finish_reason"] == "stop"


def train_reward(
    config: DemoConfig, policy: Path, pairs: list[dict], held_out: list[dict]
) -> tuple[Path, float]:
    """Return the folder of a reward model made of the policy, and its accuracy on held-out pairs.

    Raises:
        ValueError: no pairs to learn from, or none that are held out.
    """
    if not pairs or not held_out:
        raise ValueError(
            f"the policy's answers give {len(pairs)} pairs to learn from and {len(held_out)} held out, "
            "required is one of each: raise demo.sft_steps, so that some answers are right, or "
            "demo.num_pair_prompts and demo.num_held_out"
        )
    folder, steps = Path(config.run.output), config.demo.reward_steps
    learned, evaluated = folder / "data" / "pairs.jsonl", folder / "data" / "held_out_pairs.jsonl"
    write_lines(learned, pairs)
    write_lines(evaluated, held_out)
    settings = RewardConfig(
        run=_stage_run("reward", folder, config),
        model=ModelSection(path=str(policy)),
        data=PairsSection(path=str(learned), eval_path=str(evaluated)),
        optimizer=OptimizerSection(lr=1.5e-3, warmup_steps=min(5, steps)),
        train=TrainSection(
            steps=steps,
            global_batch_size=min(_REWARD_BATCH, len(pairs)),
            micro_batch_tokens=4096,
            dtype="fp32",
        ),
        observe=_QUIET,
    )
    reward.run(settings)
    last = read_lines(folder / "reward" / "metrics.jsonl")[-1]
    return folder / "reward" / "hf" / f"step_{steps}", last["eval/accuracy"]


def train_ppo(config: DemoConfig, tasks: TaskSet, policy: Path, reward_model: Path) -> Path:
    """Return the folder of the policy after PPO; its reward is the reward model and nothing else."""
    folder, steps = Path(config.run.output), config.demo.ppo_steps
    prompts, canaries = folder / "data" / "prompts.jsonl", folder / "data" / "sft_term.jsonl"
    write_lines(prompts, ({"prompt": task.prompt} for task in tasks.sums))
    write_lines(canaries, ({"prompt": task.prompt, "response": task.answer} for task in tasks.canaries))
    settings = PPOConfig(
        run=_stage_run("ppo", folder, config),
        model=ModelSection(path=str(policy)),
        critic=CriticSection(lr=3e-4, warmup_iterations=min(2, steps - 1)),
        reward=PPORewardSection(path=str(reward_model)),
        data=PPOPromptsSection(path=str(prompts), sft_path=str(canaries)),
        generation=GenerationSection(
            max_new_tokens=MAX_NEW_TOKENS, num_samples=NUM_SAMPLES, max_batch=64 * NUM_SAMPLES
        ),
        optimizer=OptimizerSection(lr=3e-4, warmup_steps=min(3, steps)),
        train=PPOTrainSection(steps=steps, global_batch_size=64, micro_batch_tokens=8192, dtype="fp32"),
        ppo=PPOSection(
            minibatches=2, kl_coef=0.05, sft_coef=0.2, value_clip=None, whiten=True, reference_baseline=True
        ),
        observe=ObserveSection(tensorboard=False),
    )
    ppo.run(settings)
    return folder / "ppo" / "hf" / f"step_{steps}"


def ask(
    config: DemoConfig, model: Path, tasks: Sequence[ToyTask], *, name: str, temperature: float
) -> list[list[dict]]:
    """Return the lines of `generate` for each task: one at temperature 0, else `NUM_SAMPLES`."""
    folder = Path(config.run.output)
    prompts, out = folder / "data" / f"{name}_prompts.jsonl", folder / "answers" / f"{name}.jsonl"
    write_lines(prompts, ({"prompt": task.prompt} for task in tasks))
    generate.run(
        GenerateConfig(
            run=RunSection(name="generate", output=str(out.parent), seed=config.run.seed),
            model=ModelSection(path=str(model)),
            data=RecordsSection(path=str(prompts), out=str(out), overwrite=True),
            generation=GenerationSection(
                max_new_tokens=MAX_NEW_TOKENS,
                temperature=temperature,
                num_samples=NUM_SAMPLES if temperature else 1,
                seed=config.run.seed,
            ),
            train=PrecisionSection(dtype="fp32"),
        )
    )
    by_task: list[list[dict]] = [[] for _ in tasks]
    for line in read_lines(out):
        by_task[line["index"]].append(line)
    return by_task


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """Write JSON lines."""
    with json_lines(path) as write:
        for record in records:
            write(record)


def read_lines(path: Path) -> list[dict]:
    """Return JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _stage_run(name: str, folder: Path, config: DemoConfig) -> TrainingRunSection:
    """Return the run of one stage; a demo begins anew, whatever an earlier one left."""
    return TrainingRunSection(name=name, output=str(folder / name), seed=config.run.seed, resume="never")
