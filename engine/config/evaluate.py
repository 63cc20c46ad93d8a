"""The settings of evaluation, as a command and during PPO."""

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from glm_rlhf.engine.config.load import FromYaml
from glm_rlhf.engine.config.reward import PPORewardSection
from glm_rlhf.engine.config.sections import (
    Count,
    ForwardSection,
    GenerationSection,
    ModelSection,
    ParallelSection,
    PathText,
    RecordsSection,
    RunSection,
    TokenizedRoot,
    TokenizerSection,
    check_apart,
    frozen_section,
    out_path,
)
from glm_rlhf.engine.config.training import CountOrZero


@frozen_section
class AgainstSection:
    """The model to compare the policy with."""

    path: PathText | None = None
    """Hugging Face folder of a policy with the same vocabulary; null: no comparison."""


@frozen_section
class EvaluateSection:
    """Pass@k."""

    pass_k: tuple[Count, ...] = (1,)
    """Values of k for pass@k, the probability that at least one of k answers to a prompt passes."""
    pass_reward: float = 1.0
    """Smallest reward of an answer that passes."""


@frozen_section
class EvaluateWithinSection:
    """Evaluation on held-out prompts during training."""

    every: CountOrZero = 0
    """Iterations between evaluations, which also run before the first iteration and after the last; 0: no
    evaluation."""
    path: PathText | None = None
    """Held-out prompts: JSON lines or parquet."""
    num_samples: Count = 1
    """Answers per prompt."""
    pass_k: tuple[Count, ...] = (1,)
    """Values of k for pass@k, the probability that at least one of k answers to a prompt passes."""
    pass_reward: float = 1.0
    """Smallest reward of an answer that passes."""
    keeps_best: bool = True
    """Whether the policy with the highest mean reward is exported to <run.output>/hf/best."""

    def __post_init__(self) -> None:
        if (self.every > 0) != (self.path is not None):
            raise ValueError(
                f"evaluate.every is {self.every} and evaluate.path {self.path or 'null'}: evaluation needs "
                "both, set both or neither"
            )
        _check_pass_k(self, self.num_samples, "evaluate.num_samples")


@frozen_section
class EvaluateConfig(TokenizedRoot):
    """Settings of `evaluate`."""

    run: RunSection = Field(default_factory=partial(RunSection, name="evaluate"))
    """Run folder and seed."""
    model: ModelSection
    """The policy to evaluate."""
    against: AgainstSection = Field(default_factory=AgainstSection)
    """The model to compare it with."""
    reward: PPORewardSection
    """Reward of an answer."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """The tokenizer of all models."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """The layout of all models."""
    data: RecordsSection
    """Input prompts and output answers with rewards."""
    generation: GenerationSection = Field(default_factory=GenerationSection)
    """Sampling."""
    train: ForwardSection = Field(default_factory=ForwardSection)
    """Precision of the models, and batches of the reward model."""
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    """Pass@k."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        check_apart("data.out", self.out_path, "data.path", self.data.path)
        _check_pass_k(self.evaluate, self.generation.num_samples, "generation.num_samples")

    @property
    def out_path(self) -> Path:
        """File of the answers with their rewards."""
        return out_path(self, "evaluate.jsonl")


def _check_pass_k(section: Any, num_samples: int, key: str) -> None:
    largest = max(section.pass_k, default=0)
    if largest > num_samples:
        raise ValueError(
            f"evaluate.pass_k holds {largest}, {key} is {num_samples}: it must be at least the largest k"
        )
