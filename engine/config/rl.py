"""The settings of PPO."""

from functools import partial
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
    TokenizedRoot,
    TokenizerSection,
    frozen_section,
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
    """Hugging Face folder that the critic starts from; null: the reward model, or the policy with a new
    scalar head where there is none."""
    lr: Positive = 5e-6
    """Learning rate of the critic, constant over the run: optimizer.warmup_steps and optimizer.min_lr are the
    policy's."""
    warmup_iterations: CountOrZero = 0
    """Number of first iterations that train the critic only."""


@frozen_section
class PPOPromptsSection:
    """Prompts, and demonstrations of the SFT loss."""

    path: PathText
    """Prompts: JSON lines or parquet; the reward function gets the other fields of a record."""
    sft_path: PathText | None = None
    """Demonstrations (JSON lines or parquet) of the SFT loss, see ppo.sft_coef; null: none."""
    max_prompt_tokens: Count = 4096
    """Longest prompt, in tokens; a record with a longer one is bad."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a bad prompt or demonstration: raise ends the command, skip drops and counts it."""


@frozen_section
class PPOTrainSection(TrainingSection):
    """Length of the run, batches, precision, memory and checkpoints."""

    sft_batch_size: Count | None = None
    """Demonstrations per optimizer step, over all ranks; null: global_batch_size / ppo.minibatches, rounded
    up."""
    offload: tuple[Literal["optimizers", "reference", "reward"], ...] = ()
    """States offloaded to pinned host memory in phases that do not need them. optimizers: optimizer states of
    policy and critic during generation and scoring, their gradient buffers are freed meanwhile. reference,
    reward: the model's weights during generation and training; ppo.overlap_scoring then skips the model."""
    sample_every: CountOrZero = 10
    """Iterations between files of sample answers in <run.output>/samples; 0: none."""


@frozen_section
class PPOSection:
    """Advantages and losses of PPO. The defaults are this project's; the paper does not state them."""

    epochs: Count = 1
    """Epochs over the answers of an iteration."""
    minibatches: Count = 1
    """Mini-batches, each one optimizer step, per epoch."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Clip range of the policy loss: the probability ratio is clipped to [1 - clip, 1 + clip]."""
    value_clip: Positive | None = 0.2
    """Clip range of the value loss: values are clipped to old value ± value_clip, in units of reward; null:
    no clipping."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """Lambda of GAE."""
    kl_coef: NotNegative = 0.05
    """Coefficient of the KL penalty to the reference in the reward; with kl_target, its initial value."""
    kl_target: Positive | None = None
    """Target KL per token, in nats, of the adaptive coefficient; null: the coefficient is fixed."""
    kl_horizon: Count = 10_000
    """Horizon of the adaptive coefficient, in sequences."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL penalty in the reward."""
    entropy_coef: NotNegative = 0.0
    """Coefficient of the entropy bonus in the policy loss."""
    sft_coef: NotNegative = 0.0
    """Coefficient of the SFT loss on data.sft_path in each policy step (PPO-ptx)."""
    whiten: bool = False
    """Whether advantages are whitened to mean 0 and variance 1 over the iteration."""
    max_kl: Positive | None = None
    """Early stop: an update ends when the KL from the old policy in a mini-batch, in nats per token, exceeds
    this; null: never."""
    max_logprob_gap: NotNegative = 1e-4
    """Largest mean difference, in nats, between the sampler's logprobs and those of a forward pass over one
    answer in eight at which the sampler's are used as old logprobs; above it, the forward pass covers all
    answers."""
    overlap_scoring: bool = True
    """Whether reference, critic and reward model score finished answers during generation, in the idle slots
    of the pipeline. Takes the memory of a forward pass over one answer in addition to the cache. Has no
    effect without parallel.pp, or with parallel.cp, generation.tp or generation.pp."""
    reference_baseline: bool = True
    """Whether the reward of the reference's answer to the same prompt is subtracted from each reward."""


@frozen_section
class PPOConfig(TokenizedRoot):
    """Settings of `ppo`."""

    run: TrainingRunSection = Field(default_factory=partial(TrainingRunSection, name="ppo"))
    """Run folder, seed and resuming."""
    model: ModelSection
    """The policy to train."""
    critic: CriticSection = Field(default_factory=CriticSection)
    """The critic."""
    reward: PPORewardSection
    """The reward."""
    reference: OptionalModelSection = Field(default_factory=OptionalModelSection)
    """The policy of the KL term."""
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    """The tokenizer of all models."""
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    """The layout of all models."""
    data: PPOPromptsSection
    """The prompts."""
    generation: GenerationSection = Field(default_factory=GenerationSection)
    """Sampling."""
    optimizer: OptimizerSection = Field(default_factory=partial(OptimizerSection, lr=1e-6))
    """Optimizer of policy and critic; critic.lr is the critic's learning rate."""
    train: PPOTrainSection
    """Length, batches, memory and checkpoints."""
    ppo: PPOSection = Field(default_factory=PPOSection)
    """The algorithm."""
    evaluate: EvaluateWithinSection = Field(default_factory=EvaluateWithinSection)
    """Evaluation on the way."""
    observe: ObserveSection = Field(default_factory=ObserveSection)
    """Outputs of metrics."""

    from_yaml = FromYaml()

    def __post_init__(self) -> None:
        if self.generation.temperature == 0:
            raise ValueError("generation.temperature is 0: PPO needs sampled answers, set it above 0")
        if self.ppo.sft_coef > 0 and self.data.sft_path is None:
            raise ValueError(
                f"ppo.sft_coef is {self.ppo.sft_coef}, but there are no demonstrations: set data.sft_path, "
                "or ppo.sft_coef to 0"
            )
        if self.ppo.sft_coef == 0 and self.data.sft_path is not None:
            raise ValueError(
                f"data.sft_path is {self.data.sft_path}, but ppo.sft_coef is 0, which does not use it: set "
                "ppo.sft_coef above 0, or data.sft_path to null"
            )
        if "optimizers" in self.train.offload and self.optimizer.in_backward:
            raise ValueError(
                f"train.offload is {list(self.train.offload)} with optimizer.in_backward, whose state cannot "
                "be offloaded: remove optimizers from train.offload, or set optimizer.in_backward to false"
            )
        if self.train.sft_batch_size is not None and self.data.sft_path is None:
            raise ValueError(
                f"train.sft_batch_size is {self.train.sft_batch_size}, but there are no demonstrations: set "
                "data.sft_path and ppo.sft_coef, or train.sft_batch_size to null"
            )

    @property
    def sft_batch_size(self) -> int:
        """Demonstrations per optimizer step of the policy, over all ranks."""
        return self.train.sft_batch_size or -(-self.train.global_batch_size // self.ppo.minibatches)
