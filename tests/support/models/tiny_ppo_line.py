"""The command line of a tiny PPO run."""

import json
from pathlib import Path


def ppo_line(model: Path, folder: Path) -> list[str]:
    """Write prompts into `folder`; return the arguments of a run of three iterations, without an output."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_tokens": [3 + n, 4]}) + "\n" for n in range(8)))
    arguments = {
        "model.path": model,
        "data.path": prompts,
        "reward.function": "reward_rules:share_of_low_ids",
        "train.steps": 3,
        "train.global_batch_size": 4,
        "train.dtype": "fp32",
        "train.sample_every": 0,
        "generation.max_new_tokens": 24,
        "optimizer.lr": 1e-3,
        "observe.tensorboard": "false",
    }
    return ["ppo", *(f"{key}={value}" for key, value in arguments.items())]
