"""What PPO and its peer are compared on: model, prompts, rule and settings, the same for both."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
}
PROMPTS = 32
LOW_IDS = 8
STOP_ID = SHAPE["vocab_size"] - 1
LR = 2e-4
ADAM_BETAS = (0.9, 0.95)
CLIP, GAMMA, LAM, KL_COEF = 0.2, 1.0, 0.95, 0.05


REAL_PROMPT_TOKENS = (
    (0.0, 9.0),
    (0.05, 14.0),
    (0.1, 17.0),
    (0.25, 30.25),
    (0.5, 92.0),
    (0.75, 164.0),
    (0.9, 269.0),
    (0.95, 346.55),
    (0.99, 540.55),
    (1.0, 819.0),
)
"""Quantiles of the tokens of a prompt: (share of the prompts, tokens).

Source: the 2,310 different dialogues of hh-rlhf's harmless-base test file, each up to the last answer, in
ChatGLM3's chat format and tokenizer; their mean is 120.4.
"""
REAL_SCALE, MAX_PROMPT_TOKENS = 0.25, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerTask:
    """How long prompts and answers are."""

    name: str
    prompt_tokens: tuple[int, ...]
    """Of each prompt, from the shortest."""
    max_answer_tokens: int
    stops: bool
    """Whether an answer ends at `STOP_ID`; random weights draw it at about one token in 32."""


def real_lengths() -> tuple[int, ...]:
    """Return the tokens of prompts spread like `REAL_PROMPT_TOKENS`, a quarter as long, to fit the model.

    Prompt i of N has the length at the quantile (i + 1/2) / N, linear between those that are given; what is
    longer than 128 after scaling, the longest of 32, is cut to that.
    """
    lengths = []
    for number in range(PROMPTS):
        share = (number + 0.5) / PROMPTS
        (a, low), (b, high) = next(
            pair for pair in itertools.pairwise(REAL_PROMPT_TOKENS) if share <= pair[1][0]
        )
        tokens = low + (high - low) * (share - a) / (b - a)
        lengths.append(min(round(REAL_SCALE * tokens), MAX_PROMPT_TOKENS))
    return tuple(lengths)


TASKS = (
    PeerTask(name="full lengths", prompt_tokens=(24,) * PROMPTS, max_answer_tokens=48, stops=False),
    PeerTask(name="answers that stop", prompt_tokens=(24,) * PROMPTS, max_answer_tokens=128, stops=True),
    PeerTask(name="lengths like real ones", prompt_tokens=real_lengths(), max_answer_tokens=128, stops=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the iterations of one contender were like; grows by one entry an iteration."""

    seconds: list[float] = field(default_factory=list)
    """Of each iteration."""
    rewards: list[float] = field(default_factory=list)
    """Mean of each iteration's answers, before its update."""
    lengths: list[float] = field(default_factory=list)
    """Mean tokens of each iteration's answers."""
    phases: list[dict[str, float]] = field(default_factory=list)
    """Seconds by phase of each iteration, where they are known."""


def share_of_low_ids(tokens: Sequence[int]) -> float:
    """Return the rule's reward: the share of an answer's ids that are below 8."""
    return sum(token < LOW_IDS for token in tokens) / len(tokens)


def draw_prompts(task: PeerTask, seed: int) -> list[list[int]]:
    """Return the task's prompts of random ids, none of them low, in random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(PROMPTS, generator=generator).tolist()
    return [
        torch.randint(LOW_IDS, STOP_ID, (task.prompt_tokens[number],), generator=generator).tolist()
        for number in order
    ]


def save_models(folder: Path, task: PeerTask, *, seed: int) -> None:
    """Write `policy` and `critic` of random weights as Hugging Face folders."""
    from transformers import GlmConfig, GlmForCausalLM, GlmForSequenceClassification

    torch.manual_seed(seed)
    ids = {"pad_token_id": None, "eos_token_id": STOP_ID if task.stops else None}
    GlmForCausalLM(GlmConfig(**SHAPE, **ids)).float().save_pretrained(folder / "policy")
    critic = GlmForSequenceClassification(GlmConfig(**SHAPE, **ids, num_labels=1))
    critic.float().save_pretrained(folder / "critic")
