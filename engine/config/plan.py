"""The settings of `plan`."""

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from glm_rlhf.engine.config.load import FromYaml
from glm_rlhf.engine.config.sections import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    Count,
    NumBytes,
    PathText,
    RunFolderSection,
    frozen_section,
)


@frozen_section
class PlannedModelSection:
    """The policy."""

    path: PathText
    """Preset's name such as chatglm3-6b, or Hugging Face folder whose config.json gives the shape."""


@frozen_section
class PlannedRoleSection:
    """Another model."""

    path: PathText | None = None
    """Preset's name or Hugging Face folder; null: the policy's shape; the critic's default is the reward
    model's shape, if there is a reward model."""


@frozen_section
class PlannedRewardSection:
    """The reward."""

    path: PathText | None = None
    """Preset's name or Hugging Face folder of a reward model; null: none where reward.function is set, else
    the policy's shape."""
    function: str | None = None
    """`module:function` of a reward function; null: none."""


@frozen_section
class ClusterSection:
    """The machines."""

    gpu: Literal["a100-40gb", "a100-80gb", "h20", "h800", "h100", "h200", "b200"] = "h100"
    """Type of GPU, which gives memory and peak rates."""
    gpus: Count = 8
    """Number of GPUs, one rank each."""
    per_node: Count = 8
    """GPUs per node."""
    memory: NumBytes | None = None
    """Memory per GPU; null: that of the GPU type."""
    reserve: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the memory reserved for CUDA, NCCL and fragmentation."""
    network: NumBytes = 50 * 10**9
    """Bytes per second and GPU between nodes, in one direction; 50GB is 400 Gb/s."""
    disk: NumBytes = 10**9
    """Bytes per second that all ranks together write to the run folder's disk; the batch script asks for its
    signal early enough for a save."""
    rates: PathText | None = None
    """rates.json that `bench` measured; null: assumed fractions of the public peak rates."""

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory < 10**9:
            raise ValueError(
                f"cluster.memory is {self.memory} bytes, it must be at least 1GB: write a size with a unit, "
                "such as 80GB"
            )
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(
                f"cluster.gpus is {self.gpus} with {self.per_node} GPUs per node: it must be a multiple of "
                f"{self.per_node}"
            )


@frozen_section
class PlannedLayoutSection:
    """Fixed sizes of the layout; null: the plan chooses."""

    tp: Count | None = None
    """Tensor-parallel size."""
    pp: Count | None = None
    """Pipeline-parallel size."""
    vpp: Count | None = None
    """Virtual pipeline size: model chunks per stage."""
    cp: Count | None = None
    """Context-parallel size."""


@frozen_section
class PlannedPromptsSection:
    """The prompts."""

    path: PathText = "prompts.jsonl"
    """Prompts (JSON lines or parquet) of the written PPO config; the plan does not read them."""
    max_prompt_tokens: Count = 1024
    """Longest prompt, in tokens; memory is planned for it."""
    mean_prompt_tokens: Count | None = None
    """Mean length of a prompt, in tokens; time is estimated for it; null: half of the longest."""


@frozen_section
class PlannedGenerationSection:
    """Generation of answers."""

    max_new_tokens: Count = 1024
    """Longest answer, in tokens; memory is planned for it."""
    mean_new_tokens: Count | None = None
    """Mean length of an answer, in tokens; time is estimated for it; null: half of the longest."""
    temperature: Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE)] = 1.0
    """Divides the logits before sampling; if it is not 1, the policy's logprobs are recomputed for every
    answer."""
    num_samples: Count = 1
    """Answers per prompt."""
    max_batch: Count = 256
    """Most sequences generated at once per model replica (tp × pp ranks); the plan may choose fewer."""
    page_size: Count = 16
    """Positions per page of the key/value cache."""
    max_step_tokens: Count = 8192
    """Most tokens per step of generation."""


@frozen_section
class PlannedTrainSection:
    """Batches, precision and memory of training."""

    steps: Count = 1000
    """Iterations of the written PPO config."""
    global_batch_size: Count = 512
    """Prompts per iteration, over all ranks."""
    micro_batch_tokens: Count | None = None
    """Most tokens per micro-batch; null: the plan chooses."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations."""
    recompute_layers: bool | None = None
    """Whether backward recomputes the activations of each layer; null: the plan chooses."""
    offload: tuple[Literal["optimizers", "reference", "reward"], ...] = ()
    """States offloaded to host memory in phases that do not need them, as in `ppo`; the estimate counts no
    time for the copies."""


@frozen_section
class PlannedPPOSection:
    """Settings of PPO that change time or memory."""

    epochs: Count = 1
    """Epochs over the answers of an iteration."""
    minibatches: Count = 1
    """Mini-batches, each one optimizer step, per epoch."""
    reference_baseline: bool = True
    """Whether the reference answers each prompt too, for the baseline."""


@frozen_section
class PlanSection:
    """The report."""

    alternatives: Count = 3
    """Number of plans to show, fastest first; the config and scripts are written for the fastest."""
    scaling_to: Count = 1024
    """The report scales the first plan to 2, 4, 8 … times the GPUs and prompts, up to this many GPUs."""


@frozen_section
class PlanConfig:
    """Settings of `plan`."""

    run: RunFolderSection = Field(default_factory=partial(RunFolderSection, name="plan"))
    """Folder of the config and the launch scripts."""
    model: PlannedModelSection
    """The policy."""
    critic: PlannedRoleSection = Field(default_factory=PlannedRoleSection)
    """The critic."""
    reward: PlannedRewardSection = Field(default_factory=PlannedRewardSection)
    """The reward."""
    reference: PlannedRoleSection = Field(default_factory=PlannedRoleSection)
    """The policy of the KL term."""
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    """The machines."""
    parallel: PlannedLayoutSection = Field(default_factory=PlannedLayoutSection)
    """Fixed sizes of the layout."""
    data: PlannedPromptsSection = Field(default_factory=PlannedPromptsSection)
    """The prompts."""
    generation: PlannedGenerationSection = Field(default_factory=PlannedGenerationSection)
    """Generation of answers."""
    train: PlannedTrainSection = Field(default_factory=PlannedTrainSection)
    """Batches, precision and memory."""
    ppo: PlannedPPOSection = Field(default_factory=PlannedPPOSection)
    """The algorithm."""
    plan: PlanSection = Field(default_factory=PlanSection)
    """The report."""

    from_yaml = FromYaml()
