"""The settings of PPO."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from glm_rlhf.engine.config.evaluate import EvaluateWithinSection
from glm_rlhf.engine.config.load import FromYaml
from glm_rlhf.engine.config.reward import PPORewardSection
from glm_rlhf.engine.config.sections import (
    Count,
    GenerationSection,
    ModelSection,
    ParallelSection,
    PathText,
    TokenizerSection,
    frozen_section,
    tokenizer_path,
)
from glm_rlhf.engine.config.training import (
    CountOrZero,
    NotNegative,
    ObserveSection,
    OptimizerSection,
    OptionalModelSection,
    Positive,
    TrainingRunSection,
    TrainingSection,
)

Fraction = Annotated[float, Field(ge=0, le=1)]


@frozen_section
class CriticSection:
    """The critic."""

    path: PathText | None = None
    """Hugging Face folder; null starts from the reward model, without one from the policy with a new head."""
    lr: Positive = 5e-6
    """Its learning rate, constant after the policy's warm-up."""
    warmup_iterations: CountOrZero = 0
    """First iterations in which only the critic learns."""


@frozen_section
class PPOPromptsSection:
    """What is to be answered."""

    path: PathText
    """JSON lines, or parquet, of prompts; further fields of a record reach the reward function."""
    sft_path: PathText | None = None
    """JSON lines, or parquet, of demonstrations that the policy goes on imitating, see ppo.sft_coef; null for
    none."""
    max_prompt_tokens: Count = 4096
    """Longest prompt, in tokens; a longer one is a bad record."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a bad record, of prompts or demonstrations, does: end the command, or be left out and counted."""


@frozen_section
class PPOTrainSection(TrainingSection):
    """How long, and in which portions."""

    sft_batch_size: Count | None = None
    """Demonstrations per optimizer step, over all ranks; null: global_batch_size / ppo.minibatches, rounded
    up."""
    offload: tuple[Literal["optimizers", "reference", "reward"], ...] = ()
    """What waits in pinned host memory in phases that do not need it. optimizers: the states of policy and
    critic while answers are generated and scored; gradient buffers are freed meanwhile. reference, reward:
    the model's weights while answers are generated and learned from; that model then scores no answers while
    others are generated."""
    sample_every: CountOrZero = 10
    """Iterations between two files of sample answers in <run.output>/samples; 0 for none."""


@frozen_section
class PPOSection:
    """How experience is estimated and learned from. Values are ours; the paper does not name them."""

    epochs: Count = 1
    """Passes over an iteration's answers."""
    minibatches: Count = 1
    """Optimizer steps a pass."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The ratio of new to old probability counts between 1 - clip and 1 + clip."""
    value_clip: Positive | None = 0.2
    """The critic may move this far from its old value, in units of reward; null does not clip."""
    gamma: Fraction = 1.0
    """Discount a token."""
    lam: Fraction = 0.95
    """GAE's lambda."""
    kl_coef: NotNegative = 0.05
    """Weight of the KL to the reference inside the reward; with kl_target its first value."""
    kl_target: Positive | None = None
    """KL a token, in nats, that the coefficient is steered towards; null keeps it fixed."""
    kl_horizon: Count = 10_000
    """Sequences over which a steered coefficient follows."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL inside the reward."""
    entropy_coef: NotNegative = 0.0
    """Weight of the entropy bonus."""
    sft_coef: NotNegative = 0.0
    """Weight of the next-token loss on data.sft_path in every step of the policy, against forgetting."""
    whiten: bool = False
    """Whether advantages get mean 0 and variance 1 over the iteration."""
    max_kl: Positive | None = None
    """An update ends when a mini-batch's KL from the old policy, in nats a token, is above; null: never."""
    max_logprob_gap: NotNegative = 1e-4
    """The sampler's logprobs serve as the old ones up to this mean distance, in nats, from a forward pass
    over one answer in eight; above it, the pass goes over all."""
    overlap_scoring: bool = True
    """Whether reference, critic and reward model score answers that have ended while others are generated, in
    turns in which a pipeline stage would be idle. Off it saves the memory of a forward pass over an answer
    beside the cache. Without parallel.pp no turn is idle; with parallel.cp, generation.tp or generation.pp
    none is used."""
    reference_baseline: bool = True
    """Whether each reward has that of the reference's answer to the same prompt subtracted."""


@frozen_section
class PPOConfig:
    """Settings of `ppo`."""

    run: TrainingRunSection = Field(default_factory=partial(TrainingRunSection, name="ppo"))
    """Where everything goes, and the seed."""
    model: ModelSection
    """The policy that is trained."""
    critic: CriticSection = Field(default_factory=CriticSection)
    """The critic that is trained beside it."""
    reward: PPORewardSection
    """The reward."""
    reference: OptionalModelSection = Field(default_factory=OptionalModelSection)
    """The policy that it is held to."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """The tokenizer of all models."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """The layout of all models."""
    data: PPOPromptsSection
    """The prompts."""
    generation: GenerationSection = Field(default_factory=GenerationSection)
    """How they are answered."""
    optimizer: OptimizerSection = Field(default_factory=partial(OptimizerSection, lr=1e-6))
    """How the policy learns; the critic differs in its learning rate."""
    train: PPOTrainSection
    """How long."""
    ppo: PPOSection = Field(default_factory=PPOSection)
    """The algorithm."""
    evaluate: EvaluateWithinSection = Field(default_factory=EvaluateWithinSection)
    """Evaluation on the way."""
    observe: ObserveSection = Field(default_factory=ObserveSection)
    """Who is told."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        if self.generation.temperature == 0:
            raise ValueError(
                "generation.temperature is 0: PPO learns from answers that are drawn, set it above"
            )
        if self.ppo.sft_coef > 0 and self.data.sft_path is None:
            raise ValueError(
                f"ppo.sft_coef is {self.ppo.sft_coef}, but there is nothing to imitate: set data.sft_path to "
                "demonstrations, or ppo.sft_coef to 0"
            )
        if self.ppo.sft_coef == 0 and self.data.sft_path is not None:
            raise ValueError(
                f"data.sft_path is {self.data.sft_path}, but ppo.sft_coef is 0, so that it would not be "
                "learned from: set ppo.sft_coef above 0, or data.sft_path to null"
            )
        if "optimizers" in self.train.offload and self.optimizer.in_backward:
            raise ValueError(
                f"train.offload is {list(self.train.offload)} with optimizer.in_backward, whose state is not "
                "parked: leave optimizers out, or set optimizer.in_backward to false"
            )
        if self.train.sft_batch_size is not None and self.data.sft_path is None:
            raise ValueError(
                f"train.sft_batch_size is {self.train.sft_batch_size}, but there are no demonstrations: set "
                "data.sft_path and ppo.sft_coef, or train.sft_batch_size to null"
            )

    @property
    def sft_batch_size(self) -> int:
        """Demonstrations an optimizer step of the policy, over all ranks."""
        return self.train.sft_batch_size or -(-self.train.global_batch_size // self.ppo.minibatches)

    @property
    def tokenizer_path(self) -> Path:
        """Folder with the tokenizer's files."""
        return tokenizer_path(self)
