"""Answers of all data-parallel ranks with their rewards, in one order."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from glm_rlhf.engine.data.records.jsonl_writer import json_lines
from glm_rlhf.engine.data.tokenizer.chat_tokenizer import Tokenizer
from glm_rlhf.engine.types import Rollouts
from glm_rlhf.parallel.runtime.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredAnswer:
    """One answer with its reward."""

    prompt_tokens: tuple[int, ...]
    """Token ids of the prompt."""
    tokens: tuple[int, ...]
    """Token ids of the answer."""
    prompt: str | None
    """The prompt as text; None without a tokenizer."""
    text: str | None
    """The answer as text; None without a tokenizer."""
    reward: float | None
    """Its reward, token rewards included; None where it has none."""
    is_finished: bool
    """Whether it ended with a stop token or text; false where it was cut at its maximum length."""


def gather_answers(
    rollouts: Rollouts,
    rewards_B: torch.Tensor,
    tokenizer: Tokenizer | None,
    topology: Topology,
    *,
    first: int | None = None,
) -> list[ScoredAnswer]:
    """Return the answers of all data-parallel ranks, in the same order in every layout, on all ranks.

    Every rank of the topology calls this; the world gathers.

    Args:
        rollouts: answers of this rank; excluded ones get the reward None.
        rewards_B: reward of each answer, [B].
        tokenizer: decodes the texts; None: no texts.
        topology: layout and groups.
        first: return only answers with an index below this; None: all.
    """
    mine = []
    if topology.tp_rank == topology.pp_rank == topology.cp_rank == 0:
        rewards = rewards_B.tolist()
        for number, index in enumerate(rollouts.indices):
            if first is None or index < first:
                reward = None if number in rollouts.excluded else rewards[number]
                mine.append((index, _scored_answer(rollouts, number, reward, tokenizer)))
    gathered: list = [None] * topology.world_size
    dist.all_gather_object(gathered, mine)
    by_index = sorted((entry for part in gathered for entry in part), key=lambda entry: entry[0])
    return [answer for _, answer in by_index]


def write_answers(path: Path, answers: Sequence[ScoredAnswer]) -> None:
    """Write one JSON line per answer; one rank calls this. The file appears when it is complete.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    with json_lines(path) as write:
        for answer in answers:
            write(asdict(answer))


def _scored_answer(
    rollouts: Rollouts, number: int, reward: float | None, tokenizer: Tokenizer | None
) -> ScoredAnswer:
    answer = rollouts.answer(number).tolist()
    prompt = rollouts.prompts[number].tokens
    return ScoredAnswer(
        prompt_tokens=prompt,
        tokens=tuple(answer),
        prompt=tokenizer and tokenizer.decode(prompt, unknown="replace"),
        text=tokenizer and tokenizer.decode_response(answer, unknown="replace"),
        reward=reward,
        is_finished=rollouts.is_finished[number],
    )
