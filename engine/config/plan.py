"""The settings of `plan`."""

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from glm_rlhf.engine.config.load import FromYaml
from glm_rlhf.engine.config.sections import Count, NumBytes, PathText, RunFolderSection, frozen_section
from glm_rlhf.engine.config.training import Positive


@frozen_section
class PlannedModelSection:
    """The policy."""

    path: PathText
    """Hugging Face folder, of which config.json is read, or a preset's name such as chatglm3-6b."""


@frozen_section
class PlannedRoleSection:
    """Another model beside the policy."""

    path: PathText | None = None
    """Hugging Face folder or preset's name; null has the policy's shape."""


@frozen_section
class PlannedRewardSection:
    """What gives the reward."""

    path: PathText | None = None
    """Hugging Face folder or preset's name of a reward model; null without a function: the policy's shape."""
    function: str | None = None
    """`module:function` that gives the reward; alone, no reward model is held."""


@frozen_section
class ClusterSection:
    """The machines."""

    gpu: Literal["a100-40gb", "a100-80gb", "h20", "h800", "h100", "h200", "b200"] = "h100"
    """Kind of GPU; says memory and peak rates."""
    gpus: Count = 8
    """GPUs, one rank each."""
    per_node: Count = 8
    """GPUs a node."""
    memory: NumBytes | None = None
    """Memory of a GPU where it is not the kind's; null takes the kind's."""
    reserve: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the memory that is left to CUDA, NCCL and fragmentation."""
    network: NumBytes = 50 * 10**9
    """Bytes a second and GPU between nodes, one direction; 50GB is 400 Gb/s."""
    rates: PathText | None = None
    """rates.json that `bench` measured; null assumes shares of public peaks."""

    def __post_init__(self) -> None:
        if self.memory is not None and self.memory < 10**9:
            raise ValueError(
                f"cluster.memory is {self.memory} bytes, a GPU has more than 1GB: write a size with its "
                "unit, such as 80GB"
            )
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(
                f"cluster.gpus is {self.gpus} with {self.per_node} GPUs a node: give whole nodes, a multiple "
                f"of {self.per_node}"
            )


@frozen_section
class PlannedLayoutSection:
    """What of the layout is decided already; null leaves it to the plan."""

    tp: Count | None = None
    """Tensor parallelism."""
    pp: Count | None = None
    """Pipeline parallelism."""
    vpp: Count | None = None
    """Model chunks per pipeline stage."""
    cp: Count | None = None
    """Context parallelism."""


@frozen_section
class PlannedPromptsSection:
    """The prompts."""

    path: PathText = "prompts.jsonl"
    """JSON lines, or parquet, of prompts, for the config that is written; the plan does not read them."""
    max_prompt_tokens: Count = 1024
    """Longest prompt, in tokens: memory has to hold it."""
    mean_prompt_tokens: Count | None = None
    """Mean prompt, in tokens: time is spent on it; null is half of the longest."""


@frozen_section
class PlannedGenerationSection:
    """How answers are drawn."""

    max_new_tokens: Count = 1024
    """Longest answer, in tokens: memory has to hold it."""
    mean_new_tokens: Count | None = None
    """Mean answer, in tokens: time is spent on it; null is half of the longest."""
    temperature: Positive = 1.0
    """Divides the logits; at any but 1 the policy's logprobs are computed again for every answer."""
    num_samples: Count = 1
    """Answers to each prompt."""
    max_batch: Count = 256
    """Sequences that run at once on a copy of the model, at most; the plan may take fewer."""
    page_size: Count = 16
    """Positions a page of the key/value cache."""
    max_step_tokens: Count = 8192
    """Tokens that go through the model in a step."""


@frozen_section
class PlannedTrainSection:
    """In which portions an iteration is trained on."""

    steps: Count = 1000
    """Iterations, for the config that is written."""
    global_batch_size: Count = 512
    """Prompts an iteration, over all ranks."""
    micro_batch_tokens: Count | None = None
    """Tokens that go through a model at once; null leaves it to the plan."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of weights and activations."""
    recompute_layers: bool | None = None
    """Whether backward runs each layer again; null leaves it to the plan."""
    offload: tuple[Literal["optimizers", "reference", "reward"], ...] = ()
    """What waits in host memory in phases that do not need it, as in `ppo`; copies take no time here."""


@frozen_section
class PlannedPPOSection:
    """The algorithm, as far as it takes time."""

    epochs: Count = 1
    """Passes over an iteration's answers."""
    minibatches: Count = 1
    """Optimizer steps a pass."""
    reference_baseline: bool = True
    """Whether the reference answers each prompt too."""


@frozen_section
class PlanSection:
    """What is shown."""

    alternatives: Count = 3
    """Plans that are shown, the fastest first; the first is written."""
    scaling_to: Count = 1024
    """The first plan is also shown on twice as many GPUs and prompts, and so on, up to this many GPUs."""


@frozen_section
class PlanConfig:
    """Settings of `plan`."""

    run: RunFolderSection = Field(default_factory=partial(RunFolderSection, name="plan"))
    """Where the config and the launch scripts go."""
    model: PlannedModelSection
    """The policy."""
    critic: PlannedRoleSection = Field(default_factory=PlannedRoleSection)
    """The critic; null starts from the reward model, or from the policy."""
    reward: PlannedRewardSection = Field(default_factory=PlannedRewardSection)
    """The reward."""
    reference: PlannedRoleSection = Field(default_factory=PlannedRoleSection)
    """The policy that it is held to."""
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    """The machines."""
    parallel: PlannedLayoutSection = Field(default_factory=PlannedLayoutSection)
    """What of the layout is decided already."""
    data: PlannedPromptsSection = Field(default_factory=PlannedPromptsSection)
    """The prompts."""
    generation: PlannedGenerationSection = Field(default_factory=PlannedGenerationSection)
    """How they are answered."""
    train: PlannedTrainSection = Field(default_factory=PlannedTrainSection)
    """In which portions."""
    ppo: PlannedPPOSection = Field(default_factory=PlannedPPOSection)
    """The algorithm."""
    plan: PlanSection = Field(default_factory=PlanSection)
    """What is shown."""

    from_yaml = FromYaml()
