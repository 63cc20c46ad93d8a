"""The project's commands, run in this process as a user runs them, one after another."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

from glm_rlhf.engine.cli import main

END = 2
"""Id that ends an answer."""


def run_command(command: str, *options: str) -> None:
    """Run a command to its end.

    Raises:
        RuntimeError: it ended with another status than 0; the message holds what it said.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main([command, *options])
    if code:
        raise RuntimeError(f"{command} ended with {code}: {said.getvalue()}")


def train(command: str, model: Path, data: Path, output: Path, *options: str, steps: int, seed: int) -> Path:
    """Return the last checkpoint of a training command, in fp32.

    Args:
        command: `sft`, `reward`, `dpo` or `ppo`.
        model: folder that it starts from.
        data: JSON lines that it learns from.
        output: run folder.
        options: further `section.key=value`.
        steps: of training.
        seed: of the run.
    """
    run_command(
        command,
        *(f"model.path={model}", f"data.path={data}", f"run.output={output}", f"run.seed={seed}"),
        *(f"train.steps={steps}", "train.dtype=fp32", "train.micro_batch_tokens=4096"),
        "observe.tensorboard=false",
        *options,
    )
    return output / "hf" / f"step_{steps}"


def answers_of(
    model: Path, prompts: Path, output: Path, *, seed: int, temperature: float = 1.0
) -> list[list[int]]:
    """Return a policy's answer to each prompt of a file, without its end.

    Args:
        model: folder of the policy.
        prompts: JSON lines.
        output: run folder.
        seed: of the answers.
        temperature: 0 takes the most likely tokens.
    """
    run_command(
        "generate",
        *(f"model.path={model}", f"data.path={prompts}", f"run.output={output}", "train.dtype=fp32"),
        *answering(seed),
        f"generation.temperature={temperature}",
    )
    lines = (output / "generate.jsonl").read_text(encoding="utf-8").splitlines()
    return [[token for token in json.loads(line)["tokens"] if token != END] for line in lines]


def answering(seed: int) -> Sequence[str]:
    """Return how answers are sampled, as options of `generate`, `label` and `ppo`."""
    return ("generation.max_new_tokens=32", f"generation.stop_ids=[{END}]", f"generation.seed={seed}")
