"""What PPO and its peer are compared on: model, prompts, rule and settings, the same for both."""

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
PROMPTS, PROMPT_TOKENS = 32, 24
LOW_IDS = 8
STOP_ID = SHAPE["vocab_size"] - 1
LR = 2e-4
ADAM_BETAS = (0.9, 0.95)
CLIP, GAMMA, LAM, KL_COEF = 0.2, 1.0, 0.95, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How long answers are."""

    name: str
    max_answer_tokens: int
    stops: bool
    """Whether an answer ends at `STOP_ID`; random weights draw it at about one token in 32."""


TASKS = (
    Task(name="full lengths", max_answer_tokens=48, stops=False),
    Task(name="answers that stop", max_answer_tokens=128, stops=True),
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


def draw_prompts(seed: int) -> torch.Tensor:
    """Return 32 prompts of 24 random ids, int64 [32, 24]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(LOW_IDS, STOP_ID, (PROMPTS, PROMPT_TOKENS), generator=generator)


def save_models(folder: Path, task: Task, *, seed: int) -> None:
    """Write `policy` and `critic` of random weights as Hugging Face folders."""
    from transformers import GlmConfig, GlmForCausalLM, GlmForSequenceClassification

    torch.manual_seed(seed)
    ids = {"pad_token_id": None, "eos_token_id": STOP_ID if task.stops else None}
    GlmForCausalLM(GlmConfig(**SHAPE, **ids)).float().save_pretrained(folder / "policy")
    critic = GlmForSequenceClassification(GlmConfig(**SHAPE, **ids, num_labels=1))
    critic.float().save_pretrained(folder / "critic")
