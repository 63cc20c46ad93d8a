"""Answers with their rewards, of all data-parallel ranks in one order."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.types import Rollouts
from glm_rlhf.parallel.runtime.consensus import raise_on_all_ranks
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedAnswer:
    """One answer, and what it is worth."""

    prompt_tokens: tuple[int, ...]
    """Ids that the model was given."""
    tokens: tuple[int, ...]
    """Ids that it wrote."""
    prompt: str | None
    """The prompt as text; None without a tokenizer."""
    text: str | None
    """The answer as text; None without a tokenizer."""
    reward: float | None
    """What it is worth in all; None where no reward could be had."""
    is_finished: bool
    """Whether it ended by itself."""


def gather_answers(
    rollouts: Rollouts,
    rewards_B: torch.Tensor,
    tokenizer: Tokenizer | None,
    topology: Topology,
    *,
    first: int | None = None,
) -> list[JudgedAnswer]:
    """Return the answers of all data-parallel ranks, in the same order in every layout, on every rank.

    Every rank of the topology calls this; the world gathers.

    Args:
        rollouts: this rank's; those left out have no reward.
        rewards_B: reward of each.
        tokenizer: gives the texts; None leaves them out.
        topology: layout and groups.
        first: so many at most; None for all.
    """
    mine = []
    if topology.tp_rank == topology.pp_rank == topology.cp_rank == 0:
        rewards = rewards_B.tolist()
        for number, index in enumerate(rollouts.indices):
            if first is None or index < first:
                reward = None if number in rollouts.excluded else rewards[number]
                mine.append((index, _judged(rollouts, number, reward, tokenizer)))
    everyone: list = [None] * topology.world_size
    dist.all_gather_object(everyone, mine)
    found = sorted((one for part in everyone for one in part), key=lambda one: one[0])
    return [answer for _, answer in found]


def write_answers(path: Path, answers: Sequence[JudgedAnswer], topology: Topology) -> None:
    """Write one JSON line an answer, on the reporter; every rank calls this.

    Raises:
        OSError, ValueError: the file cannot be written; on every rank.
    """
    with raise_on_all_ranks(f"writing {path}"):
        if topology.is_main_rank:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
            path.write_text(text, encoding="utf-8")


def _judged(
    rollouts: Rollouts, number: int, reward: float | None, tokenizer: Tokenizer | None
) -> JudgedAnswer:
    answer = rollouts.answer(number).tolist()
    prompt = rollouts.prompts[number].tokens
    return JudgedAnswer(
        prompt_tokens=prompt,
        tokens=tuple(answer),
        prompt=tokenizer and tokenizer.decode(prompt, unknown="replace"),
        text=tokenizer and tokenizer.decode_response(answer, unknown="replace"),
        reward=reward,
        is_finished=rollouts.is_finished[number],
    )
