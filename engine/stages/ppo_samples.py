"""Sample answers of a PPO run: some of an iteration's, and at the end the first ones' prompts once more."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from glm_rlhf.engine.data.chat_tokenizer import Tokenizer
from glm_rlhf.engine.types import Rollouts
from glm_rlhf.parallel.agreement import agreed
from glm_rlhf.parallel.topology import Topology

NUM_SHOWN = 16


def write_samples(
    path: Path, rollouts: Rollouts, rewards_B: torch.Tensor, tokenizer: Tokenizer | None, place: Topology
) -> None:
    """Write the first answers of all data-parallel ranks with their rewards; every rank calls this.

    They are the same in every layout. The world gathers them; the reporter writes.

    Args:
        path: JSON lines to write.
        rollouts: this rank's.
        rewards_B: reward of each, less its baseline.
        tokenizer: gives the texts; None leaves them out.
        place: layout and groups.

    Raises:
        OSError, ValueError: the file cannot be written; on every rank.
    """
    mine = []
    if place.tp_rank == place.pp_rank == place.cp_rank == 0:
        rewards = rewards_B.tolist()
        mine = [
            (index, _line(rollouts, number, rewards[number], tokenizer))
            for number, index in enumerate(rollouts.indices)
            if index < NUM_SHOWN
        ]
    everyone: list = [None] * place.world_size
    dist.all_gather_object(everyone, mine)
    with agreed(f"writing {path}"):
        if place.is_reporter:
            found = sorted((one for part in everyone for one in part), key=lambda one: one[0])
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for _, line in found)
            path.write_text(text, encoding="utf-8")


def _line(rollouts: Rollouts, number: int, reward: float, tokenizer: Tokenizer | None) -> dict[str, object]:
    answer = rollouts.answer(number).tolist()
    prompt = rollouts.prompts[number].tokens
    return {
        "prompt_tokens": list(prompt),
        "tokens": answer,
        "prompt": tokenizer and tokenizer.decode(prompt, unknown="replace"),
        "text": tokenizer and tokenizer.decode_response(answer, unknown="replace"),
        "reward": reward,
        "is_finished": rollouts.is_finished[number],
    }
