"""The settings of evaluation, as a command and within PPO."""

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
    TokenizerSection,
    check_apart,
    frozen_section,
    out_path,
    tokenizer_path,
)
from glm_rlhf.engine.config.training import CountOrZero


@frozen_section
class AgainstSection:
    """The model that the policy is compared with."""

    path: PathText | None = None
    """Hugging Face folder of a policy of the same vocabulary; null compares with none."""


@frozen_section
class EvaluateSection:
    """What counts as passed."""

    pass_k: tuple[Count, ...] = (1,)
    """The k of each pass@k: the chance that of k answers to a prompt at least one passes."""
    pass_reward: float = 1.0
    """An answer passes when its reward is at least this."""


@frozen_section
class EvaluateWithinSection:
    """Evaluation on held-out prompts while a policy learns."""

    every: CountOrZero = 0
    """Iterations between two evaluations, one before the first and one after the last too; 0 for none."""
    path: PathText | None = None
    """JSON lines, or parquet, of prompts that are not learned from."""
    num_samples: Count = 1
    """Answers to each of them."""
    pass_k: tuple[Count, ...] = (1,)
    """The k of each pass@k: the chance that of k answers to a prompt at least one passes."""
    pass_reward: float = 1.0
    """An answer passes when its reward is at least this."""
    keeps_best: bool = True
    """Whether the policy of the highest mean reward is kept in <run.output>/hf/best."""

    def __post_init__(self) -> None:
        if (self.every > 0) != (self.path is not None):
            raise ValueError(
                f"evaluate.every is {self.every} and evaluate.path {self.path or 'null'}: evaluation needs "
                "both, give both or neither"
            )
        _check_pass_k(self, self.num_samples, "evaluate.num_samples")


@frozen_section
class EvaluateConfig:
    """Settings of `evaluate`."""

    run: RunSection = Field(default_factory=partial(RunSection, name="evaluate"))
    """Where results go, and the seed."""
    model: ModelSection
    """The policy that is evaluated."""
    against: AgainstSection = Field(default_factory=AgainstSection)
    """Whom it is compared with."""
    reward: PPORewardSection
    """Who judges."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """The tokenizer of all models."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """The layout of all models."""
    data: RecordsSection
    """Prompts in, judged answers out."""
    generation: GenerationSection = Field(default_factory=GenerationSection)
    """How answers are drawn."""
    train: ForwardSection = Field(default_factory=ForwardSection)
    """Precision of the models, and batches of the reward model."""
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    """What counts."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        check_apart("data.out", self.out_path, "data.path", self.data.path)
        _check_pass_k(self.evaluate, self.generation.num_samples, "generation.num_samples")

    @property
    def out_path(self) -> Path:
        """File of judged answers."""
        return out_path(self, "evaluate.jsonl")

    @property
    def tokenizer_path(self) -> Path:
        """Folder with the tokenizer's files."""
        return tokenizer_path(self)


def _check_pass_k(section: Any, num_samples: int, key: str) -> None:
    largest = max(section.pass_k, default=0)
    if largest > num_samples:
        raise ValueError(f"evaluate.pass_k holds {largest}, {key} is {num_samples}: draw as many at least")
